"""The link between the leading rank and another: frames over a socket pair, each four bytes of length, then a
frame as on every other edge (kvtransfer/net/codec.py). A pair has no name: nobody else can reach it."""

import socket
import time
from collections import deque
from typing import Any, Generic, TypeVar

from kvtransfer.errors import ProtocolError
from kvtransfer.net.codec import Codec

SEND_TIMEOUT_S = 60.0
"""A rank reads between any two steps; one that has not for so long never will."""
_LENGTH_BYTES = 4
_READ_BYTES = 1 << 16

In = TypeVar("In")
Out = TypeVar("Out")


class RankLost(Exception):
    """The other end is gone, or silent for too long."""


class RankLink(Generic[In, Out]):
    """One end. Every method raises `RankLost`, also for a frame that does not decode."""

    def __init__(self, end: socket.socket, receives: Any, sends: Any) -> None:
        """`receives` and `sends` are unions of messages."""
        self._socket = end
        self._receives: Codec[In] = Codec(receives)
        self._sends: Codec[Out] = Codec(sends)
        self._partial = bytearray()
        self._arrived: deque[In] = deque()

    def send(self, message: Out) -> None:
        self.send_frame(self.encode(message))

    def encode(self, message: Out) -> bytes:
        """A frame that `send_frame` takes, on this link or on another of its kind."""
        frame = self._sends.encode([message])
        return len(frame).to_bytes(_LENGTH_BYTES, "little") + frame

    def send_frame(self, frame: bytes) -> None:
        self._socket.settimeout(SEND_TIMEOUT_S)
        try:
            self._socket.sendall(frame)
        except OSError as error:
            raise RankLost(f"it takes no commands: {error}") from error

    def receive(self, timeout_s: float | None) -> In:
        """The next message; None waits as long as the other end lives."""
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._arrived:
            left_s = None if end_s is None else max(0.001, end_s - time.monotonic())
            if not self._read(left_s) and end_s is not None and time.monotonic() >= end_s:
                raise RankLost(f"no word from it for {timeout_s:g} s")
        return self._arrived.popleft()

    def poll(self, timeout_s: float = 0.0) -> In | None:
        """The next message if there is one, or comes within `timeout_s`."""
        if not self._arrived:
            self._read(timeout_s)
        return self._arrived.popleft() if self._arrived else None

    def close(self) -> None:
        self._socket.close()

    def _read(self, timeout_s: float | None) -> bool:
        """Take in what is there, or comes first; False if nothing did."""
        self._socket.settimeout(timeout_s)
        try:
            data = self._socket.recv(_READ_BYTES)
        except (TimeoutError, BlockingIOError):
            return False
        except OSError as error:
            raise RankLost(str(error)) from error
        if not data:
            raise RankLost("its end of the link is closed")
        self._partial += data
        try:
            self._take_frames()
        except ProtocolError as error:
            raise RankLost(str(error)) from error
        return True

    def _take_frames(self) -> None:
        while len(self._partial) >= _LENGTH_BYTES:
            end = _LENGTH_BYTES + int.from_bytes(self._partial[:_LENGTH_BYTES], "little")
            if end > self._receives.max_frame_bytes:
                raise ProtocolError(f"a frame of {end} bytes is too long")
            if len(self._partial) < end:
                return
            self._arrived.extend(self._receives.decode(bytes(self._partial[_LENGTH_BYTES:end])))
            del self._partial[:end]
