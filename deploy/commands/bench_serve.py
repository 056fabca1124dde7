"""`baton bench serve`: a load on any OpenAI endpoint."""

import typer

from deploy.bench.load.options import BenchServeSettings
from deploy.errors import UserError


def run(settings: BenchServeSettings) -> None:
    import uvloop

    from deploy.bench.load.errors import LoadError
    from deploy.bench.load.rates import rates_of
    from deploy.bench.load.target import served_model, target_of
    from deploy.bench.serving import report
    from deploy.bench.serving.chart import check_matplotlib, draw
    from deploy.bench.serving.measure import measure
    from deploy.bench.serving.statistics import System, limits_of

    report.check_writable(out=settings.out, chart=settings.chart)
    if settings.chart is not None:
        check_matplotlib()
    rates, limits = rates_of(settings), limits_of(settings)
    api_key = settings.api_key[0] if settings.api_key else None
    try:
        target = target_of(settings.url, api_key)
    except LoadError as error:
        raise UserError(f"--url: {error}") from None
    try:
        model = served_model(settings.url, api_key, settings.model)
    except LoadError as error:
        raise UserError(
            f"--{'model' if settings.model and 'names' in str(error) else 'url'}: {error}"
        ) from None
    print(f"{model.name} at {settings.url}" + (f", good: {limits.text()}" if limits.given else ""))
    print(report.head_lines(), flush=True)
    found = uvloop.run(
        measure(
            target, model, rates, settings.gpus, lambda one: print(report.row_lines(one, limits), flush=True)
        )
    )
    system = System(settings.url, settings.gpus, found)
    if settings.out is not None:
        report.write_json(settings.out, report.result(settings, model.name, limits, [system]))
    if settings.chart is not None:
        draw(settings.chart, f"{model.name} at {settings.url}", [system], limits)
    if not any(one.completed for one in found):
        raise typer.Exit(1)
