"""Sends one rate's load and waits for what becomes of it: an open loop, on one event loop of its own.

1. Requests are sent when they are due, however many are still open.
2. The run ends when every request has ended; each has its own deadline, so that it does end.
"""

import asyncio
import contextlib
import gc
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass

from deploy.bench.load.client import LoadClient
from deploy.bench.load.outcome import Outcome
from deploy.bench.load.plan import PlannedLoad
from deploy.bench.load.target import Target

_LEAD_S = 0.05
"""Between the start of a run and its first request, so that this one is not late by the start itself."""


@dataclass(frozen=True, slots=True)
class Driven:
    """`cpu_share` is this process's use of one core from the first request to the last answer."""

    outcomes: list[Outcome]
    cpu_share: float


async def drive(target: Target, load: PlannedLoad, timeout_s: float) -> Driven:
    """Sends everything that was planned, and waits for its end. Cancelling it closes every connection."""
    left = len(load.planned)
    all_ended = asyncio.Event()

    def on_end() -> None:
        nonlocal left
        left -= 1
        if not left:
            all_ended.set()

    client = LoadClient(target, timeout_s, on_end)
    with _many_files(), _no_collection():
        start_s, cpu_s = time.perf_counter() + _LEAD_S, time.process_time()
        outcomes = [Outcome(planned, start_s + planned.at_s) for planned in load.planned]
        try:
            for outcome in outcomes:
                await _sleep_until(outcome.scheduled_s)
                client.send(outcome)
            await all_ended.wait()
        finally:
            client.close()
        used_s, took_s = time.process_time() - cpu_s, time.perf_counter() - start_s
    return Driven(outcomes, used_s / took_s)


async def _sleep_until(due_s: float) -> None:
    """Timers count whole milliseconds: it may be half of one early or late."""
    if (wait_s := due_s - time.perf_counter()) > 0:
        await asyncio.sleep(wait_s)


@contextlib.contextmanager
def _many_files() -> Iterator[None]:
    """Raises the limit of open files to what the system lets this process have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps the garbage collector off: a pause in the middle would count as the server's."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
