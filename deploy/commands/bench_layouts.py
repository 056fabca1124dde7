"""`baton bench layouts MODEL_DIR`: how many workers of which role, under one load."""

from deploy.bench.load.options import BenchLayoutsSettings


def run(settings: BenchLayoutsSettings) -> None:
    from deploy.bench.serving.chart import draw
    from deploy.bench.serving.layouts import measured
    from deploy.bench.serving.report import best_lines, result, write_json
    from deploy.bench.serving.statistics import limits_of

    systems = measured(settings, settings.layouts)
    limits, model_name = limits_of(settings), settings.model_dir.resolve().name
    print(f"\n{best_lines(systems, limits)}")
    if settings.out is not None:
        write_json(settings.out, result(settings, model_name, limits, systems))
    if settings.chart is not None:
        draw(settings.chart, f"{model_name}: layouts", systems, limits)
