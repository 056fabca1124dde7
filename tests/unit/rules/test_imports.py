"""Who may import whom: between the packages, and between the layers of one."""

from pathlib import Path

import pytest

from tests.unit.rules.syntax import PACKAGES, Module, code_files, module, parse, relative

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

LAYERS = (
    # The router: a request goes down from the API, and its answer comes up again.
    "router.errors",
    "router.ids",
    "router.config",
    "router.isolation",
    "router.child_process",
    "router.openai",
    "router.text",
    "router.chat",
    "router.routing",
    "router.prepare",
    "router.api",
    "router.process",
    # A worker.
    "services.protocol",
    "services.config",
    "services.rates",
    "services.scheduler",
    "services.engine.errors",
    "services.engine.events",
    "services.engine.step_events",
    "services.engine.batch",
    "services.engine.host_copy",
    "services.engine.peak_memory",
    "services.engine.rank_group",
    "services.engine.ops",
    "services.engine.checkpoint",
    "services.engine.kv",
    "services.engine.attention",
    "services.engine.sampling",
    "services.engine.step_inputs",
    "services.engine.models",
    "services.engine",
    "services.memory",
    "services.tensor_parallel",
    "services.transfer",
    "services.isolation",
    "services.roles",
    "services.tracing",
    "services.startup",
    "services.worker",
    # A transfer process, and what a worker needs to talk to one.
    "kvtransfer.errors",
    "kvtransfer.config",
    "kvtransfer.messages",
    "kvtransfer.spans",
    "kvtransfer.watched",
    "kvtransfer.stop_signal",
    "kvtransfer.protocol",
    "kvtransfer.net",
    "kvtransfer.codecs",
    "kvtransfer.buffer",
    "kvtransfer.movers",
    "kvtransfer.peers",
    "kvtransfer.stats",
    "kvtransfer.worker_port",
    "kvtransfer.open_transfers",
    "kvtransfer.client",
    "kvtransfer.process",
    # The command line.
    "deploy.errors",
    "deploy.settings",
    "deploy.demo",
    "deploy.observe",
    "deploy.launcher",
    "deploy.bench.errors",
    "deploy.bench.machine",
    "deploy.bench.load",
    "deploy.bench.kernels",
    "deploy.bench.engine",
    "deploy.bench.model_dir",
    "deploy.bench.transfer",
    "deploy.bench.router",
    "deploy.bench.serving",
    "deploy.commands",
    "deploy.cli",
    "deploy.__main__",
)
"""Lowest first. A module imports from its own layer and from those below. The longest name that fits counts:
`services.engine` stands for what of the engine is not named above it."""


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


def layer_of(name: str) -> int | None:
    fitting = [layer for layer in LAYERS if is_within(name, layer)]
    return LAYERS.index(max(fitting, key=len)) if fitting else None


def imports_back_up(example: Module) -> list[str]:
    package = example.name.split("/")[0]
    own = layer_of(example.name.removesuffix(".py").replace("/", "."))
    found = []
    for line, name in example.imports():
        other = layer_of(name)
        if is_within(name, package) and own is not None and other is not None and other > own:
            found.append(f"{example.name}:{line} ({LAYERS[own]}) imports {name}")
    return found


def without_layer(names: list[str]) -> list[str]:
    dotted = [name.removesuffix("/__init__.py").removesuffix(".py").replace("/", ".") for name in names]
    return [name for name in dotted if layer_of(name) is None and name not in (*PACKAGES, "deploy.bench")]


@pytest.mark.parametrize("path", code_files(), ids=relative)
def test_packages_import_as_designed(path: Path) -> None:
    assert forbidden_imports(module(path)) == []


@pytest.mark.parametrize("path", code_files(), ids=relative)
def test_no_folder_imports_back_up(path: Path) -> None:
    assert imports_back_up(module(path)) == []


def test_every_module_has_its_layer() -> None:
    assert without_layer([relative(path) for path in code_files()]) == []


def test_every_layer_is_there() -> None:
    names = [relative(path).removesuffix(".py").replace("/", ".") for path in code_files()]
    assert [layer for layer in LAYERS if not any(is_within(name, layer) for name in names)] == []


@pytest.mark.parametrize(
    "source",
    [
        "from services.worker import run",
        "import services",
        "from services import worker",
        "import kvtransfer.messages",
        "from ..kvtransfer import messages",
    ],
)
def test_an_import_across_packages_is_seen(source: str) -> None:
    assert forbidden_imports(parse(source))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("router/text/tokenizer.py", "from router.api.app import App"),
        ("router/routing/policy.py", "def f():\n    from router.process import run"),
        ("services/engine/ops/qkv.py", "import services.engine.kv.pool"),
        ("services/engine/models/llama.py", "from services.engine import engine"),
        ("services/scheduler/pages.py", "from services import worker"),
        ("kvtransfer/protocol/slots.py", "from ..net import channel"),
        ("deploy/bench/serving/layouts.py", "from deploy.commands.serve import run"),
    ],
)
def test_an_import_back_up_is_seen(name: str, source: str) -> None:
    assert imports_back_up(parse(source, name))


def test_a_module_without_a_layer_is_seen() -> None:
    names = ["router/__init__.py", "router/stray.py", "router/api/app.py", "deploy/bench/stray/__init__.py"]
    assert without_layer(names) == ["router.stray", "deploy.bench.stray"]


def test_imports_down_and_beside_pass() -> None:
    lines = [
        "from services.protocol.messages import Sampling",
        "from services.protocol import client",
        "import router.routing.policy",
        "from router.text import tokenizer",
        "from router.errors import Refusal",
    ]
    example = parse("\n".join([*lines, "import re", "re.compile('a')"]), "router/routing/dispatcher.py")
    assert forbidden_imports(example) == imports_back_up(example) == []
