"""Decisions without a clock, a network or a device: simulated and tested as plain functions."""

import pytest

from tests.unit.rules.syntax import ROOT, Module, module, parse, relative

IMPURE = (
    "asyncio",
    "httpx",
    "pynvml",
    "random",
    "secrets",
    "socket",
    "subprocess",
    "threading",
    "time",
    "torch",
    "triton",
    "zmq",
)

PURE = (
    "router/*.py",
    "router/routing/*.py",
    "router/text/*.py",
    "services/config.py",
    "services/rates.py",
    "services/protocol/messages.py",
    "services/protocol/worker_status.py",
    "services/protocol/framing.py",
    "services/scheduler/*.py",
    "services/engine/batch.py",
    "services/engine/precision.py",
    "services/engine/checkpoint/*.py",
    "services/engine/models/sharding.py",
    "services/memory/*.py",
    "services/tensor_parallel/messages.py",
    "services/tensor_parallel/page_tables.py",
    "services/transfer/*.py",
    "services/roles/*.py",
    "kvtransfer/messages.py",
    "kvtransfer/spans.py",
    "kvtransfer/open_transfers.py",
    "kvtransfer/protocol/*.py",
    "kvtransfer/movers/choice.py",
    "deploy/settings/*.py",
    "deploy/observe/trace_view.py",
    "deploy/launcher/supervision.py",
    "deploy/launcher/scale_plan.py",
    "deploy/bench/load/*.py",
    "deploy/bench/serving/*.py",
    "deploy/bench/engine/limits.py",
    "deploy/bench/engine/shapes.py",
    "deploy/bench/engine/timeline.py",
    "deploy/bench/engine/workload.py",
)
EXCEPTIONS = {
    "router/process.py": "the process around it all",
    "router/routing/discovery.py": "asks the DNS",
    "router/routing/dispatcher.py": "the loop that gives the others its clock",
    "router/routing/metrics.py": "says when the router was started",
    "router/routing/traces.py": "waits for the workers' answers",
    "router/text/conversion.py": "converts in a process of its own",
    "services/memory/measure.py": "asks the driver",
    "services/transfer/links.py": "polls the sockets of the transfer processes",
    "deploy/bench/load/client.py": "sends requests",
    "deploy/bench/load/drive.py": "sends them on time",
    "deploy/bench/serving/launched.py": "launches what is measured",
    "deploy/bench/serving/layouts.py": "measures",
    "deploy/bench/serving/measure.py": "measures",
}
"""What lies in a pure folder and is not pure, and why it is there."""


def impure_imports(example: Module) -> list[str]:
    return [
        f"{example.name}:{line} imports {name}"
        for line, name in example.imports()
        if name.split(".")[0] in IMPURE
    ]


@pytest.mark.parametrize("pattern", PURE)
def test_pure_modules_are_pure(pattern: str) -> None:
    paths = sorted(ROOT.glob(pattern))
    assert paths, f"{pattern} names no file: is it out of date?"
    pure = [path for path in paths if relative(path) not in EXCEPTIONS]
    assert [use for path in pure for use in impure_imports(module(path))] == []


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_an_exception_is_needed(name: str) -> None:
    assert any(ROOT / name in ROOT.glob(pattern) for pattern in PURE)
    assert impure_imports(module(ROOT / name))


@pytest.mark.parametrize("source", ["import torch.nn", "def f():\n    from time import monotonic"])
def test_an_impure_import_is_seen(source: str) -> None:
    assert impure_imports(parse(source))


def test_other_imports_pass() -> None:
    assert impure_imports(parse("import math\nfrom router.routing.timeline import time")) == []
