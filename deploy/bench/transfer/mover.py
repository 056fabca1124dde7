"""What a mover moves between two processes, beside one plain big copy: `python -m
deploy.bench.transfer.mover`.

The receiver is a process of its own with its own staging buffer; the sender keeps some writes in flight, as a
transfer process does, and counts a write when the mover says that it is done. The plain copy moves the whole
buffer at once by the same device: the ceiling that slots are measured against.

    python -m deploy.bench.transfer.mover                                             # nixl on host memory
    python -m deploy.bench.transfer.mover --device cuda --mover cuda_ipc --target-gpu 1 --out mover.json
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.table import Table

from kvtransfer.buffer.cuda import CudaDevice
from kvtransfer.buffer.region import Region
from kvtransfer.buffer.staging import DeviceStaging, HostStaging
from kvtransfer.config import Device
from kvtransfer.errors import BatonTransferError
from kvtransfer.movers.base import Mover, PieceOfWrite, Progress, two_sided
from kvtransfer.movers.registry import registered_movers
from kvtransfer.movers.spec import HostFacts, MoverSetup, MoverSpec

KIB, MIB = 1 << 10, 1 << 20
SLOT_BYTES: dict[Device, tuple[int, ...]] = {
    "cpu": (4 * KIB, 64 * KIB, 256 * KIB, 1 * MIB, 4 * MIB, 16 * MIB),
    "cuda": (1 * MIB, 2 * MIB, 4 * MIB, 8 * MIB, 16 * MIB, 32 * MIB, 64 * MIB),
}
BUFFER_BYTES: dict[Device, int] = {"cpu": 64 * MIB, "cuda": 512 * MIB}
PLAIN_COPIES = 5
MOVERS = {mover.name: mover for mover in registered_movers()}
DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True)
class MoverRow:
    slot_bytes: int
    in_flight: int
    gb_per_s: float


class Side:
    """One process' staging buffer and mover."""

    def __init__(self, name: str, mover: MoverSpec, device: Device, gpu: int) -> None:
        why = mover.why_not(HostFacts(device, same_host=True)) or mover.missing()
        if why is not None:
            raise SystemExit(f"--mover {mover.name}: {why}")
        self.gpu = CudaDevice(gpu) if device == "cuda" else None
        size_bytes = BUFFER_BYTES[device]
        self.staging: HostStaging | DeviceStaging
        self.staging = HostStaging(size_bytes) if self.gpu is None else DeviceStaging(size_bytes, self.gpu)
        self.ipc_handle = self.staging.cuda_ipc_handle
        agent_name = f"{name}-{os.getpid()}"
        self.mover = mover.build(MoverSetup(agent_name, True, self.gpu, self.ipc_handle))
        self.mover.register(self.staging.region)

    def offer(self) -> str:
        """What the other side needs, as one line."""
        region = self.staging.region
        return json.dumps(
            {
                "agent": self.mover.agent_name,
                "metadata": self.mover.metadata().hex(),
                "address": region.address,
                "gpu": region.device_id,
                "ipc_handle": None if self.ipc_handle is None else self.ipc_handle.hex(),
            }
        )

    def close(self) -> None:
        self.mover.close()
        self.staging.close()


def receive(side: Side) -> None:
    """The other process: offer a buffer, then take part, where the mover wants that, until the sender closes
    the pipe. A line is a note: who says it, and what."""
    print(side.offer(), flush=True)
    taking_part = two_sided(side.mover)
    if taking_part is None:
        sys.stdin.read()
    else:
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

        def read() -> None:
            for line in sys.stdin:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        open_pipe = True
        while open_pipe:
            while not lines.empty():
                line = lines.get()
                if line is None:
                    open_pipe = False
                    break
                peer, note = line.split()
                taking_part.accept_source(peer)
                taking_part.on_note(peer, bytes.fromhex(note))
            taking_part.step()
    side.close()


class SendingSide:
    """The writing side: posts, and passes on what its mover has to say."""

    def __init__(self, mover: Mover, peer: str, pipe: IO[str]) -> None:
        self._mover, self._peer, self._pipe = mover, peer, pipe
        self._taking_part = two_sided(mover)

    def post(self, offset: int, byte_count: int) -> int:
        handle = self._mover.post(self._peer, [PieceOfWrite(offset, offset, byte_count)])
        self._say()
        return handle

    def done(self, handle: int) -> bool:
        """Raises RuntimeError if the write has failed."""
        if self._taking_part is not None:
            self._say()
            self._taking_part.step()
        progress = self._mover.poll(handle)
        if progress is Progress.FAILED:
            raise RuntimeError(f"a write failed: {self._taking_part and self._taking_part.faults()}")
        if progress is Progress.DONE:
            self._mover.release(handle)
        return progress is Progress.DONE

    def _say(self) -> None:
        notes = [] if self._taking_part is None else self._taking_part.notes()
        for _, note in notes:
            self._pipe.write(f"{self._mover.agent_name} {note.hex()}\n")
        if notes:
            self._pipe.flush()


def moved_bytes_per_s(
    sender: SendingSide, buffer_bytes: int, slot_bytes: int, in_flight: int, seconds: float
) -> float:
    """Bytes a second with `in_flight` writes of `slot_bytes` each, after one that opens the connection.
    Raises TimeoutError on a stall."""
    first, until_s = sender.post(0, slot_bytes), time.perf_counter() + DEADLINE_S
    while not sender.done(first):
        if time.perf_counter() > until_s:
            raise TimeoutError(f"the first write did not end in {DEADLINE_S} s")
    places = buffer_bytes // slot_bytes
    started_s = time.perf_counter()
    posted = moved_bytes = 0
    flying: list[int] = []
    while flying or time.perf_counter() - started_s < seconds:
        elapsed_s = time.perf_counter() - started_s
        if elapsed_s > DEADLINE_S:
            raise TimeoutError(f"a write of {slot_bytes} bytes did not end in {DEADLINE_S} s")
        while len(flying) < in_flight and elapsed_s < seconds:
            offset = posted % places * slot_bytes
            flying.append(sender.post(offset, slot_bytes))
            posted += 1
        for handle in list(flying):
            if sender.done(handle):
                flying.remove(handle)
                moved_bytes += slot_bytes
    return moved_bytes / (time.perf_counter() - started_s)


def plain_copy_per_s(side: Side, ipc_handle: bytes | None) -> float:
    """Bytes a second of one copy of the whole buffer: within this process on a host, to the other process'
    buffer on a GPU. The best of some."""
    size_bytes = side.staging.region.byte_count
    if isinstance(side.staging, HostStaging):
        view, target = side.staging.view, memoryview(bytearray(size_bytes))

        def host_copy() -> None:
            target[:] = view

        return size_bytes / min(_timed(host_copy) for _ in range(PLAIN_COPIES))
    gpu = side.gpu
    if gpu is None or ipc_handle is None:
        raise ValueError("a GPU's buffer has a handle")
    mapped, stream, event = gpu.import_memory(ipc_handle), gpu.new_stream(), gpu.new_event()

    def device_copy() -> None:
        gpu.copy(mapped, side.staging.region.address, size_bytes, stream)
        gpu.record(event, stream)
        while not gpu.reached(event):
            pass

    try:
        return size_bytes / min(_timed(device_copy) for _ in range(PLAIN_COPIES))
    finally:
        gpu.drop_event(event)
        gpu.drop_stream(stream)
        gpu.unmap(mapped)


def _timed(work: Callable[[], None]) -> float:
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


def measure(
    options: argparse.Namespace, slots: list[int], in_flight: list[int]
) -> tuple[float, list[MoverRow]]:
    """Bytes a second of the plain copy, and a row for each slot size and number of writes in flight."""
    side = Side("sender", MOVERS[options.mover], options.device, options.source_gpu)
    command = [sys.executable, "-m", "deploy.bench.transfer.mover", "--receive", "--mover", options.mover]
    command += ["--device", options.device, "--target-gpu", str(options.target_gpu)]
    receiver = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        offer = json.loads(_pipe(receiver.stdout).readline() or '{"agent": null}')
        if offer["agent"] is None:
            raise SystemExit("the receiver ended before it had a buffer")
        size_bytes = BUFFER_BYTES[options.device]
        region = Region(offer["address"], size_bytes, offer["gpu"], options.device == "cuda")
        handle = offer["ipc_handle"]
        plain = plain_copy_per_s(side, None if handle is None else bytes.fromhex(handle))
        side.mover.add_peer(offer["agent"], bytes.fromhex(offer["metadata"]), region)
        sender = SendingSide(side.mover, offer["agent"], _pipe(receiver.stdin))
        rows = []
        for slot_bytes in slots:
            for count in in_flight:
                rate = moved_bytes_per_s(sender, size_bytes, slot_bytes, count, options.seconds)
                rows.append(MoverRow(slot_bytes, count, rate / 1e9))
        return plain, rows
    finally:
        side.close()
        receiver.communicate("", timeout=DEADLINE_S)


def _pipe(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise RuntimeError("the receiver has no pipe")
    return pipe


def _sizes(text: str) -> list[int]:
    return [int(float(part) * MIB) for part in text.split(",")]


def _counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.bench.transfer.mover", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--mover", choices=MOVERS, default="nixl")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the buffers lie")
    parser.add_argument("--source-gpu", type=int, default=0)
    parser.add_argument("--target-gpu", type=int, default=0, help="may be the source's")
    parser.add_argument("--slot-mib", type=_sizes, help="slot sizes in MiB, like 1,8,64")
    parser.add_argument("--in-flight", type=_counts, default=[1, 4, 8], help="writes in flight, like 1,4,8")
    parser.add_argument("--seconds", type=float, default=1.0, help="of writing for each figure")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the figures as JSON")
    parser.add_argument("--receive", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        if options.receive:
            receive(Side("receiver", MOVERS[options.mover], options.device, options.target_gpu))
            return
        slots = options.slot_mib or list(SLOT_BYTES[options.device])
        if not all(0 < slot <= BUFFER_BYTES[options.device] for slot in slots):
            parser.error(f"--slot-mib: must be above 0 and at most {BUFFER_BYTES[options.device] // MIB}")
        if not all(count > 0 for count in options.in_flight):
            parser.error("--in-flight: must be above 0")
        plain, rows = measure(options, slots, options.in_flight)
    except BatonTransferError as error:
        raise SystemExit(str(error)) from None
    where = "host memory" if options.device == "cpu" else f"GPU {options.source_gpu} to {options.target_gpu}"
    table = Table(title=f"{options.mover}, two processes, {where}, GB/s; one plain copy: {plain / 1e9:.1f}")
    table.add_column("slot", justify="right")
    for count in options.in_flight:
        table.add_column(f"{count} in flight", justify="right")
    for slot_bytes in slots:
        rates = [f"{row.gb_per_s:.2f}" for row in rows if row.slot_bytes == slot_bytes]
        table.add_row(f"{slot_bytes >> 10} KiB" if slot_bytes < MIB else f"{slot_bytes >> 20} MiB", *rates)
    Console().print(table)
    if options.out is not None:
        chosen = ("mover", "device", "source_gpu", "target_gpu", "seconds")
        result = {name: getattr(options, name) for name in chosen}
        result |= {"plain_copy_gb_per_s": plain / 1e9, "rows": [asdict(row) for row in rows]}
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
