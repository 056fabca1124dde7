"""What packs and unpacks cost the host, and how fast they are: `python -m deploy.bench.transfer.copies`.

A worker's own sender and receiver are given slots for computed tokens, or slots that have arrived, some at a
time. A row says what the host pays for a slot (the median launch), from there to the queued
launch and from its end to the message for the transfer process, and how many bytes a second that allows. On
a GPU nothing is left out, and the last column is the rate that was met, with at most `--in-flight` launches
queued. Without one (`--device cpu`) the launch, its events and the copy of its table are left out, and
nothing is moved.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import cast

import msgspec
import torch
from rich.console import Console
from rich.table import Table

from deploy.bench.engine.shapes import write_shape
from deploy.bench.machine import cpu_name, versions
from kvtransfer.client import SlotsAssigned, TransferClient
from kvtransfer.messages import Arrived, Segment, SendConfirmed, SendGranted, SlotUse
from kvtransfer.spans import Spans
from services.engine.events import NOW
from services.engine.kv.copies import Copy, CopyStream
from services.engine.kv.layout import KvLayout
from services.engine.kv.pool import KvPool
from services.engine.kv.run_table import RunTables, SlotRun
from services.engine.kv.segments import SlotBuffer
from services.engine.models.model_config import read_model_config
from services.engine.step_events import StepEvents
from services.protocol.messages import Sampling, SequenceRequest, WorkerTransferAddress
from services.scheduler.sequence import Sequence as Prompt
from services.scheduler.sequence import prompt_sequence
from services.transfer.copies import KvCopier
from services.transfer.receiver import KvReceiver
from services.transfer.sender import KvSender

SLOTS_TOGETHER = (1, 2, 4, 10, 32)
PAGE_SIZE_TOKENS = 64
WARM_LAUNCHES = 20
SOURCE = WorkerTransferAddress("ipc://nobody", 1)
SAMPLING = Sampling(max_tokens=1, seed=0, temperature=0.0)


class CopyFigures(msgspec.Struct, frozen=True):
    """`allowed_bytes_per_s` is a slot's bytes over `host_s`, which is what the host pays for one;
    `met_bytes_per_s` is None where nothing was moved."""

    kind: str
    slots_together: int
    host_s: float
    allowed_bytes_per_s: float
    met_bytes_per_s: float | None


class CopyReport(msgspec.Struct, frozen=True):
    device: str
    versions: dict[str, str]
    model: str
    slot_tokens: int
    slot_bytes: int
    launches: int
    rows: list[CopyFigures]


class NoProcess:
    """Stands for the link to a transfer process: what is said to it costs a list's append."""

    checksum = False
    ready = True

    def __init__(self) -> None:
        self.said: list[object] = []

    def filled(self, transfer_id: int, segments: list[Segment]) -> None:
        self.said.append(segments)

    def freed(self, slots: list[SlotUse]) -> None:
        self.said.append(slots)

    def commit(self, transfer_id: int) -> None:
        self.said.append(transfer_id)

    def open_send(self, *values: object) -> None:
        self.said.clear()

    open_receive = open_send


class TablesOnly:
    """Copies that end before their launch: the table of what would be copied is all that is made."""

    def __init__(self, tables: RunTables, slots: int, slot_bytes: int) -> None:
        self._tables, self._slots, self._slot_bytes = tables, slots, slot_bytes

    def pack(self, runs: Sequence[SlotRun], with_checksums: bool) -> Copy:
        return Copy(self._tables.of(runs, self._slots, self._slot_bytes).byte_counts)

    unpack = pack

    def passed_step(self) -> int:
        return 0

    def fence(self, copy: Copy) -> None: ...

    def unmap_staging(self) -> None: ...


class DeviceCopies(TablesOnly):
    """A worker's copies, of a pool and a staging buffer of the device."""

    def __init__(self, pool: KvPool, tables: RunTables, slots: int, slot_bytes: int) -> None:
        super().__init__(tables, slots, slot_bytes)
        self._copies = CopyStream(pool, slots, StepEvents())
        memory = torch.zeros(slots * slot_bytes, dtype=torch.uint8, device=pool.data.device)
        self._buffer = SlotBuffer(memory, slot_bytes)

    def pack(self, runs: Sequence[SlotRun], with_checksums: bool) -> Copy:
        return self._copies.pack(runs, self._buffer, with_checksums, NOW)

    def unpack(self, runs: Sequence[SlotRun], with_checksums: bool) -> Copy:
        return self._copies.unpack(runs, self._buffer, with_checksums, NOW)


class PackFigures:
    """One prompt after the other, each with as many slots as are packed together."""

    def __init__(self, copier: KvCopier, heads: int, tokens: int, together: int) -> None:
        self._together = together
        ranks = [(copier, cast(TransferClient, NoProcess()))]
        self._sender = KvSender(ranks, heads, time.monotonic, Spans())
        self._heads, self._tokens = heads, tokens
        self._open: list[int] = []

    def prepare(self, transfer_id: int, prompt: Prompt, slots: range) -> None:
        self._sender.open(prompt, transfer_id, 1.0)
        end = prompt.prompt_tokens
        self._sender.on_event(SendConfirmed(transfer_id, 0, end, self._heads, self._tokens, 1))
        self._sender.on_event(SendGranted(transfer_id, len(slots)))
        self._sender.on_event(SlotsAssigned([SlotUse(slot, 1) for slot in slots]))
        prompt.done_tokens = end
        self._open.append(transfer_id)

    def queue(self) -> int:
        """Returns how many prompts are done already."""
        self._sender.pack()
        return 0

    def finish(self) -> int:
        """Hand over what is done; returns how many prompts."""
        prompts = self._sender.deliver() // self._together
        for _ in range(prompts):
            self._sender.end(self._open.pop(0))
        return prompts


class UnpackFigures:
    """One prompt after the other, whose slots arrive together."""

    def __init__(self, copier: KvCopier, heads: int, tokens: int, together: int) -> None:
        ranks = [(copier, cast(TransferClient, NoProcess()))]
        self._receiver = KvReceiver(ranks, heads, time.monotonic, Spans())
        self._heads, self._tokens = heads, tokens
        self._event: Arrived | None = None

    def prepare(self, transfer_id: int, prompt: Prompt, slots: range) -> None:
        self._receiver.open(prompt, transfer_id, SOURCE, 1.0)
        size = self._tokens
        segments = [Segment(slot, 1, at * size, size, 1) for at, slot in enumerate(slots)]
        self._event = Arrived(transfer_id, segments)

    def queue(self) -> int:
        if self._event is not None:
            self._receiver.arrived(self._event)
        return self.finish()

    def finish(self) -> int:
        return len(self._receiver.settle().whole)


def run(
    side: PackFigures | UnpackFigures, prompts: list[Prompt], together: int, launches: int
) -> tuple[float, float]:
    """Median seconds of the host for a launch, and seconds from one launch to the next."""
    queued = finished = 0
    queue_s: list[float] = []
    finish_s: list[float] = []
    started_s = 0.0

    def finish() -> int:
        before_s = time.perf_counter()
        done = side.finish()
        if done:
            finish_s.append((time.perf_counter() - before_s) / done)
        return done

    for number in range(WARM_LAUNCHES + launches):
        if number == WARM_LAUNCHES:
            queue_s, finish_s, started_s = [], [], time.perf_counter()
        while queued - finished >= len(prompts):
            finished += finish()
        at = number % len(prompts)
        side.prepare(number + 1, prompts[at], range(at * together, (at + 1) * together))
        before_s = time.perf_counter()
        finished += side.queue()
        queue_s.append(time.perf_counter() - before_s)
        queued += 1
    while finished < queued:
        finished += finish()
    launch_s = (time.perf_counter() - started_s) / launches
    return median(queue_s) + (median(finish_s) if finish_s else 0.0), launch_s


def prompts_of(in_flight: int, tokens: int) -> list[Prompt]:
    """Computed, in pages of their own."""
    pages = -(-tokens // PAGE_SIZE_TOKENS)
    found = []
    for at in range(in_flight):
        prompt = prompt_sequence(SequenceRequest(at + 1, [1] * tokens, SAMPLING))
        prompt.pages, prompt.computed_tokens = list(range(at * pages, (at + 1) * pages)), tokens
        found.append(prompt)
    return found


def measure(layout: KvLayout, arguments: argparse.Namespace) -> list[CopyFigures]:
    device, dtype = torch.device(arguments.device), torch.bfloat16
    slot_bytes, in_flight = arguments.slot_bytes, arguments.in_flight
    found: list[CopyFigures] = []
    for together in SLOTS_TOGETHER:
        tokens = slot_tokens(layout, slot_bytes)
        prompts = prompts_of(in_flight, together * tokens)
        pages, slots = in_flight * len(prompts[0].pages), in_flight * together
        tables = RunTables(layout, pages, dtype.itemsize)
        copier = TablesOnly(tables, slots, slot_bytes)
        if device.type == "cuda":
            copier = DeviceCopies(KvPool(layout, pages, dtype, device), tables, slots, slot_bytes)
        for name, kind in (("packing", PackFigures), ("unpacking", UnpackFigures)):
            side = kind(copier, layout.kv_heads, tokens, together)
            host_s, launch_s = run(side, prompts, together, arguments.launches)
            slot_s = host_s / together
            moved_bytes = together * tokens * layout.kv_heads * tables.head_bytes
            met = moved_bytes / launch_s if device.type == "cuda" else None
            found.append(CopyFigures(name, together, slot_s, moved_bytes / together / slot_s, met))
    return found


def slot_tokens(layout: KvLayout, slot_bytes: int) -> int:
    token_bytes = layout.kv_heads * layout.layers * 2 * layout.head_dim * torch.bfloat16.itemsize
    return max(1, slot_bytes // token_bytes)


def show(report: CopyReport) -> None:
    title = (
        f"{report.device}, {report.model} in bfloat16: slots of {report.slot_bytes >> 10} KiB, "
        f"{report.slot_tokens} tokens"
    )
    table = Table(title=title)
    for column in ("", "slots together", "host µs a slot", "allows GB/s", "met GB/s"):
        table.add_column(column, justify="right" if column else "left")
    for row in report.rows:
        table.add_row(
            row.kind,
            str(row.slots_together),
            f"{row.host_s * 1e6:.1f}",
            f"{row.allowed_bytes_per_s / 1e9:.0f}",
            "" if row.met_bytes_per_s is None else f"{row.met_bytes_per_s / 1e9:.0f}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.bench.transfer.copies", description=__doc__)
    parser.add_argument("--model-config", default="qwen3-8b", help="a known shape, or a config.json")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--slot-bytes", type=int, default=8 << 20)
    parser.add_argument("--launches", type=int, default=1000)
    parser.add_argument("--in-flight", type=int, default=3, help="launches")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as name:
        shape = read_model_config(write_shape(arguments.model_config, Path(name)))
    layout = KvLayout(shape.layers, shape.kv_heads, PAGE_SIZE_TOKENS, shape.head_dim)
    report = CopyReport(
        device=torch.cuda.get_device_name() if arguments.device == "cuda" else cpu_name(),
        versions=versions(),
        model=arguments.model_config,
        slot_tokens=slot_tokens(layout, arguments.slot_bytes),
        slot_bytes=arguments.slot_bytes,
        launches=arguments.launches,
        rows=measure(layout, arguments),
    )
    show(report)
    if arguments.out is not None:
        arguments.out.write_bytes(msgspec.json.format(msgspec.json.encode(report)))


if __name__ == "__main__":
    main()
