"""Runs tests of kernels in Triton's interpreter, which only a process that was started for it can have.

A test with `@interpreted` is an item like any other, but it is a child that runs it: a pytest session which
has collected the files once, and runs whatever is named to it. One child serves all such tests of a process,
which pay for its imports once.

    parent -> child   one JSON string a line: the node id of a test
    child -> parent   one JSON string a line: what went wrong, empty if nothing did
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROOT = Path(__file__).parents[2]

interpreted = pytest.mark.interpreted


class Interpreter:
    """The child, for the parent. Started by the first `run`, and again after one that did not come to its
    end."""

    def __init__(self, files: Sequence[str]) -> None:
        self._files = files
        self._child: subprocess.Popen[str] | None = None

    def run(self, node_id: str) -> str:
        """What went wrong in a test; empty if nothing did."""
        if self._child is None:
            environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "tests.engine.interpreter", *self._files]
            self._child = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        child = self._child
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(json.dumps(node_id) + "\n")
            child.stdin.flush()
            answer = child.stdout.readline()
            return str(json.loads(answer)) if answer else f"the interpreter ended with code {child.wait()}"
        except BaseException:  # such as the test's time being up: the child may be anywhere in it
            child.kill()
            raise
        finally:
            if child.poll() is not None:
                self.close()

    def close(self) -> None:
        if self._child is not None:
            self._child.communicate()  # the end of its input is the end of its session
            self._child = None


class Served:
    """pytest's plugin in the child: in place of the usual loop, items run as they are named."""

    def __init__(self, questions: TextIO, answers: TextIO) -> None:
        self._questions, self._answers = questions, answers
        self._wrong: list[str] = []

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        for line in self._questions:
            self._wrong = []
            item = items[json.loads(line)]
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            print(json.dumps("\n".join(self._wrong)), file=self._answers, flush=True)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:
            self._wrong.append(f"{report.outcome} in the interpreter:\n{report.longreprtext}")


def main(files: list[str]) -> int:
    questions, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what pytest prints is no answer, nor does it leave its tests an input
    # no conftest: the parent's is what watches over the test, and has the time limit
    options = ["-q", "--noconftest", "-p", "no:cacheprovider", "--timeout=0"]
    return int(pytest.main([*options, *files], plugins=[Served(questions, answers)]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
