"""Latency and goodput against the rate, one line for each system, as a PNG."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.bench.serving.statistics import RateFigures, SloLimits, System
from deploy.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (
    "#0b6e99", "#d9730d", "#0f7b6c", "#ad1a72", "#6940a5", "#9f6b53", "#5e7a00", "#37352f",
)  # fmt: skip
INCHES = (11.0, 7.5)


def check_matplotlib() -> None:
    """Raises UserError before anything is measured where a chart could not be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(
            "--chart: matplotlib is missing; install it with: pip install 'baton[bench]'"
        ) from None


def draw(path: Path, title: str, systems: list[System], limits: SloLimits) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, layout="constrained")
    figure.suptitle(title)
    (first, gap), (per_token, last) = figure.subplots(2, 2)
    for axes, name, text, limit in (
        (first, "ttft_ms", "time to first token, ms", limits.ttft_ms),
        (gap, "itl_ms", "gap between tokens, ms", limits.itl_ms),
        (per_token, "tpot_ms", "time per output token, ms", limits.tpot_ms),
    ):
        _latency(axes, systems, name, text, limit)
    _goodput(last, systems, limits)
    figure.savefig(path, dpi=120)


def _latency(axes: "Axes", systems: list[System], name: str, text: str, limit: float | None) -> None:
    for system, colour in zip(systems, itertools.cycle(COLOURS), strict=False):
        for quantile, style in (("p50", "-"), ("p99", "--")):
            points = [
                (one.rate, spread) for one in system.rates if (spread := getattr(one, name)) is not None
            ]
            rates, values = [rate for rate, _ in points], [getattr(spread, quantile) for _, spread in points]
            label = f"{system.name} {quantile}"
            axes.plot(rates, values, style, color=colour, marker="o", markersize=4, label=label)
    if limit is not None:
        axes.axhline(limit, color="grey", linewidth=1, linestyle=":", label="limit")
    axes.set_yscale("log")
    _finish(axes, text)


def _goodput(axes: "Axes", systems: list[System], limits: SloLimits) -> None:
    """With limits, good requests a second and GPU; without any, output tokens a second and GPU."""

    def value(one: RateFigures, gpus: int) -> float:
        return one.goodput_per_gpu if limits.given else one.output_tokens_per_s / gpus

    for system, colour in zip(systems, itertools.cycle(COLOURS), strict=False):
        rates = [one.rate for one in system.rates]
        values = [value(one, system.gpus) for one in system.rates]
        axes.plot(rates, values, color=colour, marker="o", markersize=4, label=system.name)
    axes.set_ylim(bottom=0)
    what = "good requests" if limits.given else "output tokens"
    _finish(axes, f"{what}/s per {systems[0].unit}")


def _finish(axes: "Axes", text: str) -> None:
    axes.set_title(text)
    axes.set_xlabel("requests/s")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
