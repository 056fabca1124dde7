"""The trace that is kept: the marked stretch only, and never a large file."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from deploy.bench.engine.timeline import TraceEvent, complete_events
from deploy.bench.engine.trace import MAX_FILE_BYTES, WINDOW, window_of, write_small
from deploy.bench.errors import BenchError

MARK = {"ph": "X", "cat": "user_annotation", "name": WINDOW, "ts": 100, "dur": 100, "pid": 1, "tid": 1}


def timed(category: str, name: str, start_us: float) -> dict[str, Any]:
    where = {"pid": 0, "tid": 7, "args": {"grid": [1, 2, 3]}}
    return {"ph": "X", "cat": category, "name": name, "ts": start_us, "dur": 10, **where}


def written(events: list[dict[str, Any]], file: Path) -> list[dict[str, Any]]:
    trace = {"traceEvents": events}
    write_small(trace, window_of(complete_events(trace)), file)
    assert file.stat().st_size <= MAX_FILE_BYTES
    kept: list[dict[str, Any]] = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return kept


def test_only_the_marked_stretch_is_kept(tmp_path: Path) -> None:
    names = {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}}
    events = [names, timed("kernel", "before", 89), timed("kernel", "across", 95), timed("cpu_op", "mm", 150)]
    events += [timed("python_function", "f", 150), timed("kernel", "after", 200), MARK]
    kept = written(events, tmp_path / "t.json.gz")
    assert [event["name"] for event in kept] == ["process_name", "across", "mm", WINDOW]
    assert "args" not in kept[1]


def noise(category: str, count: int) -> list[dict[str, Any]]:
    """Names that do not compress."""
    numbers = random.Random(count)
    return [timed(category, f"{numbers.getrandbits(320):x}", 100 + at / count) for at in range(count)]


def test_a_large_trace_loses_the_hosts_events_first(tmp_path: Path) -> None:
    kept = written([*noise("cpu_op", 40_000), *noise("kernel", 5_000), MARK], tmp_path / "t.json.gz")
    assert {event["cat"] for event in kept} == {"kernel", "user_annotation"}
    assert len(kept) == 5_001


def test_then_the_latest_ones(tmp_path: Path) -> None:
    events = noise("kernel", 40_000)
    kept = written([*events, MARK], tmp_path / "t.json.gz")
    assert 5_000 < len(kept) < 40_000
    assert max(event["ts"] for event in kept) < max(event["ts"] for event in events)


def test_a_trace_without_the_stretch_is_refused() -> None:
    with pytest.raises(BenchError, match="no event of the measured stretch"):
        window_of([TraceEvent("gpu_user_annotation", WINDOW, 0, 1)])
