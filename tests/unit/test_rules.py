"""Rules of the code base, checked over its syntax trees: imports, purity, what is banned."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("router", "services", "kvtransfer", "deploy")
MAX_LINES = 400

ALLOWED_IMPORTS: dict[str, tuple[str, ...]] = {
    "router": (
        "router",
        "services.protocol.messages",
        "services.protocol.client",
        "services.protocol.worker_status",
    ),
    "services": ("services", "kvtransfer"),
    "kvtransfer": ("kvtransfer",),
    "deploy": PACKAGES,
}

PURE_MODULES = (
    "services/protocol/messages.py",
    "services/protocol/worker_status.py",
    "services/config.py",
    "services/engine/batch.py",
    "kvtransfer/spans.py",
    "deploy/observe/trace_view.py",
    "services/scheduler/*.py",
    "services/roles/limits.py",
    "services/tensor_parallel/messages.py",
    "services/transfer/head_slices.py",
    "services/engine/models/sharding.py",
    "services/engine/precision.py",
    "services/memory/sizes.py",
    "services/memory/inputs.py",
    "services/memory/change.py",
    "services/memory/plan.py",
    "services/memory/render.py",
    "services/memory/estimate.py",
    "kvtransfer/messages.py",
    "kvtransfer/protocol/peer_messages.py",
    "kvtransfer/protocol/machine.py",
    "kvtransfer/protocol/receiver.py",
    "kvtransfer/protocol/sender.py",
    "kvtransfer/protocol/deferred.py",
    "kvtransfer/movers/choice.py",
    "kvtransfer/protocol/slots.py",
    "kvtransfer/protocol/limits.py",
    "kvtransfer/protocol/layout.py",
    "router/routing/admission.py",
    "router/routing/policy.py",
    "router/routing/prefix_index.py",
    "router/routing/membership.py",
    "router/config.py",
    "router/routing/failures.py",
    "router/routing/attempt.py",
    "router/routing/routed_request.py",
    "router/routing/load.py",
    "router/routing/retry_queue.py",
    "deploy/bench/engine/limits.py",
    "deploy/bench/engine/timeline.py",
    "deploy/bench/engine/workload.py",
    "deploy/bench/load/arrivals.py",
    "deploy/bench/load/lengths.py",
    "deploy/bench/load/outcome.py",
    "deploy/bench/load/plan.py",
    "deploy/bench/load/prompts.py",
    "deploy/bench/serving/statistics.py",
    "deploy/bench/load/stream.py",
    "deploy/bench/serving/verdict.py",
    "deploy/launcher/supervision.py",
    "deploy/settings/values.py",
)
"""Decisions without a clock, a network or a device: simulated and tested as plain functions."""
IMPURE = (
    "torch",
    "zmq",
    "time",
    "random",
    "secrets",
    "socket",
    "subprocess",
    "threading",
    "asyncio",
    "triton",
)

UNSAFE_MODULES = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve")
UNSAFE_CALLS = ("eval", "exec", "compile", "__import__")
UNSAFE_ATTRIBUTES = (
    ("torch", "load"),
    ("torch", "save"),
    ("multiprocessing", "Queue"),
    ("multiprocessing", "Pipe"),
    ("multiprocessing", "Manager"),
    ("mp", "Queue"),
    ("yaml", "load"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
)
UNSAFE_METHODS = (
    "recv_pyobj",
    "send_pyobj",
    "broadcast_object_list",
    "all_gather_object",
    "gather_object",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
)
PICKLING_CHANNELS = ("multiprocessing.queues", "multiprocessing.managers", "multiprocessing.connection")
BENCHMARKS = "deploy/bench/"
"""They may use a pipe to a process that they started themselves, which nobody else can reach."""
THIS_MACHINE = re.compile(r"(?<![\w.~-])/(?:root|home/\w+)/[\w.-]+|(?<![\w.}-])/tmp/[a-z][\w.-]*")
UNFINISHED = re.compile(r"\b(?:TODO|FIXME|XXX)\b|\bNotImplementedError\b")


@dataclass(frozen=True)
class Module:
    name: str
    tree: ast.Module

    def imports(self) -> Iterator[tuple[int, str]]:
        """`(line, dotted name)` of everything imported, wherever in the file it stands."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield node.lineno, alias.name
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parents = self.name.split("/")[: -node.level]
                    base = ".".join([*parents, base]).rstrip(".")
                for alias in node.names:
                    yield node.lineno, f"{base}.{alias.name}"


def parse(source: str, name: str = "router/example.py") -> Module:
    return Module(name, ast.parse(source))


def code_files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def all_files() -> list[Path]:
    return [*code_files(), *sorted((ROOT / "tests").rglob("*.py"))]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module(path: Path) -> Module:
    return parse(path.read_text(encoding="utf-8"), relative(path))


def is_within(name: str, allowed: str) -> bool:
    return name == allowed or name.startswith(allowed + ".")


def forbidden_imports(example: Module) -> list[str]:
    package = example.name.split("/")[0]
    return [
        f"{example.name}:{line} imports {name}"
        for line, name in example.imports()
        if name.split(".")[0] in PACKAGES
        and not any(is_within(name, allowed) for allowed in ALLOWED_IMPORTS[package])
    ]


def impure_imports(example: Module) -> list[str]:
    return [
        f"{example.name}:{line} imports {name}"
        for line, name in example.imports()
        if name.split(".")[0] in IMPURE
    ]


def unsafe_uses(example: Module) -> list[str]:
    found = [
        f"{example.name}:{line} imports {name}"
        for line, name in example.imports()
        if name.split(".")[0] in UNSAFE_MODULES
        or (name.startswith(PICKLING_CHANNELS) and not example.name.startswith(BENCHMARKS))
        or any(name == f"{owner}.{attribute}" for owner, attribute in UNSAFE_ATTRIBUTES)
    ]
    for node in ast.walk(example.tree):
        if not isinstance(node, ast.Call):
            continue
        match node.func:
            case ast.Name(id=name) if name in UNSAFE_CALLS:
                found.append(f"{example.name}:{node.lineno} calls {name}")
            case ast.Attribute(value=ast.Name(id=owner), attr=attribute) if (
                owner,
                attribute,
            ) in UNSAFE_ATTRIBUTES:
                found.append(f"{example.name}:{node.lineno} calls {owner}.{attribute}")
            case ast.Attribute(attr=attribute) if attribute in UNSAFE_METHODS:
                found.append(f"{example.name}:{node.lineno} calls {attribute}")
    return found


def swallowed_errors(example: Module) -> list[str]:
    return [
        f"{example.name}:{node.lineno}: except: pass"
        for node in ast.walk(example.tree)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (len(node.body) == 1 and isinstance(node.body[0], ast.Pass)))
    ]


@pytest.mark.parametrize("path", code_files(), ids=relative)
def test_imports_follow_the_design(path: Path) -> None:
    assert forbidden_imports(module(path)) == []


@pytest.mark.parametrize("pattern", PURE_MODULES)
def test_pure_modules_are_pure(pattern: str) -> None:
    paths = sorted(ROOT.glob(pattern))
    assert paths, f"{pattern} names no file: is it out of date?"
    assert [use for path in paths for use in impure_imports(module(path))] == []


@pytest.mark.parametrize("path", code_files(), ids=relative)
def test_nothing_unsafe_and_nothing_swallowed(path: Path) -> None:
    assert unsafe_uses(module(path)) == []
    assert swallowed_errors(module(path)) == []


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("import torch.nn", impure_imports),
        ("def f():\n    from time import monotonic", impure_imports),
        ("from services.worker import run", forbidden_imports),
        ("import services", forbidden_imports),
        ("from services import worker", forbidden_imports),
        ("import kvtransfer.messages", forbidden_imports),
        ("from ..kvtransfer import messages", forbidden_imports),
        ("import pickle", unsafe_uses),
        ("from torch import load", unsafe_uses),
        ("import torch\ntorch.load('x')", unsafe_uses),
        ("eval('1')", unsafe_uses),
        ("socket.recv_pyobj()", unsafe_uses),
        ("from multiprocessing import Queue", unsafe_uses),
        ("try:\n    f()\nexcept ValueError:\n    pass", swallowed_errors),
        ("try:\n    f()\nexcept:\n    g()", swallowed_errors),
    ],
)
def test_the_rules_see_what_they_forbid(source: str, rule: object) -> None:
    assert callable(rule)
    assert rule(parse(source))


def test_the_rules_let_the_rest_pass() -> None:
    lines = [
        "from services.protocol.messages import Sampling",
        "from services.protocol import client",
        "import router.routing.policy",
    ]
    example = parse("\n".join([*lines, "import re", "re.compile('a')"]))
    assert forbidden_imports(example) == impure_imports(example) == unsafe_uses(example) == []


def test_init_files_are_empty() -> None:
    full = [relative(path) for path in all_files() if path.name == "__init__.py" and path.read_text().strip()]
    assert full == []


def test_no_folder_for_everything() -> None:
    named = [relative(p) for p in code_files() if {"utils", "common", "helpers", "misc"} & {*p.parts, p.stem}]
    assert named == []


def test_files_are_short() -> None:
    lengths = {relative(path): len(path.read_text().splitlines()) for path in all_files()}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_nothing_unfinished_and_no_path_of_one_machine() -> None:
    here = Path(__file__)
    found = []
    for path in all_files():
        if path == here:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for rule in (THIS_MACHINE, UNFINISHED):
                if match := rule.search(line):
                    found.append(f"{relative(path)}:{number}: {match.group()}")
    assert found == []


@pytest.mark.parametrize("text", ["'/roo" + "t/y'", "/tm" + "p/x", "/home/me/z"])
def test_a_path_of_one_machine_is_seen(text: str) -> None:
    assert THIS_MACHINE.search(text)


def test_a_system_path_is_not_one() -> None:
    assert not THIS_MACHINE.search("ipc:///run/baton/home/x and {base}/tmp/x")
