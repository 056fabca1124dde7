"""`baton bench engine`: what a worker does on this machine, beside what the machine would allow.

1. The device's own ceilings, in a process of their own.
2. A worker process from its start until it is ready.
3. The same worker in this process; every row of the workload through its role.
4. With a trace asked for: a profiled stretch of decode steps and of one prefill.
5. The memory ledger, planned and as all of this left it.

Every row is printed as soon as it is known; one that fails is reported as failed and the others go on.
"""

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from msgspec import json

from deploy.bench.engine import ceilings, ready
from deploy.bench.engine.limits import FORMULA, ModelCost, model_cost
from deploy.bench.engine.loop import EngineLoop
from deploy.bench.engine.memory import DeviceMarks, memory_report
from deploy.bench.engine.report import (
    EngineMachine,
    EngineReport,
    ModelFigures,
    ReportRow,
    head_line,
    memory_lines,
    rate_row,
    row_line,
    time_row,
)
from deploy.bench.engine.timeline import table
from deploy.bench.engine.trace import Traced, trace_decode, trace_prefill
from deploy.bench.engine.workload import Decode, Offline, PrefillRow, Workload
from deploy.bench.errors import LeftOut
from deploy.bench.machine import cpu_name, versions
from services.config import WorkerConfig
from services.memory.measure import gpu_facts
from services.memory.render import table as ledger_table
from services.startup import PreparedWorker, measure_now, prepare
from services.worker import keep_for_good

TRACE_TABLE_ROWS = 12
READY_ROW, READY_AGAIN_ROW = "start to ready", "start to ready, kernels compiled"
PREPARE_ROW = "load, measure, pool, graphs"


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """What the command line asked for. `only` names the groups that run."""

    config: WorkerConfig
    worker_flags: tuple[str, ...]
    model_name: str
    workload: Workload
    directory: Path
    """Private and empty: for sockets and a log."""
    only: frozenset[str]
    quick: bool
    settings: dict[str, str | int | float]
    device_name: str
    device_bytes: int
    out: Path | None
    trace: Path | None


def run(request: BenchRequest) -> int:
    """Runs the benchmark. The exit code is 1 when anything failed, whatever else was measured."""
    bench = _Bench(request)
    bench.measure()
    return bench.finish()


class _Bench:
    def __init__(self, request: BenchRequest) -> None:
        self.request = request
        machine = EngineMachine(
            request.device_name, request.device_bytes, cpu_name(), len(os.sched_getaffinity(0))
        )
        self.result = EngineReport(machine, versions(), request.settings)
        self.marks: DeviceMarks | None = None
        if request.config.device == "cuda":
            self.marks = DeviceMarks(gpu_facts(request.config.device_index).used_bytes)

    def measure(self) -> None:
        only = self.request.only
        self._say(f"{self.request.model_name} on {self.request.device_name}, {self.request.config.dtype}")
        self._try("ceilings", self._ceilings)
        self._say(f"\n{FORMULA}\n\n{head_line()}")
        if "ready" in only:
            self._try_row(READY_ROW, partial(self._ready, READY_ROW))
            if self.request.config.device == "cuda" and not self.request.quick:
                self._try_row(READY_AGAIN_ROW, partial(self._ready, READY_AGAIN_ROW))
        if only - {"ready"}:
            self._try("worker", self._worker)

    def finish(self) -> int:
        result = self.result
        if self.request.out is not None:
            self.request.out.write_bytes(json.format(json.encode(result), indent=1))
        for failure in result.failures:
            self._say(f"failed: {failure}")
        return 1 if result.failures else 0

    # ------------------------------------------------------------ before the worker

    def _ceilings(self) -> None:
        found = ceilings.measure(self.request.config.device)
        self.result.ceilings = found
        self._say(
            f"read {found.read_bytes_per_s / 1e12:.3f} TB/s, copy {found.copy_bytes_per_s / 1e12:.3f} TB/s "
            f"({found.buffer_bytes >> 20} MiB), {found.matmul_dtype} matmul of {found.matmul_size}^3 "
            f"{found.matmul_flop_per_s / 1e12:.4g} TFLOP/s"
            + (f", in fp8 {found.fp8_flop_per_s / 1e12:.4g}" if found.fp8_flop_per_s else "")
        )

    def _ready(self, name: str) -> ReportRow:
        measured_s = ready.seconds_to_ready(self.request.worker_flags, self.request.directory)
        note = "from the start of `baton worker --load-format dummy` to its answer to a router"
        return ReportRow(name, "s", measured_s, note=note)

    # ------------------------------------------------------------ the worker in this process

    def _worker(self) -> None:
        started_s = time.perf_counter()
        prepared = prepare(self.request.config, 1, lambda done, total: None)
        prepare_s = time.perf_counter() - started_s
        inputs, model = prepared.plan.inputs, prepared.model
        kv_token_bytes = inputs.page_bytes / inputs.page_size_tokens
        self.result.model = ModelFigures(
            self.request.model_name,
            model.architecture,
            model.layers,
            inputs.weights_bytes,
            kv_token_bytes,
            self.request.config.dtype,
        )
        config = self.request.config
        fp8_layers = config.quantization == "fp8"
        cost = model_cost(model, config.dtype, inputs.weights_bytes, kv_token_bytes, fp8_layers)
        self._add(ReportRow(PREPARE_ROW, "s", prepare_s, note="the same in this process, after its imports"))
        loop = EngineLoop(prepared)
        keep_for_good()
        try:
            if self.marks is not None:
                self.marks.start(prepared)
            self._rows(loop, cost)
            if self.marks is not None:
                self.marks.stop(prepared)
            if self.request.trace is not None and "trace" in self.request.only:
                self._traces(loop, self.request.trace)
            self._try("memory", lambda: self._memory(prepared))
        finally:
            loop.close()

    def _rows(self, loop: EngineLoop, cost: ModelCost) -> None:
        only, load = self.request.only, self.request.workload
        if "decode" in only:
            for decode in load.decodes:
                self._try_row(decode.name, partial(self._decode, loop, cost, decode))
        if "prefill" in only:
            for prefill in load.prefills:
                self._try_row(prefill.name, partial(self._prefill, loop, cost, prefill))
        if "offline" in only:
            self._try_row(load.offline.name, partial(self._offline, loop, cost, load.offline))

    def _decode(self, loop: EngineLoop, cost: ModelCost, row: Decode) -> ReportRow:
        load = self.request.workload
        times = loop.decode_times(row, load.warm_steps, load.steps)
        phases = cost.decode(row.batch, times.mean_context)
        ordered = sorted(times.steps_s)
        details = {
            "steps": float(len(ordered)),
            "mean_context": times.mean_context,
            "p50_ms": ordered[len(ordered) // 2] * 1e3,
            "p99_ms": ordered[len(ordered) * 99 // 100] * 1e3,
        }
        return time_row(row.name, times.mean_s, phases, self.result.ceilings, details)

    def _prefill(self, loop: EngineLoop, cost: ModelCost, row: PrefillRow) -> ReportRow:
        several = row.requests > 1
        loop.prefill_s(PrefillRow(1, row.tokens) if several else row)
        repeats = 1 if several else self.request.workload.repeats
        times_s = sorted(loop.prefill_s(row) for _ in range(repeats))
        measured_s, phases = times_s[len(times_s) // 2], cost.prefill(row)
        if several:
            tokens = row.requests * row.tokens
            return rate_row(row.name, tokens, measured_s, phases, self.result.ceilings)
        return time_row(row.name, measured_s, phases, self.result.ceilings, {"runs": float(repeats)})

    def _offline(self, loop: EngineLoop, cost: ModelCost, row: Offline) -> ReportRow:
        measured_s = loop.offline_s(row)
        phases = cost.offline(row, self.request.config.max_batch)
        tokens = row.requests * row.output_tokens
        return rate_row(row.name, tokens, measured_s, phases, self.result.ceilings)

    def _traces(self, loop: EngineLoop, prefix: Path) -> None:
        load = self.request.workload
        stem = prefix.name.removesuffix(".gz").removesuffix(".json")
        decode_file = prefix.with_name(f"{stem}-decode.json.gz")
        prefill_file = prefix.with_name(f"{stem}-prefill.json.gz")
        self._try(
            "trace of decode steps",
            lambda: self._traced(trace_decode(loop, load.traced_decode, load.traced_steps, decode_file)),
        )
        self._try(
            "trace of a prefill",
            lambda: self._traced(trace_prefill(loop, load.traced_prefill, prefill_file)),
        )

    def _traced(self, traced: Traced) -> None:
        self.result.traces.append(traced)
        found = traced.summary
        who = "device" if traced.device_events else "host (no device events: these are nested calls)"
        span_ms, busy_ms = found.span_us / 1e3, found.busy_us / 1e3
        self._say(
            f"\n{traced.name}, profiled: {who} busy {found.busy_share:.1%} of {span_ms:.2f} ms, "
            f"{busy_ms / traced.steps:.3f} ms each; {traced.file}\n{table(found, TRACE_TABLE_ROWS)}"
        )

    def _memory(self, prepared: PreparedWorker) -> None:
        self.result.memory = memory_report(prepared, self.marks)
        self._say("\n" + ledger_table(prepared.plan.ledger(measure_now(prepared)[0])))
        self._say("\n" + memory_lines(self.result.memory))

    # ------------------------------------------------------------ one thing at a time

    def _try_row(self, name: str, make: Callable[[], ReportRow]) -> None:
        gc.collect()
        try:
            row = make()
        except LeftOut as error:
            row = ReportRow(name, "ms", note=f"left out: {error}")
        except Exception as error:  # whatever a row meets, the others still count
            row = ReportRow(name, "ms", error=_one_line(error))
            self.result.failures.append(f"{name}: {row.error}")
        self._add(row)

    def _try(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # as above
            self.result.failures.append(f"{name}: {_one_line(error)}")
            self._say(f"{name}: failed: {_one_line(error)}")

    def _add(self, row: ReportRow) -> None:
        self.result.rows.append(row)
        self._say(row_line(row))

    @staticmethod
    def _say(text: str) -> None:
        print(text, flush=True)


def _one_line(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"
