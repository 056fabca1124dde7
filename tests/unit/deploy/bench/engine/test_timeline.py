"""Busy time and tables from a trace's events, against counting every microsecond."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.bench.engine.timeline import (
    DEVICE_CATEGORIES,
    NAME_CHARACTERS,
    TraceEvent,
    complete_events,
    longest_gaps,
    summary,
    table,
    union_us,
)

intervals = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)).map(lambda one: (one[0], sum(one))))


def kernel(name: str, start_us: float, length_us: float) -> TraceEvent:
    return TraceEvent("kernel", name, start_us, length_us)


@given(intervals)
def test_a_union_counts_every_microsecond_once(parts: list[tuple[int, int]]) -> None:
    covered = {at for start, end in parts for at in range(start, end)}
    assert union_us(parts) == len(covered)


@given(intervals, st.integers(0, 40), st.integers(1, 40))
def test_busy_time_is_what_lies_inside(parts: list[tuple[int, int]], start: int, length: int) -> None:
    events = [kernel("k", first, last - first) for first, last in parts]
    covered = {at for first, last in parts for at in range(first, last) if start <= at < start + length}
    found = summary(events, start, start + length, DEVICE_CATEGORIES)
    assert found.busy_us == len(covered)
    assert found.busy_share == pytest.approx(len(covered) / length)


def test_kinds_come_by_time_with_their_count() -> None:
    events = [
        kernel("norm", 0, 10),
        kernel("gemm", 10, 30),
        kernel("norm", 40, 10),
        kernel("side by side", 40, 10),
        TraceEvent("cpu_op", "aten::mm", 0, 500),
        TraceEvent("gpu_memcpy", "Memcpy", 90, 20),
    ]
    found = summary(events, 0, 100, DEVICE_CATEGORIES)
    assert [(kind.name, kind.count, kind.total_us) for kind in found.kinds] == [
        ("gemm", 1, 30), ("norm", 2, 20), ("side by side", 1, 10), ("Memcpy", 1, 10)
    ]  # fmt: skip
    assert (found.busy_us, found.events) == (60, 5)
    assert [kind.share for kind in found.kinds] == pytest.approx([0.5, 1 / 3, 1 / 6, 1 / 6])
    first, second, *_ = table(found, 1).splitlines()[1:]
    assert first.split() == ["0.030", "1", "30.00", "50.0%", "gemm"]
    assert "40.0 µs idle after" in second


def test_gaps_are_where_nothing_runs() -> None:
    events = [kernel("long", 0, 50), kernel("within", 10, 5), kernel("next", 53, 1), kernel("last", 60, 1)]
    assert [(gap.length_us, gap.after, gap.before) for gap in longest_gaps(events, 5)] == [
        (6, "next", "last"), (3, "long", "next")
    ]  # fmt: skip
    assert [gap.length_us for gap in longest_gaps(events, 1)] == [6]


def test_nothing_is_no_share() -> None:
    found = summary([], 0, 0, DEVICE_CATEGORIES)
    assert (found.busy_share, found.kinds, found.gaps) == (0.0, [], [])


def test_only_events_with_a_length_count() -> None:
    trace = {
        "traceEvents": [
            {"ph": "X", "cat": "kernel", "name": "a" * 500, "ts": 1.5, "dur": 2},
            {"ph": "M", "name": "process_name", "ts": 0},
            {"ph": "i", "cat": "kernel", "name": "b", "ts": 3},
            {"ph": "X", "name": "no category", "ts": 4, "dur": 1},
        ]
    }
    events = complete_events(trace)
    assert [(one.category, one.start_us, one.end_us) for one in events] == [
        ("kernel", 1.5, 3.5), ("", 4.0, 5.0)
    ]  # fmt: skip
    (kind,) = summary(events, 0, 10, DEVICE_CATEGORIES).kinds
    assert kind.name == "a" * NAME_CHARACTERS
