"""What a device did in a stretch of time, from the events of a Chrome trace. Pure.

The busy share is the union of the device's intervals over the stretch: kernels that run side by side count
once.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from msgspec import Struct

DEVICE_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
HOST_CATEGORIES = ("cpu_op",)
NAME_CHARACTERS = 100
GAPS = 3


class TraceEvent(Struct, frozen=True):
    """Microseconds since the trace's own zero."""

    category: str
    name: str
    start_us: float
    length_us: float

    @property
    def end_us(self) -> float:
        return self.start_us + self.length_us


class ActivityKind(Struct, frozen=True):
    """All events of one name: `share` of all of the busy time, which may exceed 1 where events nest."""

    name: str
    count: int
    total_us: float
    share: float


class Gap(Struct, frozen=True):
    """Nothing ran between the end of `after` and the start of `before`."""

    length_us: float
    after: str
    before: str


class Summary(Struct, frozen=True):
    """Kinds come by their total time and gaps by their length, longest first; of gaps only the longest."""

    span_us: float
    busy_us: float
    events: int
    kinds: list[ActivityKind]
    gaps: list[Gap]

    @property
    def busy_share(self) -> float:
        return self.busy_us / self.span_us if self.span_us > 0 else 0.0


def complete_events(trace: dict[str, Any]) -> list[TraceEvent]:
    """The events of a Chrome trace that have a start and a length."""
    return [
        TraceEvent(str(one.get("cat", "")), str(one.get("name", "")), float(one["ts"]), float(one["dur"]))
        for one in trace.get("traceEvents", [])
        if one.get("ph") == "X" and "ts" in one and "dur" in one
    ]


def union_us(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of what `(start, end)` intervals cover together."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        if end > reached:
            covered += end - max(start, reached)
            reached = end
    return covered


def longest_gaps(events: Sequence[TraceEvent], count: int) -> list[Gap]:
    """The longest times in which no event runs, between the first and the last of them."""
    found: list[Gap] = []
    last: TraceEvent | None = None
    for event in sorted(events, key=lambda one: one.start_us):
        if last is not None and event.start_us > last.end_us:
            found.append(Gap(event.start_us - last.end_us, last.name, event.name))
        if last is None or event.end_us > last.end_us:
            last = event
    return sorted(found, key=lambda gap: -gap.length_us)[:count]


def summary(
    events: Sequence[TraceEvent], start_us: float, end_us: float, categories: Sequence[str]
) -> Summary:
    """What events of these categories did between two times; what lies across a border counts with its part
    inside."""
    inside = [
        clipped(event, start_us, end_us)
        for event in events
        if event.category in categories and event.start_us < end_us and event.end_us > start_us
    ]
    busy_us = union_us((event.start_us, event.end_us) for event in inside)
    lengths_us: dict[str, list[float]] = {}
    for event in inside:
        lengths_us.setdefault(event.name, []).append(event.length_us)
    kinds = [
        ActivityKind(name, len(each_us), sum(each_us), sum(each_us) / busy_us if busy_us > 0 else 0.0)
        for name, each_us in sorted(lengths_us.items(), key=lambda one: -sum(one[1]))
    ]
    return Summary(end_us - start_us, busy_us, len(inside), kinds, longest_gaps(inside, GAPS))


def clipped(event: TraceEvent, start_us: float, end_us: float) -> TraceEvent:
    """The part of an event between two times, its name cut to what a table can show."""
    first, last = max(event.start_us, start_us), min(event.end_us, end_us)
    return TraceEvent(event.category, event.name[:NAME_CHARACTERS], first, last - first)


def table(found: Summary, rows: int) -> str:
    """The `rows` kinds with the most time, then the longest gaps."""
    lines = [f"{'total ms':>10} {'count':>7} {'each µs':>9} {'share':>7}  name"]
    for kind in found.kinds[:rows]:
        each_us = kind.total_us / kind.count
        figures = f"{kind.total_us / 1e3:>10.3f} {kind.count:>7} {each_us:>9.2f} {kind.share:>7.1%}"
        lines.append(f"{figures}  {kind.name}")
    lines += [f"{gap.length_us:>10.1f} µs idle after {gap.after} before {gap.before}" for gap in found.gaps]
    return "\n".join(lines)
