"""Layouts of the same model, launched and measured one after the other under the same load."""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import typer
import uvloop

from deploy.bench.load.errors import LoadError
from deploy.bench.load.options import LaunchedSettings, Layout
from deploy.bench.load.rates import Rates, rates_of
from deploy.bench.load.target import served_model, target_of
from deploy.bench.serving import report
from deploy.bench.serving.chart import check_matplotlib
from deploy.bench.serving.launched import SystemCandidate, SystemEnded, with_launched
from deploy.bench.serving.measure import measure
from deploy.bench.serving.statistics import RateFigures, System, limits_of
from deploy.errors import UserError
from deploy.launcher.preflight import checked_slots
from deploy.launcher.readiness import claim_port
from deploy.settings.options import EngineSettings, MoverSettings, ServeSettings, StagingSettings
from deploy.settings.schema import settings_of

DRAIN_TIMEOUT_S = 20.0
INTERRUPTED = 130


def measured(settings: LaunchedSettings, layouts: Sequence[Layout]) -> list[System]:
    """The figures of each layout. Everything is checked before the first is started.

    Raises UserError, and typer.Exit if one ends.
    """
    report.check_writable(out=settings.out, chart=settings.chart, log=settings.log)
    if settings.chart is not None:
        check_matplotlib()
    rates = rates_of(settings)
    found = _candidates(settings, layouts)
    try:
        with (settings.log or Path(os.devnull)).open("w") as log:
            return uvloop.run(_measure_all(found, settings, rates, log))
    except SystemEnded as ending:
        raise typer.Exit(ending.code or INTERRUPTED) from None


def _candidates(settings: LaunchedSettings, layouts: Sequence[Layout]) -> list[SystemCandidate]:
    shared = {
        name: getattr(settings, name)
        for kind in (EngineSettings, StagingSettings, MoverSettings)
        for name in settings_of(kind)
    }
    found = []
    for layout in layouts:
        serve = ServeSettings(
            **shared,
            prefix_cache=settings.prefix_cache,
            prefill=layout.prefill,
            decode=layout.decode,
            unified=layout.unified,
            port=claim_port("127.0.0.1", 0),
            slo_itl_ms=settings.slo_itl_ms,
            request_timeout=settings.timeout,
            drain_timeout=DRAIN_TIMEOUT_S,
        )
        device, slots, _ = checked_slots(serve)
        found.append(SystemCandidate(layout.name, serve, device, slots))
    return found


async def _measure_all(
    candidates: Sequence[SystemCandidate], settings: LaunchedSettings, rates: Rates, log: TextIO
) -> list[System]:
    """Measures layouts one after the other, and prints figures as they come."""
    limits = limits_of(settings)
    systems: list[System] = []
    for candidate in candidates:

        async def work(url: str, gpus: int = candidate.gpus) -> list[RateFigures]:
            model = await asyncio.to_thread(served_model, url, None, None)
            print(report.head_lines(), flush=True)

            def show(one: RateFigures) -> None:
                print(report.row_lines(one, limits), flush=True)

            return await measure(target_of(url, None), model, rates, gpus, show)

        unit = "GPU" if candidate.device == "cuda" else "worker"
        print(f"{candidate.name}, {candidate.gpus} {unit}{'s' if candidate.gpus > 1 else ''}", flush=True)
        try:
            found = await with_launched(candidate, log, settings.start_timeout, work)
        except LoadError as error:
            raise UserError(f"{candidate.name}: {error}") from None
        systems.append(System(candidate.name, candidate.gpus, found, unit))
    return systems
