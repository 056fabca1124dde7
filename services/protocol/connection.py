"""How frames travel between a router and one worker: `open_wire` takes what the endpoint needs.

`ipc://`: ZMTP on a UNIX socket, read and written by the event loop itself. libzmq would hand every frame to a
thread of its own and back, and two switches of threads cost a request more than all the router does for it.
`tcp://`: libzmq, which has CURVE.
"""

import asyncio
import socket as sockets
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import zmq
import zmq.utils.monitor

from kvtransfer.errors import ProtocolError, TransferConfigError, VersionMismatch
from kvtransfer.net.channel import ChannelKeys, Codec, Link
from kvtransfer.net.keys import require_private_directory
from services.protocol.messages import Report, Request
from services.protocol.zmtp import GREETING, READY, Incoming, ZmtpError, message

READABLE = int(zmq.POLLIN)
"""A plain int: the enum's own `&` costs more than asking ZMQ."""
RECEIVE_BYTES = 1 << 18
"""At once: when tokens come faster than they are written, each stream's go out together."""
MAX_UNSENT_BYTES = 64 << 20
"""Of a worker that does not read. One frame more is taken whole, whatever its size."""
RETRY_S = 0.02
RETRY_MAX_S = 0.5

OnReports = Callable[[list[Report]], None]
OnEnd = Callable[[], None]
OnDrop = Callable[[str], None]
OnMismatch = Callable[[str], None]
"""Another protocol version was spoken: which, and which is ours."""


class Wire(Protocol):
    """One connection, from the moment it is asked for.

    A worker that is not there yet is no error: it is tried again, and what was sent until then waits. Inside
    the loop `on_reports` gets what arrives, one call for each wake-up, and `on_end` is called when the
    connection has ended, after all that came before; it may close the wire, and so may `on_reports`.
    """

    def send(self, messages: list[Request]) -> bool:
        """One frame. False: too much waits to be sent. Raises ProtocolError if it is too large."""

    def poll(self) -> None:
        """Takes what has arrived already, before the loop comes round to it."""

    def close(self) -> None:
        """Drops what is unsent; no callback follows. Idempotent."""


def open_wire(
    endpoint: str,
    keys: ChannelKeys | None,
    *,
    on_reports: OnReports,
    on_mismatch: OnMismatch,
    on_end: OnEnd,
    on_drop: OnDrop,
) -> Wire:
    """In the running loop. Raises TransferConfigError for a bad endpoint or missing keys."""
    if endpoint.startswith("ipc:///"):
        return UnixWire(endpoint, on_reports, on_mismatch, on_end, on_drop)
    return ZmqWire(endpoint, keys, on_reports, on_mismatch, on_end, on_drop)


class UnixWire:
    """ZMTP on a UNIX socket."""

    def __init__(
        self,
        endpoint: str,
        on_reports: OnReports,
        on_mismatch: OnMismatch,
        on_end: OnEnd,
        on_drop: OnDrop,
    ) -> None:
        self._path = endpoint.removeprefix("ipc://")
        try:
            require_private_directory(Path(self._path).parent, f"endpoint {endpoint}")
        except OSError as error:
            raise TransferConfigError(f"endpoint {endpoint}: {error}") from error
        self._on_reports, self._on_end, self._on_drop = on_reports, on_end, on_drop
        self._on_mismatch = on_mismatch
        self._receives, self._sends = Codec[Report](Report), Codec[Request](Request)
        self._loop = asyncio.get_running_loop()
        self._socket: sockets.socket | None = None
        # `recv` would take as much memory anew each time.
        self._received = memoryview(bytearray(RECEIVE_BYTES))
        self._incoming = Incoming(self._receives.max_frame_bytes)
        self._unsent = bytearray()
        """Before the handshake's end: all. Afterwards what the socket's buffer had no room for."""
        self._is_writing = False
        self._retry_s = RETRY_S
        self._retry: asyncio.TimerHandle | None = None
        self._connect()

    def send(self, messages: list[Request]) -> bool:
        data = message(self._sends.encode(messages))
        if len(self._unsent) > MAX_UNSENT_BYTES:
            return False
        if self._incoming.ready and not self._unsent:
            sent = self._write(data)
            if sent == len(data):
                return True
            data = data[sent:]
        self._unsent += data
        if self._incoming.ready:
            self._await_room()
        return True

    def close(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        connection, self._socket = self._socket, None
        if connection is None:
            return
        self._loop.remove_reader(connection.fileno())
        if self._is_writing:
            self._loop.remove_writer(connection.fileno())
        connection.close()

    def _connect(self) -> None:
        self._retry = None
        connection = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
        connection.setblocking(False)
        try:
            # A UNIX socket is connected at once or not at all.
            connection.connect(self._path)
            connection.sendall(GREETING + READY)
        except OSError:
            connection.close()
            self._retry = self._loop.call_later(self._retry_s, self._connect)
            self._retry_s = min(2 * self._retry_s, RETRY_MAX_S)
            return
        self._socket = connection
        self._loop.add_reader(connection.fileno(), self.poll)

    def poll(self) -> None:
        connection = self._socket
        if connection is None:
            return
        try:
            data = self._received[: connection.recv_into(self._received)].tobytes()
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self._end()
            return
        was_ready = self._incoming.ready
        try:
            bodies = self._incoming.feed(data)
        except ZmtpError:
            self._on_drop("malformed_frame")
            self._end()
            return
        if not was_ready and self._incoming.ready and self._unsent:
            self._await_room()
        reports: list[Report] = []
        for body in bodies:
            try:
                reports += self._receives.decode_each(body, self._on_bad)
            except VersionMismatch as error:
                self._on_drop("other_version")
                self._on_mismatch(str(error))
            except ProtocolError:
                self._on_drop("malformed_frame")
        if reports:
            self._on_reports(reports)

    def _on_bad(self, said: object, why: str) -> None:
        """A report that is none costs the others of its frame nothing."""
        self._on_drop("malformed_report")

    def _write(self, data: bytes | bytearray) -> int:
        """How many bytes the socket took. An end of the connection is the reader's to find."""
        if self._socket is None:
            return 0
        try:
            return self._socket.send(data)
        except OSError:
            return 0

    def _await_room(self) -> None:
        if self._socket is not None and not self._is_writing:
            self._is_writing = True
            self._loop.add_writer(self._socket.fileno(), self._on_writable)

    def _on_writable(self) -> None:
        del self._unsent[: self._write(self._unsent)]
        if not self._unsent and self._socket is not None:
            self._is_writing = False
            self._loop.remove_writer(self._socket.fileno())

    def _end(self) -> None:
        self.close()
        self._on_end()


def _descriptor(socket: "zmq.Socket[bytes]") -> int:
    return int(socket.getsockopt(zmq.FD))


class ZmqWire:
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
        self._loop.add_reader(_descriptor(self._link.socket), self.poll)
        self._loop.add_reader(_descriptor(self._monitor), self._on_monitor)
        # A ZMQ descriptor only tells of a change after somebody has looked and found nothing.
        self._loop.call_soon(self._on_monitor)

    def send(self, messages: list[Request]) -> bool:
        sent = self._link.send(messages)
        # ZMQ's descriptor is edge-triggered and sending may swallow the edge of something that arrived.
        if self._link.pending():
            self._loop.call_soon(self.poll)
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

    def poll(self) -> None:
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
            self._loop.call_soon(self.poll)

    def _on_monitor(self) -> None:
        ended = False
        while not self._closed and int(self._monitor.getsockopt(zmq.EVENTS)) & READABLE:
            zmq.utils.monitor.recv_monitor_message(self._monitor, zmq.NOBLOCK)
            ended = True
        if not ended:
            return
        # Frames that came before the end still count: a last `Failed` says more than "lost".
        while not self._closed and self._link.pending():
            self.poll()
        if not self._closed:
            self._on_end()
