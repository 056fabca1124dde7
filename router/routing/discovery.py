"""Worker discovery: a file of endpoints that is read twice a second, and DNS names that are resolved.

What cannot be read or resolved at the moment keeps what it said last: a list that is lost is no reason to
leave workers.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path

from router.isolation import Borders

logger = logging.getLogger(__name__)

LOOK_S = 0.5
RESOLVE_S = 2.0
"""Between two answers of a name server; also the longest wait for one."""
MAX_FILE_BYTES = 1 << 20
MAX_ENDPOINT_CHARACTERS = 512
MAX_WORKERS = 1024
"""Of one list: each costs a connection."""
DNS_SCHEME = "tcp+dns://"

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""The IPv4 addresses of a name, for a port. Raises OSError."""


def listed_endpoints(text: str) -> tuple[list[str], list[str]]:
    """The endpoints in a workers file: one a line, lines that are empty or begin with `#` aside. The second
    list has the lines that cannot be endpoints."""
    endpoints: list[str] = []
    bad: list[str] = []
    for line in map(str.strip, text.splitlines()):
        if not line or line.startswith("#"):
            continue
        known = line.startswith(("ipc:///", "tcp://"))
        good = known and line.isprintable() and " " not in line and len(line) <= MAX_ENDPOINT_CHARACTERS
        (endpoints if good else bad).append(line)
    return endpoints, bad


class WorkersFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: list[str] = []
        self._complained: set[str] = set()

    def look(self) -> list[str]:
        """The endpoints that it names now; what is wrong with it is logged once."""
        try:
            with self._path.open("rb") as file:
                raw = file.read(MAX_FILE_BYTES + 1)
            if len(raw) > MAX_FILE_BYTES:
                raise ValueError(f"larger than {MAX_FILE_BYTES} bytes")
            self._known, bad = listed_endpoints(raw.decode("utf-8"))
        except (OSError, ValueError) as error:
            self._complain({f"cannot be read: {error}"})
            return self._known
        complaints = {f"not an endpoint, like ipc:///path or tcp://host:port: {one[:80]!r}" for one in bad}
        if len(self._known) > MAX_WORKERS:
            complaints.add(f"more than {MAX_WORKERS} workers; the first ones are taken")
            self._known = self._known[:MAX_WORKERS]
        self._complain(complaints)
        return self._known

    def _complain(self, complaints: set[str]) -> None:
        for complaint in sorted(complaints - self._complained):
            logger.warning("workers file %s: %s", self._path, complaint)
        self._complained = complaints


async def resolve_ipv4(name: str, port: int) -> Sequence[str]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(name, port, family=socket.AF_INET, type=socket.SOCK_STREAM)
    return sorted({str(address[0]) for *_, address in found})


class WorkerName:
    """`tcp+dns://NAME:PORT`: a worker at every address that the name has, as a headless Service gives one for
    each pod. `#key-name` goes with each."""

    def __init__(self, given: str, resolve: Resolve = resolve_ipv4) -> None:
        address, hash_sign, key_name = given.removeprefix(DNS_SCHEME).partition("#")
        self._name, _, port = address.rpartition(":")
        self._port, self._suffix = int(port), hash_sign + key_name
        self._resolve = resolve
        self._failing = False
        self.endpoints: list[str] = []

    async def refresh(self) -> None:
        try:
            found = await asyncio.wait_for(self._resolve(self._name, self._port), RESOLVE_S)
        except (OSError, TimeoutError, UnicodeError) as error:  # a label may be too long to be asked for
            if not self._failing:
                logger.warning("workers at %s: not resolved: %r", self._name, error)
            self._failing = True
            return
        self._failing = False
        self.endpoints = [f"tcp://{one}:{self._port}{self._suffix}" for one in found[:MAX_WORKERS]]


class Discovery:
    """Calls `on_found(endpoints)` every `LOOK_S` with all that is known, if there is anything to look at."""

    def __init__(
        self,
        file: WorkersFile | None,
        names: Iterable[WorkerName],
        on_found: Callable[[list[str]], None],
        borders: Borders,
    ) -> None:
        self._file, self._names, self._on_found, self._borders = file, list(names), on_found, borders
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """In the running loop."""
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._keep(name)) for name in self._names]
        if self._file is not None or self._names:
            self._tasks.append(loop.create_task(self._watch()))

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _keep(self, name: WorkerName) -> None:
        while True:
            try:
                await name.refresh()
            except BaseException as error:
                self._borders.contain("discovery", "the workers of a name", error)
            await asyncio.sleep(RESOLVE_S)

    async def _watch(self) -> None:
        while True:
            try:
                found = [] if self._file is None else list(self._file.look())
                for name in self._names:
                    found += name.endpoints
                self._on_found(found)
            except BaseException as error:
                self._borders.contain("discovery", "the workers that are listed", error)
            await asyncio.sleep(LOOK_S)
