"""What holds for every test: GPU tests skip visibly without a GPU, and no test leaves a process behind.

Where several processes run tests (`make test`), a file's tests stay together, so that what they share is
started once; and all GPU tests stay together, so that no two want the same memory.

`--require-gpu` turns skipped GPU tests into an error, for where a GPU was expected.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from tests.patience import patient

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling

MARK = "PYTEST_SESSION_OF_BATON"  # no BATON_ variable: children are started without those
LEFT_BEHIND_WAIT_S = patient(5.0)
LONGEST = (
    "tests/sim/test_sim.py",
    "tests/e2e/test_faults.py",
    "tests/e2e/test_tokens.py",
    "tests/e2e/test_migration.py",
    "tests/e2e/test_mixed.py",
    "tests/e2e/test_precision.py",
    "tests/e2e/test_ranks.py",
    "tests/e2e/test_bench_pd.py",
    "tests/e2e/test_life.py",
    "tests/e2e/test_chaos.py",
    "tests/e2e/test_scale.py",
    "tests/e2e/test_alone.py",
    "tests/engine/sampling/test_sample_kernels.py",
)
"""Files that several processes begin with, so that the last ones to run are short."""


def has_gpu() -> bool:
    """Without torch, which most tests do not need: does the driver list a device?"""
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU " in listed.stdout


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="no GPU test may be skipped")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        rank = {file: place for place, file in enumerate(LONGEST)}
        items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))
    gpu_folder = Path(__file__).parent / "gpu"
    for item in items:
        if gpu_folder in item.path.parents:
            item.add_marker(pytest.mark.gpu)
    wanted = [item for item in items if item.get_closest_marker("gpu")]
    if not wanted or has_gpu():
        return
    if config.getoption("--require-gpu"):
        raise pytest.UsageError(f"--require-gpu: {len(wanted)} tests need an NVIDIA GPU, and there is none")
    for item in wanted:
        item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test's time limit is a deadline like the others, unless one is given for this run."""
    if item.config.getoption("timeout") is None:
        own = item.get_closest_marker("timeout")
        seconds = own.args[0] if own is not None else float(item.config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(patient(seconds)), append=False)
    return (yield)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> "LoadScopeScheduling":
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "gpu" if file.startswith("tests/gpu/") else file

    return ByFile(config, log)


@pytest.fixture(scope="session", autouse=True)
def no_process_left_behind() -> Iterator[None]:
    """Fails the session if a process that a test started, or one of that process's, is still there.

    Children inherit a mark by environment, so that those which lost their parent are found too.
    """
    os.environ[MARK] = str(os.getpid())
    yield
    del os.environ[MARK]
    deadline_s = time.monotonic() + LEFT_BEHIND_WAIT_S
    while left := [process for process in psutil.process_iter() if is_ours(process)]:
        if time.monotonic() > deadline_s:
            described = ", ".join(f"{process.pid} {process.cmdline()[:8]}" for process in left)
            for process in left:
                process.kill()
            pytest.fail(f"processes left behind: {described}")
        time.sleep(0.05)


def is_ours(process: psutil.Process) -> bool:
    """A living process with this session's mark. A zombie has ended, and has no environment."""
    try:
        return process.pid != os.getpid() and process.environ().get(MARK) == str(os.getpid())
    except (psutil.Error, OSError):
        return False
