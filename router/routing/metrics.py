"""The router's own measurements, and all of `/metrics`.

Histograms are plain lists and a bisection: 50,000 tokens a second leave no room for a lock and a label
lookup at each. prometheus-client only writes the text.
"""

import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from router.isolation import Borders
from router.routing.attempt import AttemptPhase
from router.routing.routed_request import RetryBudget, RoutedRequest
from services.protocol.messages import Status

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


class Histogram:
    """Seconds in buckets; `counts[i]` are those at most `bounds[i]`, the last entry all above."""

    __slots__ = ("bounds", "counts", "sum_s")

    def __init__(self, bounds_s: Sequence[float]) -> None:
        self.bounds = list(bounds_s)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum_s = 0.0

    def observe(self, value_s: float) -> None:
        self.counts[bisect_left(self.bounds, value_s)] += 1
        self.sum_s += value_s

    def family(self, name: str, text: str) -> HistogramMetricFamily:
        total = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        return HistogramMetricFamily(name, text, buckets=buckets, sum_value=self.sum_s)


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


@dataclass(slots=True)
class Metrics:
    started_s: float = field(default_factory=time.time)
    outcomes: dict[str, int] = field(default_factory=dict)
    borders: Borders = field(default_factory=Borders)
    prompt_tokens: int = 0
    generation_tokens: int = 0
    ignored_reports: int = 0
    ttft: Histogram = field(default_factory=lambda: Histogram(_LONG_S))
    inter_token: Histogram = field(default_factory=lambda: Histogram(_SHORT_S))
    end_to_end: Histogram = field(default_factory=lambda: Histogram(_LONG_S))
    queue: Histogram = field(default_factory=lambda: Histogram(_LONG_S))
    prefill: Histogram = field(default_factory=lambda: Histogram(_LONG_S))
    transfer: Histogram = field(default_factory=lambda: Histogram(_SHORT_S))
    exposed: Histogram = field(default_factory=lambda: Histogram(_EXPOSED_S))
    decode: Histogram = field(default_factory=lambda: Histogram(_LONG_S))
    rate: TokenRate = field(default_factory=TokenRate)
    retries: RetryBudget = field(default_factory=lambda: RetryBudget(max_retries=3, share=0.2, burst=1024))
    last: TimeSplit | None = None

    def count_outcome(self, outcome: str) -> None:
        """One HTTP request to an endpoint that generates has ended."""
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    def observe_request(self, routed: RoutedRequest) -> None:
        """One prompt has ended; only finished ones enter the time histograms. Generated tokens are counted as
        choices take them."""
        self.prompt_tokens += len(routed.work.prompt)
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


def _worker_families(statuses: Iterable[tuple[str, Status]]) -> Iterable[Metric]:
    gauges: dict[str, GaugeMetricFamily] = {}
    counters: dict[str, CounterMetricFamily] = {}
    for name, text, labels in (
        ("baton_worker_pages", "KV pages by state", ["state"]),
        ("baton_worker_slots", "Staging slots by state", ["state"]),
        ("baton_worker_requests", "Requests by state", ["state"]),
        ("baton_worker_open_transfers", "Transfers in progress", ["side"]),
        ("baton_worker_tokens_per_second", "Tokens a second", ["kind"]),
        ("baton_worker_memory_bytes", "Memory ledger", ["process", "entry", "inside", "kind"]),
        ("baton_worker_kv_utilisation", "Share of the KV pages in use", []),
    ):
        gauges[name] = GaugeMetricFamily(name, text, labels=["worker", "role", *labels])
    total = CounterMetricFamily(
        "baton_worker_events", "A worker's counters", labels=["worker", "role", "event"]
    )
    nonfinite = CounterMetricFamily(
        "baton_nonfinite_logits", "Requests ended by NaN or infinite logits", labels=["worker", "role"]
    )
    counters |= {"baton_worker_events": total, "baton_nonfinite_logits": nonfinite}
    for name, status in statuses:
        who = [name, status.role]

        def add(metric: str, labels: list[str], value: float, who: list[str] = who) -> None:
            gauges[metric].add_metric([*who, *labels], value)

        for state in ("free", "cached", "used"):
            add("baton_worker_pages", [state], getattr(status.pages, state))
        add("baton_worker_kv_utilisation", [], status.pages.used / max(1, status.pages.total))
        if status.slots is not None:
            for state in ("free", "granted", "filled", "quarantined"):
                add("baton_worker_slots", [state], getattr(status.slots, state))
        for state in ("queued", "running", "reserved", "holding"):
            add("baton_worker_requests", [state], getattr(status, state))
        add("baton_worker_open_transfers", ["send"], status.open_sends)
        add("baton_worker_open_transfers", ["receive"], status.open_receives)
        add("baton_worker_tokens_per_second", ["prompt"], status.prompt_tokens_per_s)
        add("baton_worker_tokens_per_second", ["output"], status.output_tokens_per_s)
        ledgers = enumerate([status.ledger, *status.rank_ledgers])
        for process, entry in (
            (entry.process if rank == 0 else f"{entry.process}-{rank}", entry)
            for rank, ledger in ledgers
            for entry in ledger.entries
        ):
            labels = [process, entry.name, str(entry.inside).lower()]
            add("baton_worker_memory_bytes", [*labels, "planned"], entry.planned_bytes)
            if entry.measured_bytes is not None:
                add("baton_worker_memory_bytes", [*labels, "measured"], entry.measured_bytes)
        nonfinite.add_metric(who, status.counters.get("requests_failed_invalid_logits", 0))
        for event, value in status.counters.items():
            total.add_metric([*who, event], value)
    return [*gauges.values(), *counters.values()]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the other parts know at the moment of a scrape."""

    queued: int
    running: int
    worker_states: list[tuple[str, str, bool]]
    """Endpoint, state of the connection, and whether the worker can take work."""
    statuses: list[tuple[str, Status]]
    output_tokens_per_s: float


class _Families(Collector):
    def __init__(self, metrics: Metrics, snapshot: Snapshot) -> None:
        self._metrics, self._snapshot = metrics, snapshot

    def collect(self) -> Iterable[Metric]:
        metrics, snapshot = self._metrics, self._snapshot
        outcomes = CounterMetricFamily("baton_requests", "HTTP requests by outcome", labels=["outcome"])
        for outcome, count in sorted(metrics.outcomes.items()):
            outcomes.add_metric([outcome], count)
        yield outcomes
        errors = CounterMetricFamily(
            "baton_internal_errors", "Failures that ended one request, or less", labels=["where"]
        )
        for where, count in metrics.borders.counts.items():
            errors.add_metric([where], count)
        yield errors
        yield CounterMetricFamily("baton_prompt_tokens", "Prompt tokens", value=metrics.prompt_tokens)
        yield CounterMetricFamily(
            "baton_generation_tokens", "Generated tokens", value=metrics.generation_tokens
        )
        yield CounterMetricFamily(
            "baton_ignored_reports", "Late or unexpected reports of workers", value=metrics.ignored_reports
        )
        retries = metrics.retries
        for name, text, label, counts in (
            ("baton_migrations", "Prompts or choices run again, by reason", "reason", retries.counts),
            ("baton_retries_denied", "Retries that a budget refused", "budget", retries.denied),
        ):
            family = CounterMetricFamily(name, text, labels=[label])
            for value, count in sorted(counts.items()):
                family.add_metric([value], count)
            yield family
        yield GaugeMetricFamily(
            "baton_requests_queued", "Prompts without a first token", value=snapshot.queued
        )
        yield GaugeMetricFamily("baton_requests_running", "Prompts being decoded", value=snapshot.running)
        yield GaugeMetricFamily(
            "baton_output_tokens_per_second", "Streamed tokens a second", value=snapshot.output_tokens_per_s
        )
        yield GaugeMetricFamily(
            "baton_start_time_seconds", "When the router started", value=metrics.started_s
        )
        for name, text, histogram in (
            ("time_to_first_token", "From the request to its first token", metrics.ttft),
            ("inter_token_latency", "Between two tokens of a choice", metrics.inter_token),
            ("e2e_request_latency", "From the request to its last token", metrics.end_to_end),
            ("request_queue_time", "Waiting for a prefill worker", metrics.queue),
            ("request_prefill_time", "Running the prompt", metrics.prefill),
            ("request_transfer_time", "Moving the KV cache", metrics.transfer),
            ("request_exposed_transfer_time", "From the first token to the whole KV cache", metrics.exposed),
            ("request_decode_time", "Decoding", metrics.decode),
        ):
            yield histogram.family(f"baton_{name}_seconds", text)
        up = GaugeMetricFamily("baton_worker_ready", "1: can take work", labels=["endpoint", "connection"])
        for endpoint, state, ready in snapshot.worker_states:
            up.add_metric([endpoint, state], float(ready))
        yield up
        yield from _worker_families(snapshot.statuses)


def exposition(metrics: Metrics, snapshot: Snapshot) -> bytes:
    """The body of `/metrics`, in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(metrics, snapshot))
    return generate_latest(registry)
