"""The router's metrics, and the body of `/metrics`.

The router counts requests with prometheus-client's types, in a registry of its own. Its times are in
`Histogram`, a collector of that registry: prometheus-client's own, with its locks and its walk over the
buckets, costs five times as much, and there is an observation for each token. What other parts count, and
what workers report in their statuses, is collected when `/metrics` is asked for.
"""

import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from router.isolation import Borders
from router.routing.attempt import AttemptPhase
from router.routing.routed_request import RetryBudget, RoutedRequest
from services.protocol.worker_status import METRIC_FAMILIES, Status, status_samples

disable_created_metrics()  # type: ignore[no-untyped-call]  # all series begin with the router

_SHORT_S = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5,
    1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
_EXPOSED_S = (
    0.0005, 0.001, 0.0015, 0.002, 0.0025, 0.003, 0.0035, 0.004, 0.005, 0.006, 0.008, 0.01, 0.0125, 0.015,
    0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
)  # fmt: skip
_LONG_S = (
    0.001, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0,
)  # fmt: skip
RATE_WINDOW_S = 5
_FAMILY_TYPES = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily}


class Histogram(Collector):
    """A histogram of seconds: an observation is a bisection and two additions.

    `counts[i]` are the values of at most `bounds[i]`, the last entry all above."""

    __slots__ = ("_name", "_text", "bounds", "counts", "sum_s")

    def __init__(self, name: str, text: str, bounds_s: Sequence[float]) -> None:
        self._name, self._text = name, text
        self.bounds = list(bounds_s)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum_s = 0.0

    def observe(self, value_s: float) -> None:
        self.counts[bisect_left(self.bounds, value_s)] += 1
        self.sum_s += value_s

    def collect(self) -> Iterable[Metric]:
        bounds = [*map(str, self.bounds), "+Inf"]
        buckets = list(zip(bounds, map(float, accumulate(self.counts)), strict=True))
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self.sum_s)


class TokenRate:
    """Tokens a second over the last few whole seconds of the loop's clock."""

    def __init__(self) -> None:
        self._tokens = [0] * (RATE_WINDOW_S + 1)
        self._second = 0

    def add(self, tokens: int, now_s: float) -> None:
        self._turn(int(now_s))
        self._tokens[self._second % len(self._tokens)] += tokens

    def per_second(self, now_s: float) -> float:
        self._turn(int(now_s))
        current = self._second % len(self._tokens)
        return sum(count for slot, count in enumerate(self._tokens) if slot != current) / RATE_WINDOW_S

    def _turn(self, second: int) -> None:
        if second <= self._second:
            return
        size = len(self._tokens)
        for passed in range(max(self._second + 1, second - size + 1), second + 1):
            self._tokens[passed % size] = 0
        self._second = second


@dataclass(slots=True)
class TimeSplit:
    """Where one request's time went, in seconds."""

    queue_s: float
    prefill_s: float
    transfer_s: float
    decode_s: float
    total_s: float


class Metrics:
    """What the router has counted since it started."""

    def __init__(self, retries: RetryBudget | None = None, started_s: float | None = None) -> None:
        self.registry = CollectorRegistry()
        self.started_s = time.time() if started_s is None else started_s
        self.borders = Borders()
        self.retries = retries or RetryBudget(max_retries=3, share=0.2, burst=1024)
        self.generation_tokens = 0
        self.ignored_reports = 0
        self.rate = TokenRate()
        self.last: TimeSplit | None = None
        self._outcomes = Counter(
            "baton_requests", "HTTP requests by outcome", ["outcome"], registry=self.registry
        )
        self._prompt_tokens = Counter("baton_prompt_tokens", "Prompt tokens", registry=self.registry)
        started = Gauge("baton_start_time_seconds", "When the router started", registry=self.registry)
        started.set(self.started_s)

        self.ttft = self._seconds("time_to_first_token", "From the request to its first token", _LONG_S)
        self.inter_token = self._seconds("inter_token_latency", "Between two tokens of a choice", _SHORT_S)
        self.end_to_end = self._seconds("e2e_request_latency", "From the request to its last token", _LONG_S)
        self.queue = self._seconds("request_queue_time", "Waiting for a prefill worker", _LONG_S)
        self.prefill = self._seconds("request_prefill_time", "Running the prompt", _LONG_S)
        self.transfer = self._seconds("request_transfer_time", "Moving the KV cache", _SHORT_S)
        self.exposed = self._seconds(
            "request_exposed_transfer_time", "From the first token to the whole KV cache", _EXPOSED_S
        )
        self.decode = self._seconds("request_decode_time", "Decoding", _LONG_S)

    def _seconds(self, name: str, text: str, bounds_s: Sequence[float]) -> Histogram:
        histogram = Histogram(f"baton_{name}_seconds", text, bounds_s)
        self.registry.register(histogram)
        return histogram

    @property
    def outcomes(self) -> dict[str, int]:
        """HTTP requests to endpoints that generate, by how they ended."""
        samples = [sample for family in self._outcomes.collect() for sample in family.samples]
        return {sample.labels["outcome"]: int(sample.value) for sample in samples}

    def count_outcome(self, outcome: str) -> None:
        """One HTTP request to an endpoint that generates has ended."""
        self._outcomes.labels(outcome).inc()

    def observe_request(self, routed: RoutedRequest) -> None:
        """One prompt has ended; only finished ones enter the time histograms. Generated tokens are counted as
        choices take them."""
        self._prompt_tokens.inc(len(routed.work.prompt))
        self.ignored_reports += routed.ignored
        times = routed.times
        if times.first_token_s is not None:
            self.ttft.observe(times.first_token_s - times.submitted_s)
            self.queue.observe(times.queue_s)
            self.prefill.observe(times.prefill_s)
        if times.transfer_s is not None:
            self.transfer.observe(times.transfer_s)
            self.exposed.observe(times.tail_s or 0.0)
        if routed.phase is not AttemptPhase.FINISHED or times.ended_s is None:
            return
        total_s = times.ended_s - times.submitted_s
        # Decoding begins where streaming can go on: after the wait for the rest of the transfer.
        begun_s = times.decode_started_s
        decode_s = times.ended_s - begun_s if begun_s is not None else 0.0
        self.end_to_end.observe(total_s)
        self.decode.observe(decode_s)
        self.last = TimeSplit(times.queue_s, times.prefill_s, times.tail_s or 0.0, decode_s, total_s)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the other parts know at the moment of a scrape."""

    queued: int
    running: int
    worker_states: list[tuple[str, str, bool]]
    """Endpoint, state of the connection, and whether the worker can take work."""
    statuses: list[tuple[str, Status]]
    output_tokens_per_s: float


def _worker_families(statuses: Iterable[tuple[str, Status]]) -> Iterable[Metric]:
    """The families of the table of status fields, with a sample or more for each worker and field."""
    found = {
        family: _FAMILY_TYPES[family.kind](
            family.name, family.help, labels=["worker", "role", *family.labels]
        )
        for family in METRIC_FAMILIES
    }
    for name, status in statuses:
        for family, (labels, value) in status_samples(status):
            found[family].add_metric([name, status.role, *labels], value)
    return found.values()


def _labelled(name: str, text: str, label: str, counts: Mapping[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in sorted(counts.items()):
        family.add_metric([value], count)
    return family


class _Scrape(Collector):
    """All families at one moment: the registry's, and those of what others count."""

    def __init__(self, metrics: Metrics, snapshot: Snapshot) -> None:
        self._metrics, self._snapshot = metrics, snapshot

    def collect(self) -> Iterable[Metric]:
        metrics, snapshot = self._metrics, self._snapshot
        yield from metrics.registry.collect()
        for name, text, count in (
            ("generation_tokens", "Generated tokens", metrics.generation_tokens),
            ("ignored_reports", "Late or unexpected reports of workers", metrics.ignored_reports),
        ):
            yield CounterMetricFamily(f"baton_{name}", text, value=count)
        for name, text, label, counts in (
            ("internal_errors", "Failures that ended one request, or less", "where", metrics.borders.counts),
            ("migrations", "Prompts or choices run again, by reason", "reason", metrics.retries.counts),
            ("retries_denied", "Retries that a budget refused", "budget", metrics.retries.denied),
        ):
            yield _labelled(f"baton_{name}", text, label, counts)
        for name, text, value in (
            ("requests_queued", "Prompts without a first token", snapshot.queued),
            ("requests_running", "Prompts being decoded", snapshot.running),
            ("output_tokens_per_second", "Streamed tokens a second", snapshot.output_tokens_per_s),
        ):
            yield GaugeMetricFamily(f"baton_{name}", text, value=value)
        ready = GaugeMetricFamily("baton_worker_ready", "1: can take work", labels=["endpoint", "connection"])
        for endpoint, state, usable in snapshot.worker_states:
            ready.add_metric([endpoint, state], float(usable))
        yield ready
        yield from _worker_families(snapshot.statuses)


def exposition(metrics: Metrics, snapshot: Snapshot) -> bytes:
    """The body of `/metrics`, in Prometheus' text format."""
    return generate_latest(_Scrape(metrics, snapshot))
