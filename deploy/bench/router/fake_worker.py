"""Workers without a model for the router's benchmark: they answer at once, from the benchmark's own loop.

They read and write their sockets in that loop: work that a thread of its own had to do would count as the
router's time.
"""

import socket
import time
from collections.abc import Callable
from pathlib import Path

from deploy.bench.router.http_client import RECEIVE_BYTES, HttpBenchError, HttpLoop, Stamps
from kvtransfer.net.codec import MAX_FRAME_BYTES, Codec
from services.protocol.framing import FrameSplitter, with_length
from services.protocol.messages import (
    VERSION,
    Cancel,
    DecodeStarted,
    Generate,
    Prefill,
    PrefillDone,
    Report,
    Request,
    Role,
    RouterHello,
    StartDecode,
    StatusRequest,
    Tokens,
    WorkerHello,
    WorkerTransferAddress,
)
from services.protocol.worker_status import Ledger, PageUsage, Status

TOKEN = 65
"""What every answer is made of: a byte of every byte-level vocabulary."""
MAX_LEN = 1 << 20


class Peer:
    """The router's connection to one worker: frames in, frames out."""

    def __init__(self, connection: socket.socket, on_frame: "Callable[[Peer, bytes], None]") -> None:
        self.socket = connection
        self._on_frame = on_frame
        self._frames = FrameSplitter(MAX_FRAME_BYTES)

    def on_readable(self) -> None:
        for frame in self._frames.feed(self.socket.recv(RECEIVE_BYTES)):
            self._on_frame(self, frame)

    def send(self, frame: bytes) -> None:
        self.socket.setblocking(True)
        self.socket.sendall(with_length(frame))
        self.socket.setblocking(False)


class FakeWorker:
    """One worker of a role, listening at `path`. `stamps` maps the seeds of requests under way.

    A unified worker answers `Generate` with the first token only; the rest comes by `step`.
    """

    def __init__(self, loop: HttpLoop, path: Path, role: Role, stamps: dict[int, Stamps]) -> None:
        self.role, self._loop, self._stamps = role, loop, stamps
        self._requests: Codec[Request] = Codec(Request)
        self._reports: Codec[Report] = Codec(Report)
        self._live: dict[int, int] = {}
        self._peer: Peer | None = None
        self.asked = 0
        """How often the router asked for a status."""
        self._status = self._encoded_status()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(8)
        loop.add(self._listener, self._accept)

    def close(self) -> None:
        self._loop.remove(self._listener)
        self._listener.close()
        if self._peer is not None:
            self._loop.remove(self._peer.socket)
            self._peer.socket.close()

    def _accept(self) -> None:
        if self._peer is not None:
            raise HttpBenchError("the router connected a second time")
        connection, _ = self._listener.accept()
        self._peer = Peer(connection, self._on_frame)
        self._loop.add(connection, self._peer.on_readable)

    def step(self) -> None:
        """One token for every live choice, in one frame."""
        if self._peer is None or not self._live:
            return
        reports: list[Report] = []
        for request_id, left in list(self._live.items()):
            reports.append(Tokens(request_id, 0, [TOKEN], None, "length" if left == 1 else None))
            if left == 1:
                del self._live[request_id]
            else:
                self._live[request_id] = left - 1
        self._peer.send(self._reports.encode(reports))

    @property
    def live(self) -> int:
        return len(self._live)

    def _on_frame(self, peer: Peer, frame: bytes) -> None:
        received_ns = time.monotonic_ns()
        for message in self._requests.decode(frame):
            match message:
                case Prefill(work):
                    first = self._reports.encode(
                        [
                            PrefillDone(work.request_id, 0.0, 0.0, 0),
                            Tokens(work.request_id, 0, [TOKEN]),
                        ]
                    )
                    stamps = self._stamps[work.sampling.seed]
                    stamps.prefill_ns, stamps.answered_ns = received_ns, time.monotonic_ns()
                    peer.send(first)
                case StartDecode(request_id):
                    started = DecodeStarted(request_id, 0.0, 0.0, 1, 0)
                    last = Tokens(request_id, 0, [TOKEN], None, "length")
                    peer.send(self._reports.encode([started, last]))
                case Generate(work):
                    self._live[work.request_id] = work.sampling.max_tokens - 1
                    done = PrefillDone(work.request_id, 0.0, 0.0, 0)
                    peer.send(self._reports.encode([done, Tokens(work.request_id, 0, [TOKEN])]))
                case Cancel(request_id):
                    self._live.pop(request_id, None)
                case StatusRequest():
                    self.asked += 1
                    peer.send(self._status)
                case RouterHello():
                    peer.send(self._reports.encode([self._hello()]))

    def _hello(self) -> WorkerHello:
        return WorkerHello(
            version=VERSION,
            name=self.role,
            role=self.role,
            worker_epoch=1,
            model_digest="bench",
            vocab_size=MAX_LEN,
            max_model_len=MAX_LEN,
            max_sequence_tokens=MAX_LEN,
            page_size_tokens=16,
            pages=1 << 16,
            transfer=None
            if self.role == "unified"
            else WorkerTransferAddress(f"ipc:///bench/{self.role}", 1),
        )

    def _encoded_status(self) -> bytes:
        status = Status(
            ask_id=None,
            worker_epoch=1,
            name=self.role,
            role=self.role,
            state="ready",
            pid=1,
            transfer_pid=None,
            queued=0,
            running=0,
            reserved=0,
            holding=0,
            pages=PageUsage(1 << 16, 1 << 16, 0, 0),
            slots=None,
            slots_age_s=0.0,
            open_sends=0,
            open_receives=0,
            prompt_tokens_per_s=0.0,
            output_tokens_per_s=0.0,
            counters={},
            ledger=Ledger(device="cpu", device_bytes=1, mem_fraction=0.5, entries=[]),
        )
        return self._reports.encode([status])
