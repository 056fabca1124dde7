"""A profiler's trace of a few decode steps and of one prefill: how busy the device was, and with what.

The profiler slows the host down a little, so its shares are of the profiled run, not of the timed one.
"""

import gzip
import json
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from msgspec import Struct

from deploy.bench.engine.loop import EngineLoop
from deploy.bench.engine.timeline import (
    DEVICE_CATEGORIES,
    HOST_CATEGORIES,
    NAME_CHARACTERS,
    Summary,
    TraceEvent,
    complete_events,
    summary,
)
from deploy.bench.engine.workload import Decode, PrefillRow
from deploy.bench.errors import BenchError

WINDOW = "measured"
KEPT_CATEGORIES = (*DEVICE_CATEGORIES, "cuda_runtime", "cuda_driver", "user_annotation", *HOST_CATEGORIES)
MAX_FILE_BYTES = 1_000_000
STEPS_AROUND = 3
Stretch = Callable[[], AbstractContextManager[object]]


class Traced(Struct, frozen=True):
    """`steps` decode steps, or one prefill. Without device events, as on a CPU, the host's stand for them."""

    name: str
    file: str
    steps: int
    device_events: bool
    busy_share: float
    summary: Summary


def trace_decode(loop: EngineLoop, row: Decode, steps: int, file: Path) -> Traced:
    """`steps` steps in the middle of more of them, so that both ends are in the steady state."""
    try:
        loop.start_decoding(row, 3 * STEPS_AROUND, steps)
        loop.until_total(loop.total_tokens + STEPS_AROUND * row.batch)

        def run(stretch: Stretch) -> None:
            loop.until_total(loop.total_tokens + STEPS_AROUND * row.batch)
            with stretch():
                loop.until_total(loop.total_tokens + steps * row.batch)
            loop.until_total(loop.total_tokens + STEPS_AROUND * row.batch)

        return _traced(loop, f"{steps} steps: {row.name}", steps, run, file)
    finally:
        loop.clear()


def trace_prefill(loop: EngineLoop, row: PrefillRow, file: Path) -> Traced:
    def run(stretch: Stretch) -> None:
        loop.prefill_s(row, stretch())

    loop.prefill_s(row)
    return _traced(loop, row.name, 1, run, file)


def _traced(loop: EngineLoop, name: str, steps: int, run: Callable[[Stretch], None], file: Path) -> Traced:
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    on_gpu = loop.context.engine.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        run(lambda: record_function(WINDOW))
        if on_gpu:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as directory:
        whole = Path(directory) / "trace.json"
        recorded.export_chrome_trace(str(whole))
        trace: dict[str, Any] = json.loads(whole.read_bytes())
    events = complete_events(trace)
    window = window_of(events)
    found = summary(events, window.start_us, window.end_us, DEVICE_CATEGORIES if on_gpu else HOST_CATEGORIES)
    if not found.events:
        raise BenchError("the profiler saw nothing on the device")
    write_small(trace, window, file)
    return Traced(name, str(file), steps, on_gpu, found.busy_share, found)


def window_of(events: list[TraceEvent]) -> TraceEvent:
    """The event of the measured stretch. On a GPU it is there twice: the host's is the one that counts."""
    for event in events:
        if event.name == WINDOW and event.category == "user_annotation":
            return event
    raise BenchError("the profiler's trace has no event of the measured stretch")


def write_small(trace: dict[str, Any], window: TraceEvent, file: Path) -> None:
    """Writes the trace of the measured stretch, compressed, for a viewer. Host events are left out where the
    file would exceed `MAX_FILE_BYTES`, and then the latest ones."""
    kept = [one for one in trace["traceEvents"] if one.get("ph") == "M"]
    timed = [_slim(one) for one in trace["traceEvents"] if _is_kept(one, window)]
    data = _compressed(kept + timed)
    if len(data) > MAX_FILE_BYTES:
        timed = [one for one in timed if one["cat"] in (*DEVICE_CATEGORIES, "user_annotation")]
        data = _compressed(kept + timed)
    while len(data) > MAX_FILE_BYTES and timed:
        timed = sorted(timed, key=lambda one: float(one["ts"]))[: len(timed) * 3 // 4]
        data = _compressed(kept + timed)
    file.write_bytes(data)


def _is_kept(one: dict[str, Any], window: TraceEvent) -> bool:
    if one.get("ph") != "X" or one.get("cat") not in KEPT_CATEGORIES:
        return False
    start_us = float(one["ts"])
    return start_us < window.end_us and start_us + float(one.get("dur", 0)) > window.start_us


def _slim(one: dict[str, Any]) -> dict[str, Any]:
    slim = {key: one[key] for key in ("ph", "cat", "ts", "dur", "pid", "tid")}
    slim["name"] = str(one["name"])[:NAME_CHARACTERS]
    return slim


def _compressed(events: list[dict[str, Any]]) -> bytes:
    return gzip.compress(json.dumps({"traceEvents": events}, separators=(",", ":")).encode())
