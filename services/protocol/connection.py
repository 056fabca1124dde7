"""A router's connection to one worker: `open_connection` takes what the endpoint needs.

`ipc://`: length-prefixed frames (framing.py) on a UNIX socket, read and written by the event loop itself.
libzmq would hand every frame to a thread of its own and back, and two switches of threads cost a request more
than all the router does for it. `tcp://`: libzmq, which has CURVE.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, cast

import zmq
import zmq.utils.monitor

from kvtransfer.net.channel import ChannelKeys, Codec, Link, decode_frame, split_endpoint
from kvtransfer.net.keys import require_private_directory
from services.protocol.framing import FrameSplitter, FrameTooLong, with_length
from services.protocol.messages import Report, Request

READABLE = int(zmq.POLLIN)
"""A plain int: the enum's own `&` costs more than asking ZMQ."""
MAX_UNSENT_BYTES = 64 << 20
"""Of a worker that does not read. One frame more is taken whole, whatever its size."""
RETRY_S = 0.02
RETRY_MAX_S = 0.5

OnReports = Callable[[list[Report]], None]
OnEnd = Callable[[], None]
OnDrop = Callable[[str], None]
OnMismatch = Callable[[str], None]
"""Another protocol version was spoken: which, and which is ours."""


class WorkerConnection(Protocol):
    """One connection, from the moment it is asked for.

    A worker that is not there yet is no error: it is tried again, and what was sent until then waits. Inside
    the loop `on_reports` gets what arrives, one call for each wake-up, and `on_end` is called when the
    connection has ended, after all that came before; both may close the connection.
    """

    def send(self, messages: list[Request]) -> bool:
        """One frame. False: too much waits to be sent. Raises ProtocolError if it is too large."""

    def close(self) -> None:
        """Drops what is unsent; no callback follows. Idempotent."""


def open_connection(
    endpoint: str,
    keys: ChannelKeys | None,
    *,
    on_reports: OnReports,
    on_mismatch: OnMismatch,
    on_end: OnEnd,
    on_drop: OnDrop,
) -> WorkerConnection:
    """In the running loop. Raises TransferConfigError for a bad endpoint or missing keys."""
    if split_endpoint(endpoint)[0] == "ipc":
        return UnixConnection(endpoint, on_reports, on_mismatch, on_end, on_drop)
    return ZmqConnection(endpoint, keys, on_reports, on_mismatch, on_end, on_drop)


class UnixConnection(asyncio.Protocol):
    """Length-prefixed frames on a UNIX socket."""

    def __init__(
        self,
        endpoint: str,
        on_reports: OnReports,
        on_mismatch: OnMismatch,
        on_end: OnEnd,
        on_drop: OnDrop,
    ) -> None:
        self._path = endpoint.removeprefix("ipc://")
        require_private_directory(Path(self._path).parent, f"endpoint {endpoint}")
        self._on_reports, self._on_end, self._on_drop = on_reports, on_end, on_drop
        self._on_mismatch = on_mismatch
        self._receives, self._sends = Codec[Report](Report), Codec[Request](Request)
        self._frames = FrameSplitter(self._receives.max_frame_bytes)
        self._transport: asyncio.Transport | None = None
        self._unsent = bytearray()
        """Before there is a connection."""
        self._is_full = self._is_closed = False
        self._connecting = asyncio.get_running_loop().create_task(self._connect())

    def send(self, messages: list[Request]) -> bool:
        data = with_length(self._sends.encode(messages))
        transport = self._transport
        if transport is None:
            if len(self._unsent) > MAX_UNSENT_BYTES:
                return False
            self._unsent += data
            return True
        if self._is_full or transport.is_closing():
            return False
        transport.write(data)
        return True

    def close(self) -> None:
        self._is_closed = True
        self._connecting.cancel()
        if self._transport is not None:
            self._transport.abort()

    async def _connect(self) -> None:
        loop, pause_s = asyncio.get_running_loop(), RETRY_S
        while True:
            try:
                await loop.create_unix_connection(lambda: self, self._path)
                return
            except OSError:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, RETRY_MAX_S)

    # -- called by the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = opened = cast(asyncio.Transport, transport)
        if self._is_closed:  # while it was being opened
            opened.abort()
            return
        opened.set_write_buffer_limits(high=MAX_UNSENT_BYTES)
        if self._unsent:
            opened.write(bytes(self._unsent))
            self._unsent.clear()

    def pause_writing(self) -> None:
        self._is_full = True

    def resume_writing(self) -> None:
        self._is_full = False

    def data_received(self, data: bytes) -> None:
        reports: list[Report] = []
        is_stream_broken = False
        try:
            for frame in self._frames.feed(data):
                reports += self._decode(frame)
        except FrameTooLong:
            self._on_drop("oversized_frame")
            is_stream_broken = True
        if reports and not self._is_closed:
            self._on_reports(reports)
        if is_stream_broken and self._transport is not None:
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        if not self._is_closed:
            self._on_end()

    def _decode(self, frame: bytes) -> list[Report]:
        return decode_frame(self._receives, [frame], self._on_drop, self._on_mismatch, self._on_bad) or []

    def _on_bad(self, said: object, why: str) -> None:
        """A report that is none costs the others of its frame nothing."""
        self._on_drop("malformed_report")


def _descriptor(socket: "zmq.Socket[bytes]") -> int:
    return int(socket.getsockopt(zmq.FD))


class ZmqConnection:
    """libzmq's DEALER, whose descriptors the loop watches."""

    def __init__(
        self,
        endpoint: str,
        keys: ChannelKeys | None,
        on_reports: OnReports,
        on_mismatch: OnMismatch,
        on_end: OnEnd,
        on_drop: OnDrop,
    ) -> None:
        self._on_reports, self._on_mismatch, self._on_end = on_reports, on_mismatch, on_end
        receives, sends = Codec[Report](Report), Codec[Request](Request)
        self._link = Link(
            endpoint,
            receives,
            sends,
            keys=keys,
            on_drop=on_drop,
            on_bad=lambda said, why: on_drop("malformed_report"),
        )
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._monitor: zmq.Socket[bytes] = self._link.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._loop.add_reader(_descriptor(self._link.socket), self._receive)
        self._loop.add_reader(_descriptor(self._monitor), self._on_monitor)
        # A ZMQ descriptor only tells of a change after somebody has looked and found nothing.
        self._loop.call_soon(self._on_monitor)

    def send(self, messages: list[Request]) -> bool:
        sent = self._link.send(messages)
        # ZMQ's descriptor is edge-triggered and sending may swallow the edge of something that arrived.
        if self._link.pending():
            self._loop.call_soon(self._receive)
        return sent

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(_descriptor(self._link.socket))
        self._loop.remove_reader(_descriptor(self._monitor))
        self._link.socket.disable_monitor()
        self._monitor.close(linger=0)
        self._link.close()

    def _receive(self) -> None:
        if self._closed:
            return
        reports = self._link.receive()
        if self._link.mismatch:
            self._on_mismatch(self._link.mismatch)
        if self._closed or not reports:
            return
        self._on_reports(reports)
        # One batch a turn, so that a flood of frames does not starve the HTTP side.
        if not self._closed and self._link.pending():
            self._loop.call_soon(self._receive)

    def _on_monitor(self) -> None:
        ended = False
        while not self._closed and int(self._monitor.getsockopt(zmq.EVENTS)) & READABLE:
            zmq.utils.monitor.recv_monitor_message(self._monitor, zmq.NOBLOCK)
            ended = True
        if not ended:
            return
        # Frames that came before the end still count: a last `Failed` says more than "lost".
        while not self._closed and self._link.pending():
            self._receive()
        if not self._closed:
            self._on_end()
