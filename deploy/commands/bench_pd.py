"""`baton bench pd MODEL_DIR`: prefill and decode workers against as many unified ones, same load."""

from deploy.bench.load.options import BenchPdSettings, Layout


def run(settings: BenchPdSettings) -> None:
    from deploy.bench.serving.chart import draw
    from deploy.bench.serving.layouts import measured
    from deploy.bench.serving.report import result, write_json
    from deploy.bench.serving.statistics import limits_of
    from deploy.bench.serving.verdict import verdict

    layouts = (Layout(settings.prefill, settings.decode), Layout(unified=settings.prefill + settings.decode))
    split, unified = measured(settings, layouts)
    limits, model_name = limits_of(settings), settings.model_dir.resolve().name
    found = verdict(split, unified, limits, settings.margin)
    print(f"\n{found.text()}")
    if settings.out is not None:
        write_json(settings.out, result(settings, model_name, limits, [split, unified], found))
    if settings.chart is not None:
        draw(settings.chart, f"{model_name}: {found.answer}", [split, unified], limits)
