"""Frames over the socket pair between the leading rank and another: four bytes of length, then a frame as on
every other edge (kvtransfer/codec.py). A pair has no name: nobody else can reach it."""

import socket
from collections import deque
from typing import Any, Generic, TypeVar

from kvtransfer.codec import Codec
from kvtransfer.errors import ProtocolError

SEND_TIMEOUT_S = 60.0
"""A rank reads between any two steps; one that has not for so long never will."""
_LENGTH_BYTES = 4

In = TypeVar("In")
Out = TypeVar("Out")


class RankLost(Exception):
    """The other end is gone, or silent for too long."""


class RankLink(Generic[In, Out]):
    """One end. Blocks, up to a limit; a frame that does not decode ends it like a lost rank."""

    def __init__(self, end: socket.socket, receives: Any, sends: Any) -> None:
        """`receives` and `sends` are unions of messages."""
        self._socket = end
        self._receives: Codec[In] = Codec(receives)
        self._sends: Codec[Out] = Codec(sends)
        self._arrived: deque[In] = deque()

    def send(self, message: Out) -> None:
        """Raises `RankLost`."""
        self.send_frame(self.encode(message))

    def encode(self, message: Out) -> bytes:
        """A frame that `send_frame` takes, on this link or on another of its kind."""
        frame = self._sends.encode([message])
        return len(frame).to_bytes(_LENGTH_BYTES, "little") + frame

    def send_frame(self, frame: bytes) -> None:
        """Raises `RankLost`."""
        self._socket.settimeout(SEND_TIMEOUT_S)
        try:
            self._socket.sendall(frame)
        except OSError as error:
            raise RankLost(f"it takes no orders: {error}") from error

    def receive(self, timeout_s: float | None) -> In:
        """The next message; None waits as long as the other end lives. Raises `RankLost`."""
        while not self._arrived:
            self._socket.settimeout(timeout_s)
            try:
                size = int.from_bytes(self._read(_LENGTH_BYTES), "little")
                if size > self._receives.max_frame_bytes:
                    raise RankLost(f"a frame of {size} bytes is too long")
                self._arrived.extend(self._receives.decode(self._read(size)))
            except TimeoutError as error:
                raise RankLost(f"no word from it for {timeout_s:g} s") from error
            except (OSError, ProtocolError) as error:
                raise RankLost(str(error)) from error
        return self._arrived.popleft()

    def close(self) -> None:
        self._socket.close()

    def _read(self, count: int) -> memoryview:
        data = bytearray(count)
        view = memoryview(data)
        at = 0
        while at < count:
            got = self._socket.recv_into(view[at:])
            if got == 0:
                raise RankLost("its end of the link is closed")
            at += got
        return view
