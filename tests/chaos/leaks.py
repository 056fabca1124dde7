"""What grows in a process that lives long, and what the dead leave behind."""

import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import psutil

from tests.patience import patient

DESCRIPTORS = 12
"""A process that talks to all the others may hold a few more connections than at the first look."""
RESIDENT_BYTES = 96 << 20
ENDS_S = patient(60.0)
"""After a SIGKILL of the launcher its children drain first, and are killed after their grace."""
SHARED_MEMORY = Path("/dev/shm")
SYSTEM_V = Path("/proc/sysvipc/shm")


@dataclass(frozen=True, slots=True)
class Size:
    name: str
    descriptors: int
    resident_bytes: int


@dataclass(slots=True)
class Watched:
    """One cluster's processes, by number and start time; `sizes` are those of every look at rest."""

    seen: dict[int, psutil.Process] = field(default_factory=dict)
    sizes: dict[tuple[int, float], list[Size]] = field(default_factory=dict)
    shared: set[Path] = field(default_factory=set)

    def meet(self, processes: Iterable[psutil.Process]) -> None:
        """Call it often: a killed process is known only if it was met before."""
        for process in processes:
            self.seen[process.pid] = process
            with contextlib.suppress(psutil.Error, OSError):
                self.shared.update(_shared_memory(process.pid))

    def look(self, processes: dict[str, psutil.Process]) -> None:
        """At rest only."""
        for name, process in processes.items():
            with contextlib.suppress(psutil.NoSuchProcess):
                size = Size(name, process.num_fds(), process.memory_info().rss)
                self.sizes.setdefault((process.pid, process.create_time()), []).append(size)

    def grown(self) -> list[str]:
        found = []
        for sizes in self.sizes.values():
            first, last = sizes[0], sizes[-1]
            if last.descriptors - first.descriptors > DESCRIPTORS:
                found.append(f"{first.name}: descriptors {[one.descriptors for one in sizes]}")
            if last.resident_bytes - first.resident_bytes > RESIDENT_BYTES:
                found.append(f"{first.name}: resident MiB {[one.resident_bytes >> 20 for one in sizes]}")
        return found

    def growth(self) -> str:
        """The most that one process grew between its first and its last look."""
        pairs = [(sizes[0], sizes[-1]) for sizes in self.sizes.values() if len(sizes) > 1]
        descriptors = max((last.descriptors - first.descriptors for first, last in pairs), default=0)
        grown_bytes = max((last.resident_bytes - first.resident_bytes for first, last in pairs), default=0)
        return f"{len(pairs)} lived on and grew by at most {descriptors} descriptors, {grown_bytes >> 20} MiB"

    def left(self, ends_s: float = ENDS_S) -> list[str]:
        """After the cluster has stopped. Waits up to `ends_s` for what is still coming to its end."""
        pause, until_s = Event(), time.monotonic() + ends_s
        while self._running() and time.monotonic() < until_s:
            pause.wait(0.1)
        found = [f"{path} is left" for path in self.shared if path.exists()]
        found += [f"System V segment of process {pid}" for pid in _system_v_owners() if pid in self.seen]
        found += [f"process {pid} still runs" for pid in self._running()]
        return found

    def _running(self) -> list[int]:
        return [pid for pid, process in self.seen.items() if _runs(process)]


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _shared_memory(pid: int) -> set[Path]:
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    paths = (line.split(maxsplit=5)[5] for line in lines if f" {SHARED_MEMORY}/" in line)
    return {Path(path) for path in paths if not path.endswith(" (deleted)")}


def _system_v_owners() -> list[int]:
    if not SYSTEM_V.exists():
        return []
    return [int(line.split()[4]) for line in SYSTEM_V.read_text().splitlines()[1:]]
