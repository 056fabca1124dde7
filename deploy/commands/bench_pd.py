"""`baton bench pd MODEL_DIR`: prefill and decode workers against as many unified ones, same load."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import typer

from deploy.commands.serve import checked_slots
from deploy.errors import UserError
from deploy.load_options import BenchPdSettings
from deploy.options import EngineSettings, MoverSettings, ServeSettings, StagingSettings
from deploy.readiness import claim_port
from deploy.settings import settings_of

if TYPE_CHECKING:
    from deploy.load.launched import Candidate
    from deploy.load.rates import Rates
    from deploy.load.statistics import RateFigures, System

INTERRUPTED = 130
DRAIN_TIMEOUT_S = 20.0


def run(settings: BenchPdSettings) -> None:
    import uvloop

    from deploy.load import report
    from deploy.load.chart import check_matplotlib, draw
    from deploy.load.launched import SystemEnded
    from deploy.load.rates import limits_of, rates_of
    from deploy.load.verdict import verdict

    report.check_writable(out=settings.out, chart=settings.chart, log=settings.log)
    if settings.chart is not None:
        check_matplotlib()
    rates, limits = rates_of(settings), limits_of(settings)
    candidates = _candidates(settings)
    model_name = settings.model_dir.resolve().name
    try:
        with (settings.log or Path(os.devnull)).open("w") as log:
            systems = uvloop.run(_measure_all(candidates, settings, rates, log))
    except SystemEnded as ending:
        raise typer.Exit(ending.code or INTERRUPTED) from None
    split, unified = systems
    found = verdict(split, unified, limits, settings.margin)
    print(f"\n{found.text()}")
    if settings.out is not None:
        report.write_json(settings.out, report.result(settings, model_name, limits, systems, found))
    if settings.chart is not None:
        draw(settings.chart, f"{model_name}: {found.answer}", systems, limits)


def _candidates(settings: BenchPdSettings) -> "list[Candidate]":
    """Both, checked before either is started. Raises UserError."""
    from deploy.load.launched import Candidate

    shared = {
        name: getattr(settings, name)
        for kind in (EngineSettings, StagingSettings, MoverSettings)
        for name in settings_of(kind)
    }
    found = []
    workers = settings.prefill + settings.decode
    for name, prefill, decode, unified in (
        (f"{settings.prefill}P{settings.decode}D", settings.prefill, settings.decode, 0),
        (f"{workers} unified", 0, 0, workers),
    ):
        serve = ServeSettings(
            **shared,
            prefix_cache=settings.prefix_cache,
            prefill=prefill,
            decode=decode,
            unified=unified,
            port=claim_port("127.0.0.1", 0),
            request_timeout=settings.timeout,
            drain_timeout=DRAIN_TIMEOUT_S,
        )
        device, slots = checked_slots(serve)
        found.append(Candidate(name, serve, device, slots))
    return found


async def _measure_all(
    candidates: "list[Candidate]", settings: BenchPdSettings, rates: "Rates", log: TextIO
) -> "list[System]":
    import asyncio

    from deploy.load import report
    from deploy.load.errors import LoadError
    from deploy.load.launched import with_launched
    from deploy.load.measure import measure
    from deploy.load.rates import limits_of
    from deploy.load.statistics import System
    from deploy.load.target import served_model, target_of

    limits = limits_of(settings)
    systems: list[System] = []
    for candidate in candidates:

        async def work(url: str, gpus: int = candidate.gpus) -> "list[RateFigures]":
            model = await asyncio.to_thread(served_model, url, None, None)
            print(report.head_lines(), flush=True)
            return await measure(
                target_of(url, None),
                model,
                rates,
                gpus,
                lambda one: print(report.row_lines(one, limits), flush=True),
            )

        unit = "GPU" if candidate.device == "cuda" else "worker"
        print(f"{candidate.name}, {candidate.gpus} {unit}{'s' if candidate.gpus > 1 else ''}", flush=True)
        try:
            found = await with_launched(candidate, log, settings.start_timeout, work)
        except LoadError as error:
            raise UserError(f"{candidate.name}: {error}") from None
        systems.append(System(candidate.name, candidate.gpus, found, unit))
    return systems
