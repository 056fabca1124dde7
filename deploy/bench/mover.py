"""What the NIXL mover moves between two processes of this host: `python -m deploy.bench.mover`.

The receiver is a process of its own with its own staging buffer; the sender keeps a few writes in flight,
as a transfer process does, and counts a write when the mover says that it is done.
"""

import json
import os
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table

from kvtransfer.movers.base import PieceOfWrite, Progress, Region
from kvtransfer.movers.nixl import NixlMover
from kvtransfer.staging import HostStaging

SEGMENT_BYTES = (4 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20)
BUFFER_BYTES = 64 << 20
IN_FLIGHT = 4
SECONDS_A_SIZE = 1.0
DEADLINE_S = 60.0


def receive() -> None:
    """The other process: offer a buffer, then wait until the sender closes the pipe."""
    staging = HostStaging(BUFFER_BYTES)
    mover = NixlMover(f"receiver-{os.getpid()}", same_host=True)
    mover.register(staging.region)
    offer = {"agent": mover.agent_name, "metadata": mover.metadata().hex(), "address": staging.region.address}
    print(json.dumps(offer), flush=True)
    sys.stdin.read()
    mover.close()
    staging.close()


def moved_bytes_per_s(mover: NixlMover, peer: str, segment_bytes: int) -> float:
    """Bytes a second with `IN_FLIGHT` writes of `segment_bytes` each. Raises TimeoutError on a stall."""
    places = BUFFER_BYTES // segment_bytes
    started_s = time.perf_counter()
    posted = moved_bytes = 0
    flying: list[int] = []
    while flying or time.perf_counter() - started_s < SECONDS_A_SIZE:
        elapsed_s = time.perf_counter() - started_s
        if elapsed_s > DEADLINE_S:
            raise TimeoutError(f"a write of {segment_bytes} bytes did not end in {DEADLINE_S} s")
        while len(flying) < IN_FLIGHT and elapsed_s < SECONDS_A_SIZE:
            offset = posted % places * segment_bytes
            flying.append(mover.post(peer, [PieceOfWrite(offset, offset, segment_bytes)]))
            posted += 1
        for handle in list(flying):
            progress = mover.poll(handle)
            if progress is Progress.FAILED:
                raise RuntimeError(f"a write of {segment_bytes} bytes failed")
            if progress is Progress.DONE:
                mover.release(handle)
                flying.remove(handle)
                moved_bytes += segment_bytes
    return moved_bytes / (time.perf_counter() - started_s)


def main() -> None:
    staging = HostStaging(BUFFER_BYTES)
    mover = NixlMover(f"sender-{os.getpid()}", same_host=True)
    mover.register(staging.region)
    receiver = subprocess.Popen(
        [sys.executable, "-m", "deploy.bench.mover", "--receive"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        if receiver.stdin is None or receiver.stdout is None:
            raise RuntimeError("the receiver has no pipes")
        offer = json.loads(receiver.stdout.readline())
        mover.add_peer(
            offer["agent"], bytes.fromhex(offer["metadata"]), Region(offer["address"], BUFFER_BYTES)
        )
        table = Table(title=f"NIXL mover, two processes, {IN_FLIGHT} writes in flight")
        table.add_column("segment", justify="right")
        table.add_column("GB/s", justify="right")
        for segment_bytes in SEGMENT_BYTES:
            rate = moved_bytes_per_s(mover, offer["agent"], segment_bytes)
            table.add_row(f"{segment_bytes >> 10} KiB", f"{rate / 1e9:.2f}")
        Console().print(table)
    finally:
        mover.close()
        receiver.communicate("", timeout=DEADLINE_S)
        staging.close()


if __name__ == "__main__":
    if sys.argv[1:] == ["--receive"]:
        receive()
    else:
        main()
