"""What makes a process a good child of the launcher: it ends when the launcher does, and leaves no directory.

The launcher may be killed with SIGKILL, so the child must notice by itself: a thread waits for the launcher's
end, has the process drain by a SIGTERM, and kills it if it does not come to its end within its grace. Not the
kernel's PR_SET_PDEATHSIG: it follows a thread, and comes once for each thread that a dying launcher has left,
and a second SIGTERM means to hurry.
"""

import contextlib
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from deploy.launcher import run_directory

_EXTRA_GRACE_S = 5.0


@contextlib.contextmanager
def child_of_launcher(parent_pid: int | None, run_dir: Path | None, grace_s: float) -> Iterator[None]:
    """Around a process's `run()`. Without a `parent_pid` (not started by a launcher) nothing is watched.

    On leaving, the run directory is removed if this was the last process to use it. Until the process has
    handlers of its own, SIGTERM ends it with a clean SystemExit.
    """
    signal.signal(signal.SIGTERM, _leave)
    try:
        if parent_pid is not None:
            _follow(parent_pid, grace_s)
        yield
    finally:
        if run_dir is not None:
            run_directory.leave(run_dir, launcher_lives=os.getppid() == parent_pid)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def _follow(parent_pid: int, grace_s: float) -> None:
    try:
        watched = os.pidfd_open(parent_pid)
    except ProcessLookupError:
        raise SystemExit(0) from None
    if os.getppid() != parent_pid:  # it ended before, and another process may have its number
        raise SystemExit(0)
    threading.Thread(target=_end_with, args=(watched, grace_s), name="launcher-watch", daemon=True).start()


def log_to_stderr() -> None:
    """Plain lines; the launcher adds the name of the process."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for package in ("deploy", "kvtransfer", "router", "services"):
        logging.getLogger(package).setLevel(logging.INFO)


def _end_with(watched: int, grace_s: float) -> None:
    poll = select.poll()
    poll.register(watched, select.POLLIN)
    poll.poll()
    # Nobody reads our output any more; a write must not become an error in the middle of draining.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_s + _EXTRA_GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)
