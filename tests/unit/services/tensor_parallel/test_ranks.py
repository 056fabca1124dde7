"""The leading rank's watch over the others: whatever happens to one, the worker ends with one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import patient

ROOT = Path(__file__).parents[4]
OBEDIENT = "while data := os.read(int(sys.argv[3]), 65536): got = data"
"""A rank that takes every command, answers none, and ends with its leader."""
LEADER = """
import logging, sys, threading
from pathlib import Path
import services.tensor_parallel.rank_pool
from services.config import WorkerConfig
from services.tensor_parallel.messages import CopyKv, CopyRun, LoadWeights
logging.basicConfig(level=logging.WARNING)
services.tensor_parallel.rank_pool.sys.executable = sys.argv[1]
services.tensor_parallel.rank_pool.STEP_TIMEOUT_S = services.tensor_parallel.rank_pool.VERDICT_S = 0.2
config = WorkerConfig("one", "decode", Path("m"), "ipc:///none", tp=3)
ranks = services.tensor_parallel.rank_pool.RankPool(config, Path("none"))
blocked = threading.Event()
"""


def lead(tmp_path: Path, rank: str, then: str) -> tuple[int, str]:
    """Exit code and output of a leader whose ranks run `rank`, and which itself goes on with `then`."""
    program = tmp_path / "rank"
    program.write_text(f"#!{sys.executable}\nimport os, sys\n{rank}\n")
    program.chmod(0o700)
    ended = subprocess.run(
        [sys.executable, "-c", LEADER + then, str(program)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=patient(60),
        check=False,
    )
    return ended.returncode, ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("rank", "then", "says"),
    [
        ("sys.exit(3)", "blocked.wait(50)", "of one ended by exit code 3: the worker ends with it"),
        ("os.kill(os.getpid(), 9)", "blocked.wait(50)", "of one ended by signal SIGKILL"),
        (
            OBEDIENT,
            "with ranks.within(0.2, 'a step'): blocked.wait(50)",
            "a step of one is not over in time: a rank hangs, the worker ends",
        ),
        (
            OBEDIENT,
            "ranks.send(LoadWeights())\nranks.answers(0.2)",
            "RankError: rank 1 of one: no word from it for 0.2 s",
        ),
        (
            OBEDIENT,
            "run = CopyRun([0], 0, 1, 0, 0, 1)\n"
            "copy = ranks.copy_kv(2, CopyKv(True, 0, [run], False))\nwhile not copy.query(): ...",
            "RankError: rank 2 of one: a pack or unpack is not done after 0.2 s",
        ),
    ],
    ids=["exits", "is killed", "hangs in a sum", "does not answer", "does not copy"],
)
def test_no_rank_is_waited_for_without_end(tmp_path: Path, rank: str, then: str, says: str) -> None:
    code, output = lead(tmp_path, rank, then)
    assert code == 1
    assert output.count(says) == 1, output


def test_ranks_that_are_told_to_leave_are_no_failure(tmp_path: Path) -> None:
    code, output = lead(
        tmp_path, OBEDIENT, "services.tensor_parallel.rank_pool.LEAVE_S = 0.1\nranks.close()\nranks.close()"
    )
    assert (code, output) == (0, ""), "the last resort is a kill, without a word"
