"""Whether prefill and decode on separate workers are worth it, from the figures of both systems. Pure.

With limits the question is how many good requests a GPU can serve, at the rate that suits each system best.
Without limits every latency and the output rate are compared at every rate, and both answers can be right.
"""

import math
from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from deploy.bench.serving.statistics import RateFigures, SloLimits, System

Answer = Literal["disaggregate", "do not disaggregate", "it depends"]
NOISE_ERRORS = 2.0
"""A difference of shares within this many standard errors is not told from noise."""
COMPARED = (
    ("TTFT p50", "ttft_ms", "p50"),
    ("TTFT p99", "ttft_ms", "p99"),
    ("second token p50", "second_token_ms", "p50"),
    ("ITL p99", "itl_ms", "p99"),
    ("TPOT p50", "tpot_ms", "p50"),
)


class Verdict(Struct, frozen=True):
    answer: Answer
    reasons: list[str]

    def text(self) -> str:
        return "\n  ".join([f"verdict: {self.answer}", *self.reasons])


def verdict(split: System, unified: System, limits: SloLimits, margin: float) -> Verdict:
    """Differences up to `margin`, a share, count as none, and then the simpler system is better."""
    return _by_goodput(split, unified, margin) if limits.given else _by_latency(split, unified, margin)


def _by_goodput(split: System, unified: System, margin: float) -> Verdict:
    mine, other = _best(split), _best(unified)
    ours, theirs = mine.goodput_per_gpu, other.goodput_per_gpu
    reasons = [
        f"{system.name}: at best {one.goodput_per_gpu:.3g} good requests/s per {system.unit}, "
        f"at {one.rate:g} req/s ({one.good} of {one.requests} good)"
        for system, one in ((split, mine), (unified, other))
    ]
    if max(ours, theirs) == 0:
        return Verdict("do not disaggregate", [*reasons, "neither keeps the limits at any rate"])
    noise = NOISE_ERRORS * math.hypot(_error(mine), _error(other))
    least = max(margin * max(ours, theirs), noise)
    if abs(ours - theirs) <= least:
        reasons.append(
            f"within {least:.2g} of each other, which is margin or noise: the simpler system is enough"
        )
        return Verdict("do not disaggregate", reasons)
    if theirs:
        reasons.append(f"{split.name} serves {ours / theirs:.2f} times the good requests of {unified.name}")
    else:
        reasons.append(f"{unified.name} serves none")
    return Verdict("disaggregate" if ours > theirs else "do not disaggregate", reasons)


def _best(system: System) -> RateFigures:
    return max(system.rates, key=lambda one: one.goodput)


def _error(one: RateFigures) -> float:
    """The standard error of `goodput_per_gpu`, from the share of good requests (never 0: one request
    more or less is always possible)."""
    share = (one.good + 1) / (one.requests + 2)
    per_share = one.goodput_per_gpu * one.requests / one.good if one.good else 0.0
    return per_share * math.sqrt(share * (1 - share) / one.requests)


def _by_latency(split: System, unified: System, margin: float) -> Verdict:
    better: list[str] = []
    worse: list[str] = []
    for mine, other in zip(split.rates, unified.rates, strict=True):
        at = f"at {mine.rate:g} req/s"
        for name, field, quantile in COMPARED:
            ours, theirs = _value(mine, field, quantile), _value(other, field, quantile)
            if ours is not None and theirs is not None:
                text = f"{name} {at}: {ours:.3g} ms against {theirs:.3g}"
                _sort(theirs - ours, margin * max(ours, theirs), text, better, worse)
        ours, theirs = mine.output_tokens_per_s, other.output_tokens_per_s
        text = f"output {at}: {ours:.0f} tok/s against {theirs:.0f}"
        _sort(ours - theirs, margin * max(ours, theirs), text, better, worse)
        text = f"completed {at}: {mine.completed} against {other.completed} of {mine.requests}"
        _sort(mine.completed - other.completed, 0.0, text, better, worse)
    reasons = [*_listed(f"{split.name} is better", better), *_listed(f"{split.name} is worse", worse)]
    if better and worse:
        return Verdict("it depends", [*reasons, "limits decide: give --slo-ttft-ms and --slo-itl-ms"])
    if better:
        return Verdict("disaggregate", reasons)
    nothing = f"no figure differs by more than {margin:.0%}: the simpler system is enough"
    return Verdict("do not disaggregate", reasons or [nothing])


def _value(one: RateFigures, field: str, quantile: str) -> float | None:
    spread = getattr(one, field)
    return None if spread is None else float(getattr(spread, quantile))


def _sort(gain: float, least: float, text: str, better: list[str], worse: list[str]) -> None:
    if abs(gain) > least:
        (better if gain > 0 else worse).append(text)


def _listed(head: str, found: Sequence[str]) -> list[str]:
    return [f"{head}: {one}" for one in found]
