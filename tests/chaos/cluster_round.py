"""One cluster's time under load and faults: several phases, each of which ends with everything at rest."""

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.chaos.client import Answer
from tests.chaos.evidence import evidence
from tests.chaos.faults import Faults, children, is_complete
from tests.chaos.leaks import Watched
from tests.chaos.load import Load
from tests.chaos.outages import Outages
from tests.chaos.report import Report
from tests.chaos.requests import Plan
from tests.chaos.system import LAYOUTS, System, lasting, started
from tests.e2e.cluster import wait_until
from tests.patience import patient

PHASE_S = 50.0
COMPLETE_S = patient(90.0)
"""Longest wait of a restart after three deaths in a row, and the start of a worker on a busy machine."""
MEET_S = 0.25


@dataclass(frozen=True)
class Round:
    layout: str
    seconds: float
    seed: str
    model_dir: Path
    log_dir: Path


def run_round(round_: Round, plans: list[Plan], right: dict[int, Answer], report: Report) -> None:
    """Adds what it finds to `report`. Raises NoNamespaces for two hosts that cannot be."""
    round_.log_dir.mkdir()
    watched, outages = Watched(), Outages()
    try:
        with started(round_.layout, round_.model_dir, round_.log_dir) as system:
            load = Load(system.url, plans, right, outages, report)
            workers = sum(LAYOUTS[round_.layout])
            faults = Faults(system, workers, round_.seed, outages, report, load.meet)
            try:
                asyncio.run(_phases(round_, system, load, faults, watched))
                system.stop()
            except AssertionError:
                report.evidence += [f"{round_.layout}: {line}" for line in evidence(system)]
                raise
    except AssertionError as error:
        report.violate("unrest", f"{round_.layout}: {error}")
    report.growth.append(f"{round_.layout}: {watched.growth()}")
    for what in watched.grown():
        report.violate("leak", what)
    for what in watched.left():
        report.violate("left", what)


async def _phases(round_: Round, cluster: System, load: Load, faults: Faults, watched: Watched) -> None:
    beside = [asyncio.create_task(faults.watch()), asyncio.create_task(_meet(cluster, watched))]
    count = max(1, round(round_.seconds / PHASE_S))
    try:
        for phase in range(count + 1):  # the first one is without faults
            asking = asyncio.create_task(load.run(f"{round_.seed} {phase}"))
            if phase == 0:
                async with asyncio.timeout(COMPLETE_S):
                    await load.warm.wait()
            else:
                await faults.run(time.monotonic() + round_.seconds / count)
            load.end()
            await asking
            await asyncio.to_thread(_wait_complete, cluster, faults.workers)
            await asyncio.to_thread(cluster.assert_at_rest)
            watched.look(lasting(cluster) | children(cluster))
    finally:
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)


def _wait_complete(cluster: System, workers: int) -> None:
    asked_s = time.monotonic()

    def complete() -> bool:
        try:
            return is_complete(cluster.cluster(), workers, time.monotonic() - asked_s)
        except httpx.TransportError:
            return False

    wait_until(f"all {workers} workers are back", complete, COMPLETE_S)


async def _meet(cluster: System, watched: Watched) -> None:
    while True:
        watched.meet(cluster.processes())
        await asyncio.sleep(MEET_S)
