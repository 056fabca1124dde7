"""The private directory of one launcher: its processes' sockets, and nothing else.

Its name says whose it is (process number and that process's start time, so that a reused number is not
mistaken for a living launcher). Short, because a UNIX socket's path may have 107 bytes.
"""

import contextlib
import os
import re
import shutil
import socket
import stat
import tempfile
from pathlib import Path

WORKERS = "workers"
"""The file that lists the router's workers."""
_FRESH_WORKERS = "workers.new"
_CONTROL = "control-"
_NAME = re.compile(r"baton-(\d+)-(\d+)")
_LONGEST_SOCKET_NAME = "prefill-63-transfer-63"
_MAX_SOCKET_PATH_BYTES = 107


def create(base: Path | None = None) -> Path:
    """Makes this process's directory, mode 0700, below `base` (the temporary directory by default)."""
    base = Path(tempfile.gettempdir()) if base is None else base
    name = f"baton-{os.getpid()}-{_start_ticks(os.getpid())}"
    if len(os.fsencode(base / name / _LONGEST_SOCKET_NAME)) > _MAX_SOCKET_PATH_BYTES:
        base = Path("/tmp")
    directory = base / name
    directory.mkdir(mode=0o700)
    return directory


def write_workers(directory: Path, endpoints: list[str]) -> None:
    """Replaces the list of workers as a whole."""
    fresh = directory / _FRESH_WORKERS
    fresh.write_text("".join(f"{endpoint}\n" for endpoint in endpoints), encoding="utf-8")
    fresh.replace(directory / WORKERS)


def control_socket(directory: Path, port: int) -> Path:
    """Where the launcher whose router listens on `port` takes commands."""
    return directory / f"{_CONTROL}{port}"


def find_control_sockets(port: int, base: Path | None = None) -> list[Path]:
    """The sockets of this user's launchers, below `base`; some of these may be dead."""
    bases = {Path(tempfile.gettempdir()), Path("/tmp")} if base is None else {base}
    directories = sorted(directory for one in bases for directory in one.glob("baton-*-*"))
    sockets = [control_socket(directory, port) for directory in directories if _is_ours(directory)]
    return [one for one in sockets if one.is_socket()]


def control_sockets_in(directory: Path) -> list[Path]:
    return sorted(directory.glob(f"{_CONTROL}*")) if _is_ours(directory) else []


def leave(directory: Path, launcher_lives: bool) -> None:
    """A child ends. The last one after the launcher's death removes the directory, for which what the
    launcher itself has left must go first."""
    if not launcher_lives:
        for file in (directory / WORKERS, directory / _FRESH_WORKERS, *control_sockets_in(directory)):
            with contextlib.suppress(OSError):
                file.unlink()
    with contextlib.suppress(OSError):
        directory.rmdir()


def remove(directory: Path) -> None:
    """Removes the directory, also when the last child has already done so."""
    shutil.rmtree(directory, ignore_errors=True)


def sweep(base: Path | None = None) -> list[Path]:
    """Removes what dead launchers of this user left, and returns it. A directory in which something still
    listens belongs to processes that are draining: they remove it themselves."""
    base = Path(tempfile.gettempdir()) if base is None else base
    removed = []
    for directory in sorted(base.glob("baton-*-*")):
        match = _NAME.fullmatch(directory.name)
        if match is None or not _is_ours(directory):
            continue
        pid, ticks = int(match.group(1)), int(match.group(2))
        if _start_ticks(pid) != ticks and not _anybody_listens(directory):
            remove(directory)
            removed.append(directory)
    return removed


def _is_ours(directory: Path) -> bool:
    try:
        status = directory.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()


def _start_ticks(pid: int) -> int | None:
    """When a process started, in the kernel's ticks since boot; None if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])


def _anybody_listens(directory: Path) -> bool:
    with contextlib.suppress(OSError):
        for entry in directory.iterdir():
            if not stat.S_ISSOCK(entry.lstat().st_mode):
                continue
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                try:
                    probe.connect(str(entry))
                except OSError:
                    continue
                return True
    return False
