"""One system, launched for a measurement and stopped after it by the launcher of `baton serve`."""

import asyncio
import json
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TextIO, TypeVar

from deploy.bench.load.errors import LoadError
from deploy.launcher import run_directory
from deploy.launcher.children import WorkerSlot, child_specs, worker_endpoints
from deploy.launcher.launcher import Launcher
from deploy.launcher.output import Screen
from deploy.launcher.readiness import Welcome
from deploy.settings.options import ServeSettings
from services.config import Device

T = TypeVar("T")
_ASK_INTERVAL_S = 0.2
_ASK_TIMEOUT_S = 2.0


class SystemEnded(Exception):
    """The system ended while it was needed, with `code`; 0 means that a signal asked for it."""

    def __init__(self, code: int) -> None:
        super().__init__(f"ended with code {code}")
        self.code = code


@dataclass(frozen=True, slots=True)
class SystemCandidate:
    """A system that is checked and not yet launched."""

    name: str
    settings: ServeSettings
    device: Device
    slots: list[WorkerSlot]

    @property
    def gpus(self) -> int:
        """The GPUs that it takes; its workers, on a CPU."""
        if self.device == "cpu":
            return len(self.slots)
        return len({slot.device_index for slot in self.slots})


async def with_launched(
    candidate: SystemCandidate, log: TextIO, start_timeout_s: float, work: Callable[[str], Awaitable[T]]
) -> T:
    """Start it, wait until every worker is ready, do `work(url)`, stop it, whatever happens.

    Raises SystemEnded, LoadError if it is not ready in time, and what `work` raises.
    """
    settings = candidate.settings
    run_dir = run_directory.create()
    welcome = Welcome(settings.host, settings.port, settings.model_dir.name, None)
    run_directory.write_workers(run_dir, worker_endpoints(candidate.slots, run_dir))
    specs = child_specs(settings, candidate.slots, candidate.device, run_dir, settings.port)
    launcher = Launcher(specs, run_dir, settings.drain_timeout, welcome, Screen(log))
    running = asyncio.create_task(launcher.run())

    async def ready_and_work() -> T:
        await _all_ready(welcome.url, len(candidate.slots), start_timeout_s)
        return await work(welcome.url)

    working = asyncio.create_task(ready_and_work())
    try:
        await asyncio.wait({running, working}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            raise SystemEnded(running.result())
        return working.result()
    finally:
        working.cancel()
        launcher.stop()
        await asyncio.gather(running, working, return_exceptions=True)


async def _all_ready(url: str, workers: int, timeout_s: float) -> None:
    """`/ready` does with one pair or one unified worker; a comparison needs them all."""
    end_s = time.monotonic() + timeout_s
    while (found := await asyncio.to_thread(_ready_workers, url)) < workers:
        if time.monotonic() > end_s:
            raise LoadError(f"{found} of {workers} workers are ready after {timeout_s:g} s")
        await asyncio.sleep(_ASK_INTERVAL_S)


def _ready_workers(url: str) -> int:
    """How many workers the router knows to be ready; 0 while it does not answer."""
    try:
        with urllib.request.urlopen(f"{url}/cluster", timeout=_ASK_TIMEOUT_S) as answer:
            workers = json.load(answer)["workers"]
    except (OSError, ValueError):
        return 0
    return sum(one["status"] is not None and one["status"]["state"] == "ready" for one in workers)
