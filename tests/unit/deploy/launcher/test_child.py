"""A child ends with its launcher, even if that is killed, and the last one removes the run directory."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.patience import patient

DEADLINE_S = patient(30.0)

CHILD = """
import os, signal, sys, threading
from pathlib import Path
import deploy.launcher.child as child
child._EXTRA_GRACE_S = 0.1
with child.child_of_launcher(int(sys.argv[1]), Path(sys.argv[2]), 0.1):
    if sys.argv[3] == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(os.getpid(), flush=True)
    while True:
        threading.Event().wait(60)
"""

LAUNCHER = """
import os, subprocess, sys
child = [sys.executable, "-c", sys.argv[1], str(os.getpid()), *sys.argv[2:]]
subprocess.run(child, start_new_session=True)
"""


def wait_gone(pid: int) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline_s, f"{pid} is still there"
        time.sleep(0.02)


@pytest.mark.parametrize("temper", ["willing", "stubborn"])
def test_ends_when_the_launcher_is_killed(tmp_path: Path, temper: str) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, CHILD, str(run_dir), temper], stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    child_pid = int(launcher.stdout.readline())
    launcher.kill()
    launcher.wait()
    wait_gone(child_pid)
    launcher.stdout.close()
    if temper == "willing":
        assert not run_dir.exists()


def test_sigterm_before_it_is_ready_ends_cleanly(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "socket").touch()
    arguments = [sys.executable, "-c", CHILD, str(os.getpid()), str(run_dir), "willing"]
    child = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=DEADLINE_S)
    assert child.returncode == 0
    assert run_dir.exists(), "somebody else's socket lies in it still"


def test_a_launcher_that_is_gone_already(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    arguments = [sys.executable, "-c", CHILD, str(gone.pid), str(tmp_path), "willing"]
    done = subprocess.run(arguments, capture_output=True, timeout=DEADLINE_S, check=False)
    assert (done.returncode, done.stdout) == (0, b"")
