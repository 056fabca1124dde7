"""What packs and unpacks beside decode steps cost them: `python -m deploy.bench.transfer.overlap`.

Steps of a full batch are launched one ahead, as a worker does; beside them slots of the staging buffer's size
are packed, or unpacked, at a given rate, some by each launch, from and into pages that no sequence of the
batch uses. A row says what a step took, what it took more than without them, what rate was met, and what the
host paid for a slot.
"""

import argparse
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from rich.console import Console
from rich.table import Table

from deploy.bench.engine.shapes import write_shape
from services.config import Device, WorkerConfig
from services.engine.batch import Row, SampleSpec
from services.engine.engine import Engine
from services.engine.events import NOW
from services.engine.kv.copies import Copy
from services.engine.kv.run_table import SlotRun
from services.engine.kv.segments import SlotBuffer
from services.engine.launched import Launched
from services.engine.models.model_config import read_model_config
from services.protocol.messages import Sampling

RATES_BYTES_PER_S = (0.0, 6e9, 25e9, 50e9, 100e9, 340e9)
"""None; what one H200 computes in prefill; a 200 and a 400 Gb/s NIC; two; NVLink."""
MOST_IN_FLIGHT = 4
"""Launches."""
WARM_STEPS = 5
SAMPLING = Sampling(max_tokens=1, seed=0, temperature=0.0)


class OverlapFigures(msgspec.Struct, frozen=True):
    """`host_s` is what the host paid to queue one slot."""

    kind: str
    wanted_bytes_per_s: float
    met_bytes_per_s: float
    step_s: float
    slower: float
    host_s: float


class OverlapReport(msgspec.Struct, frozen=True):
    device: str
    model: str
    batch: int
    context_tokens: int
    steps: int
    slot_bytes: int
    slots_a_launch: int
    rows: list[OverlapFigures]


class Stepping:
    """A batch that decodes for ever at one context: every step computes the same positions again."""

    def __init__(self, engine: Engine, batch: int, context_tokens: int) -> None:
        self._engine = engine
        pages = -(-context_tokens // engine.config.page_size_tokens)
        tables = [list(range(at * pages, (at + 1) * pages)) for at in range(batch)]
        at = context_tokens - 1
        draw = [SampleSpec(0, context_tokens, SAMPLING, [], [])]
        self._first = [Row([1], at, table, draw) for table in tables]
        self._next = [Row([-1], at, table, draw, sampled_by=one) for one, table in enumerate(tables)]
        self.pages_used = batch * pages

    def run(self, steps: int, beside: Callable[[], None]) -> float:
        """Seconds of a step. `beside` is called again and again while a step runs."""
        in_flight: Launched = self._engine.launch(self._first)
        started_s = 0.0
        for step in range(WARM_STEPS + steps):
            if step == WARM_STEPS:
                started_s = time.perf_counter()
            following = self._engine.launch(self._next)
            beside()
            while not in_flight.is_done:
                beside()
            in_flight.collect()
            in_flight = following
        took_s = time.perf_counter() - started_s
        in_flight.collect()
        return took_s / steps


class Copying:
    """Queues copies at a rate, at most `MOST_IN_FLIGHT`; what is late stays undone."""

    def __init__(self, queue: Callable[[int], Copy], rate_bytes_per_s: float) -> None:
        self._queue, self._rate = queue, rate_bytes_per_s
        self._in_flight: deque[Copy] = deque()
        self._started_s = time.perf_counter()
        self.copied_bytes, self.copies, self.slots, self.host_s = 0, 0, 0, 0.0

    def __call__(self) -> None:
        while self._in_flight and self._in_flight[0].is_done:
            self._in_flight.popleft()
        elapsed_s = time.perf_counter() - self._started_s
        if len(self._in_flight) < MOST_IN_FLIGHT and self.copied_bytes < self._rate * elapsed_s:
            before_s = time.perf_counter()
            copy = self._queue(self.copies % MOST_IN_FLIGHT)
            self.host_s += time.perf_counter() - before_s
            self._in_flight.append(copy)
            self.copied_bytes += sum(copy.byte_counts)
            self.slots += len(copy.byte_counts)
            self.copies += 1

    def rate_bytes_per_s(self) -> float:
        return self.copied_bytes / (time.perf_counter() - self._started_s)


def measure(engine: Engine, arguments: argparse.Namespace) -> list[OverlapFigures]:
    stepping = Stepping(engine, arguments.batch, arguments.context)
    slot_bytes: int = arguments.slot_bytes
    tokens = max(1, slot_bytes // engine.geometry.token_bytes)
    together: int = arguments.slots_a_launch
    spare = -(-together * tokens // engine.config.page_size_tokens)
    engine.allocate_pool(stepping.pages_used + MOST_IN_FLIGHT * spare)
    engine.capture_graphs()
    staging = torch.zeros(MOST_IN_FLIGHT * together * slot_bytes, dtype=torch.uint8, device=engine.device)
    buffer, heads, used = SlotBuffer(staging, slot_bytes), range(engine.layout.kv_heads), stepping.pages_used
    tables = [list(range(used + at * spare, used + (at + 1) * spare)) for at in range(MOST_IN_FLIGHT)]

    def runs(at: int) -> list[SlotRun]:
        """Of one sequence, one slot after the other."""
        first = at * together
        return [SlotRun(tables[at], one * tokens, tokens, first + one, heads) for one in range(together)]

    def pack(at: int) -> Copy:
        return engine.pack(runs(at), buffer, False, NOW)

    def unpack(at: int) -> Copy:
        return engine.unpack(runs(at), buffer, False, NOW)

    found: list[OverlapFigures] = []
    for kind, queue in (("pack", pack), ("unpack", unpack)):
        queue(0).wait()
        alone_s = 0.0
        for rate in RATES_BYTES_PER_S:
            copying = Copying(queue, rate)
            step_s = stepping.run(arguments.steps, copying)
            alone_s = alone_s or step_s
            host_s = copying.host_s / max(1, copying.slots)
            found.append(
                OverlapFigures(kind, rate, copying.rate_bytes_per_s(), step_s, step_s / alone_s - 1, host_s)
            )
            engine.synchronize()
    return found


def show(report: OverlapReport) -> None:
    title = (
        f"{report.device}, {report.model}: decode steps at batch {report.batch}, context "
        f"{report.context_tokens}, beside slots of {report.slot_bytes >> 10} KiB, "
        f"{report.slots_a_launch} a launch"
    )
    table = Table(title=title)
    for column in ("beside", "wanted GB/s", "met GB/s", "step ms", "slower", "host µs a slot"):
        table.add_column(column, justify="left" if column == "beside" else "right")
    for row in report.rows:
        table.add_row(
            row.kind if row.wanted_bytes_per_s else "nothing",
            f"{row.wanted_bytes_per_s / 1e9:.0f}",
            f"{row.met_bytes_per_s / 1e9:.1f}",
            f"{row.step_s * 1e3:.3f}",
            f"{row.slower:+.1%}",
            f"{row.host_s * 1e6:.0f}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.bench.transfer.overlap", description=__doc__)
    parser.add_argument("--model-config", default="qwen3-8b", help="a known shape, or a config.json")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--slot-bytes", type=int, default=8 << 20)
    parser.add_argument("--slots-a-launch", type=int, default=10, help="a chunk of 512 tokens has 10")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON to this file")
    arguments = parser.parse_args()
    device: Device = arguments.device
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as name:
        model_dir = write_shape(arguments.model_config, Path(name))
        config = WorkerConfig(
            name="bench",
            role="decode",
            model_dir=model_dir,
            listen="ipc://unused",
            device=device,
            dtype="bfloat16" if device == "cuda" else "float32",
            load_format="dummy",
            max_model_len=arguments.context + 1,
            page_size_tokens=64,
            max_batch=arguments.batch,
        )
        engine = Engine(config, read_model_config(model_dir))
        engine.load(lambda done_bytes, total_bytes: None)
        report = OverlapReport(
            device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
            model=arguments.model_config,
            batch=arguments.batch,
            context_tokens=arguments.context,
            steps=arguments.steps,
            slot_bytes=arguments.slot_bytes,
            slots_a_launch=arguments.slots_a_launch,
            rows=measure(engine, arguments),
        )
    show(report)
    encoded = msgspec.json.format(msgspec.json.encode(report))
    print(encoded.decode())
    if arguments.out is not None:
        arguments.out.write_bytes(encoded)


if __name__ == "__main__":
    main()
