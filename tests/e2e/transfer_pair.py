"""Real transfer processes with simulated workers, for the process tests."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import zmq

from kvtransfer.client import SlotsAssigned, TransferClient, TransferLost, WorkerEvent
from kvtransfer.messages import Aborted, Arrived, KvGeometry, Segment, SendCommitted, SendGranted, SlotUse
from tests.patience import patient

GEOMETRY = KvGeometry("model", 4, 2, 32, "float32")
TOKEN_BYTES = GEOMETRY.token_bytes
SLOTS = 6
SLOT_BYTES = 64 << 10
DEADLINE_S = patient(30.0)

PROGRAM = """
import logging, sys
from pathlib import Path
from kvtransfer.config import TransferConfig
from kvtransfer.process import run
directory, name = Path(sys.argv[1]), sys.argv[2]
logging.basicConfig(level=logging.INFO, format=f'%(asctime)s %(levelname)s {name} %(message)s')
run(TransferConfig(
    name=name, listen=f"ipc://{directory}/{name}.worker", peer_listen=f"ipc://{directory}/{name}.peers",
    staging_socket=directory / f"{name}.staging", slots=int(sys.argv[3]), slot_bytes=int(sys.argv[4]),
    device=sys.argv[5], device_index=int(sys.argv[6]), mover=sys.argv[7],
    peer_timeout_s=float(sys.argv[8]), heartbeat_s=0.2, transfer_timeout_s=10.0,
))
"""


class TransferPair:
    """Starts, stops and restarts named transfer processes in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(
        self,
        name: str,
        device: str = "cpu",
        gpu: int = 0,
        mover: str = "auto",
        slot_bytes: int = SLOT_BYTES,
    ) -> None:
        arguments = [str(self.directory), name, str(SLOTS), str(slot_bytes), device, str(gpu), mover]
        arguments.append(str(patient(1.0)))
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.processes[name] = subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], env=environment)

    def signal(self, name: str, number: int) -> None:
        self.processes[name].send_signal(number)

    def kill(self, name: str) -> None:
        self.signal(name, signal.SIGKILL)
        self.processes.pop(name).wait(DEADLINE_S)

    def terminate(self, name: str) -> int:
        process = self.processes.pop(name)
        process.terminate()
        return process.wait(DEADLINE_S)

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait(DEADLINE_S)


class Worker:
    """A worker with one attached client, that packs and unpacks byte patterns."""

    def __init__(self, directory: Path, name: str, epoch: int) -> None:
        self.client = TransferClient(
            f"ipc://{directory}/{name}.worker", epoch, GEOMETRY, timeout_s=DEADLINE_S
        )
        self.content: dict[int, bytes] = {}
        """What to send, by transfer."""
        self.sent_tokens: dict[int, int] = {}
        self.grants: dict[int, int] = {}
        self.assigned: list[SlotUse] = []
        self.got: dict[int, bytearray] = {}
        self.missing: dict[int, int] = {}
        self.committed: set[int] = set()
        self.received: set[int] = set()
        self.aborted: dict[int, str] = {}
        self.lost: list[int] = []
        self.paused = False
        """Keeps assigned and arrived slots instead of using them."""

    def send(self, transfer_id: int, content: bytes, deadline_s: float = 30.0) -> None:
        self.content[transfer_id], self.sent_tokens[transfer_id] = content, 0
        self.client.open_send(transfer_id, deadline_s)
        self.client.send_ready(transfer_id)
        self.client.flush()

    def receive(self, transfer_id: int, source: "Worker", tokens: int, deadline_s: float = 30.0) -> None:
        self.got[transfer_id] = bytearray(tokens * TOKEN_BYTES)
        self.missing[transfer_id] = tokens
        self.client.open_receive(transfer_id, source.client.address, 0, tokens, deadline_s)
        self.client.flush()

    def step(self) -> None:
        now_s = time.monotonic()
        self.client.tick(now_s)
        for event in self.client.receive(now_s):
            self._on(event)
        if not self.paused:
            self._pack()
        self.client.flush()

    def write_slot(self, slot: int, data: bytes) -> None:
        self.client.slot_view(slot)[: len(data)] = data

    def read_slot(self, slot: int, byte_count: int) -> bytes:
        return bytes(self.client.slot_view(slot)[:byte_count])

    def all_free(self) -> bool:
        stats = self.client.last_stats
        return stats is not None and stats.counts.free == SLOTS

    def _on(self, event: WorkerEvent) -> None:
        if isinstance(event, SendGranted):
            self.grants[event.transfer_id] = self.grants.get(event.transfer_id, 0) + event.segments
        elif isinstance(event, SlotsAssigned):
            self.assigned += event.slots
        elif isinstance(event, Arrived) and not self.paused:
            self._unpack(event)
        elif isinstance(event, SendCommitted):
            self.committed.add(event.transfer_id)
            self.grants.pop(event.transfer_id, None)
        elif isinstance(event, Aborted):
            self.aborted[event.transfer_id] = event.reason
            self.grants.pop(event.transfer_id, None)
        elif isinstance(event, TransferLost):
            self.lost.append(event.old_epoch)
            self.grants.clear()
            self.assigned.clear()

    def _pack(self) -> None:
        for transfer_id, content in self.content.items():
            segments = []
            while self.assigned and self.grants.get(transfer_id, 0):
                start = self.sent_tokens[transfer_id]
                count = min(self.client.tokens_per_slot, len(content) // TOKEN_BYTES - start)
                if count == 0:
                    break
                use = self.assigned.pop(0)
                data = content[start * TOKEN_BYTES : (start + count) * TOKEN_BYTES]
                self.write_slot(use.slot, data)
                segments.append(Segment(use.slot, use.generation, start, count, len(data)))
                self.sent_tokens[transfer_id] += count
                self.grants[transfer_id] -= 1
            if segments:
                self.client.filled(transfer_id, segments)
        unused = len(self.assigned) - sum(self.grants.values())
        if unused > 0:
            self.client.freed([self.assigned.pop() for _ in range(unused)])

    def _unpack(self, event: Arrived) -> None:
        got = self.got[event.transfer_id]
        for segment in event.segments:
            at = segment.start_token * TOKEN_BYTES
            got[at : at + segment.byte_count] = self.read_slot(segment.slot, segment.byte_count)
            self.missing[event.transfer_id] -= segment.token_count
        self.client.freed([SlotUse(s.slot, s.generation) for s in event.segments])
        if self.missing[event.transfer_id] == 0:
            self.received.add(event.transfer_id)
            self.client.commit(event.transfer_id)


def drive(workers: list[Worker], until: Callable[[], bool], what: str) -> None:
    """Steps all workers until a state is reached. Raises AssertionError if that takes too long."""
    poller = zmq.Poller()
    for worker in workers:
        poller.register(worker.client.socket, zmq.POLLIN)
    deadline_s = time.monotonic() + DEADLINE_S
    while not until():
        assert time.monotonic() < deadline_s, f"waited in vain: {what}"
        poller.poll(20)
        for worker in workers:
            worker.step()


def content_of(tokens: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(tokens * TOKEN_BYTES)
