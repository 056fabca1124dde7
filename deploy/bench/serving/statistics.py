"""The figures of one rate, from the outcomes of its requests. Pure."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from deploy.bench.load.options import LoadSettings
from deploy.bench.load.outcome import Outcome
from deploy.bench.load.plan import PlannedLoad
from deploy.bench.serving.exposed import Exposed


class SloLimits(Struct, frozen=True):
    """What a request must keep to be a good one; None: no limit. `itl_ms` is for 99 of 100 of its gaps."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    itl_ms: float | None = None

    @property
    def given(self) -> bool:
        return any(limit is not None for limit in (self.ttft_ms, self.tpot_ms, self.itl_ms))

    def text(self) -> str:
        named = (("TTFT", self.ttft_ms), ("TPOT", self.tpot_ms), ("ITL", self.itl_ms))
        return ", ".join(f"{name} <= {limit:g} ms" for name, limit in named if limit is not None)


def limits_of(settings: LoadSettings) -> SloLimits:
    return SloLimits(settings.slo_ttft_ms, settings.slo_tpot_ms, settings.slo_itl_ms)


class Spread(Struct, frozen=True):
    """Percentiles with linear interpolation."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


class ClientDelay(Struct, frozen=True):
    """This process's own part: how late it sent, and how much of one core it used while it measured."""

    lag_ms: Spread | None
    cpu_share: float


class RateFigures(Struct, frozen=True):
    """One rate, as asked for, and as `offered_rate` of the requests that were measured.

    Latencies are of requests that got all their tokens, in ms. Tokens a second are those that arrived within
    `span_s`, in which the measured requests arrived; `goodput` is good requests for each second of it.
    """

    rate: float
    offered_rate: float
    requests: int
    completed: int
    failures: dict[str, int]
    left_out: int
    span_s: float
    ttft_ms: Spread | None
    second_token_ms: Spread | None
    itl_ms: Spread | None
    tpot_ms: Spread | None
    e2e_ms: Spread | None
    input_tokens_per_request: float
    output_tokens_per_s: float
    tokens_per_chunk: float
    chunks_per_arrival: float
    good: int
    goodput: float
    goodput_per_gpu: float
    client: ClientDelay
    second_gap_ms: Spread | None = None
    """From the first chunk to the second."""
    exposed_kv_ms: Exposed | None = None
    """From the first token to the whole KV at the decode worker, as the router counts it."""
    busy: dict[str, float] = {}
    """For each role of worker, the share of the run in which it had a step to do; empty if unknown."""


class System(Struct, frozen=True):
    """One system under one load, one entry a rate. Its `gpus` count in `unit`: without GPUs, workers."""

    name: str
    gpus: int
    rates: list[RateFigures]
    unit: str = "GPU"


def spread(values: Sequence[float]) -> Spread | None:
    """The spread of values; None where there are none."""
    if not values:
        return None
    array = np.asarray(values, dtype=np.float64)
    p50, p90, p99 = (float(value) for value in np.percentile(array, (50, 90, 99)))
    return Spread(len(array), float(array.mean()), p50, p90, p99, float(array.max()))


def is_good(outcome: Outcome, limits: SloLimits) -> bool:
    """Whether a request got all its tokens, and each limit was kept."""
    if outcome.failure is not None:
        return False
    if limits.ttft_ms is not None and outcome.first_token_s * 1e3 > limits.ttft_ms:
        return False
    per_token_s = outcome.per_token_s
    if limits.tpot_ms is not None and per_token_s is not None and per_token_s * 1e3 > limits.tpot_ms:
        return False
    gaps_s = outcome.gaps_s
    if limits.itl_ms is None or not gaps_s:
        return True
    return float(np.percentile(gaps_s, 99)) * 1e3 <= limits.itl_ms


def figures_of(
    outcomes: Sequence[Outcome],
    load: PlannedLoad,
    rate: float | None,
    limits: SloLimits,
    gpus: int,
    cpu_share: float,
) -> RateFigures:
    """The figures of the measured requests; only the output rate counts all that came in the window."""
    measured = [one for one in outcomes if one.planned.measured]
    done = [one for one in measured if one.failure is None]
    good = sum(is_good(one, limits) for one in measured)
    start_s = min(one.scheduled_s for one in measured)
    span_s = load.span_s or max(one.ended_s for one in measured) - start_s
    tokens = sum(one.tokens_between(start_s, start_s + span_s) for one in outcomes)
    chunks = sum(sum(one.chunks) for one in done)
    arrivals = sum(len(one.chunks) for one in done)
    return RateFigures(
        rate=load.rate if rate is None else rate,
        offered_rate=load.rate,
        requests=len(measured),
        completed=len(done),
        failures=dict(Counter(one.failure for one in measured if one.failure is not None).most_common()),
        left_out=load.left_out,
        span_s=span_s,
        ttft_ms=spread([one.first_token_s * 1e3 for one in done]),
        second_token_ms=spread([s * 1e3 for one in done if (s := one.second_token_s) is not None]),
        itl_ms=spread([gap_s * 1e3 for one in done for gap_s in one.gaps_s]),
        tpot_ms=spread([s * 1e3 for one in done if (s := one.per_token_s) is not None]),
        e2e_ms=spread([one.whole_s * 1e3 for one in done]),
        input_tokens_per_request=sum(one.planned.input_tokens for one in measured) / len(measured),
        output_tokens_per_s=tokens / span_s,
        tokens_per_chunk=sum(one.tokens for one in done) / chunks if chunks else 0.0,
        chunks_per_arrival=chunks / arrivals if arrivals else 0.0,
        good=good,
        goodput=good / span_s,
        goodput_per_gpu=good / span_s / gpus,
        second_gap_ms=spread([s * 1e3 for one in done if (s := one.second_gap_s) is not None]),
        client=ClientDelay(spread([one.lag_s * 1e3 for one in measured]), cpu_share),
    )
