"""A router's end of a connection to a worker, for tests of workers: a plain UNIX socket and its frames."""

import socket
from typing import Any

from kvtransfer.net.codec import Codec
from services.protocol.framing import FrameSplitter, with_length
from services.protocol.messages import Report, Request
from tests.patience import patient

DEADLINE_S = patient(30.0)
READ_BYTES = 1 << 20


class RouterPeer:
    """`sends` is what it may say: with `object` also what is no request."""

    def __init__(self, endpoint: str, sends: Any = Request) -> None:
        self._sends: Codec[Any] = Codec(sends)
        self._receives: Codec[Report] = Codec(Report)
        self._frames = FrameSplitter(self._receives.max_frame_bytes)
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE_S)
        self.socket.connect(endpoint.removeprefix("ipc://"))

    def frame(self, messages: list[Any]) -> bytes:
        """As it travels."""
        return with_length(self._sends.encode(messages))

    def send(self, messages: list[Any]) -> None:
        self.socket.sendall(self.frame(messages))

    def receive(self) -> list[Report]:
        """What has arrived already."""
        self.socket.setblocking(False)
        try:
            return self._decode(self.socket.recv(READ_BYTES))
        except BlockingIOError:
            return []
        finally:
            self.socket.settimeout(DEADLINE_S)

    def wait(self) -> list[Report]:
        """What comes next; nothing if the worker ends the connection."""
        while data := self.socket.recv(READ_BYTES):
            if reports := self._decode(data):
                return reports
        return []

    def close(self) -> None:
        self.socket.close()

    def _decode(self, data: bytes) -> list[Report]:
        return [report for frame in self._frames.feed(data) for report in self._receives.decode(frame)]
