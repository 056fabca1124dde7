"""The worker's side of its connections to routers: `open_server` takes what the endpoint needs.

`ipc://`: `FrameServer`, a UNIX socket with length-prefixed frames (framing.py). `tcp://`: libzmq's ROUTER,
which has CURVE (kvtransfer/net/channel.py). Both have `receive`, `send`, `close`, and a `socket` for
`zmq.Poller`.
"""

import select
import socket as sockets
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

from kvtransfer.errors import TransferConfigError
from kvtransfer.net.channel import (
    ChannelKeys,
    Codec,
    DropReport,
    Server,
    claim_ipc_path,
    decode_frame,
    split_endpoint,
)
from services.protocol.framing import FrameSplitter, FrameTooLong, with_length
from services.protocol.messages import Refusal, Report, Request

MAX_UNSENT_BYTES = 64 << 20
"""For a router that does not read. One frame more is taken whole, whatever its size."""
READ_BYTES = 1 << 18
READ_BYTES_PER_TURN = 4 << 20
"""From each router, so that one that sends without end does not keep the worker from its steps."""
BACKLOG = 128
SOCKET_MODE = 0o600

OnEnd = Callable[[bytes], None]
"""A peer's connection has ended: whose."""
In = TypeVar("In")
Out = TypeVar("Out")
OnBadMessage = Callable[[bytes, object, str], None]
"""Whose it is, what it says (None: it cannot be read at all), and what is wrong with it."""


def open_server(
    endpoint: str,
    keys: ChannelKeys | None,
    *,
    on_drop: DropReport,
    on_bad: OnBadMessage,
    on_end: OnEnd,
) -> "FrameServer[Request, Report] | Server[Request, Report]":
    """Listens. Raises TransferConfigError if the endpoint cannot be bound, is not private, or lacks keys."""
    receives, sends = Codec[Request](Request), Codec[Report](Report)
    if split_endpoint(endpoint)[0] == "ipc":
        return FrameServer(
            endpoint, receives, sends, refusal=Refusal, on_drop=on_drop, on_bad=on_bad, on_end=on_end
        )
    return Server(endpoint, receives, sends, keys=keys, refusal=Refusal, on_drop=on_drop, on_bad=on_bad)


@dataclass(slots=True, eq=False)
class _FramePeer:
    name: bytes
    socket: sockets.socket
    frames: FrameSplitter
    unsent: bytearray = field(default_factory=bytearray)
    """What the socket's buffer had no room for."""


class FrameServer(Generic[In, Out]):
    """A UNIX socket with length-prefixed frames, for a loop that polls. A peer is named by an id of its
    connection; a reconnect is a new peer.

    Nothing here ever blocks, and nothing that arrives raises. A frame that does not decode is dropped and
    reported through `on_drop(reason)`; one that is too long ends the connection, after a refusal.
    `on_end(peer)`: its connection has ended; what it sent before is in what the same `receive` returns.
    `refusal` and `on_bad` are as in `kvtransfer.net.channel.Server`.

    Raises TransferConfigError if the endpoint cannot be bound or is not private.
    """

    def __init__(
        self,
        endpoint: str,
        receives: Codec[In],
        sends: Codec[Out],
        *,
        on_drop: DropReport,
        on_end: OnEnd = lambda peer: None,
        refusal: Callable[[str], Out] | None = None,
        on_bad: OnBadMessage | None = None,
    ) -> None:
        self.endpoint = endpoint
        self._receives, self._sends = receives, sends
        self._on_drop, self._on_end, self._refusal, self._on_bad = on_drop, on_end, refusal, on_bad
        self._peers: dict[bytes, _FramePeer] = {}
        self._peer_at: dict[int, _FramePeer] = {}
        """By the descriptor of its socket."""
        self._peers_so_far = 0
        self._path = claim_ipc_path(split_endpoint(endpoint)[1])
        self._listener = _listen(self._path, endpoint)
        self.socket = select.epoll()
        """Readable as soon as anything is to be done; `receive` does it."""
        self.socket.register(self._listener, select.EPOLLIN)

    def receive(self) -> list[tuple[bytes, list[In]]]:
        """What has arrived, as `(peer, messages)`, the oldest of each peer first. Also accepts who connects,
        and sends on what waits for room."""
        arrived: list[tuple[bytes, list[In]]] = []
        for descriptor, events in self.socket.poll(0):
            peer = self._peer_at.get(descriptor)
            if peer is None:
                if descriptor == self._listener.fileno():
                    self._accept()
                continue
            if events & select.EPOLLOUT:
                self._send_unsent(peer)
            if events & ~select.EPOLLOUT:
                self._read(peer, arrived)
        return arrived

    def send(self, peer: bytes, messages: list[Out]) -> bool:
        """One frame to `peer`. False: the peer is gone, or too much waits for it. Raises ProtocolError if the
        frame is too large."""
        to = self._peers.get(peer)
        if to is None or len(to.unsent) > MAX_UNSENT_BYTES:
            return False
        data = with_length(self._sends.encode(messages))
        if to.unsent:
            to.unsent += data
            return True
        sent_bytes = _send_some(to.socket, data)
        if sent_bytes is None:
            return False
        if sent_bytes < len(data):
            to.unsent += data[sent_bytes:]
            self.socket.modify(to.socket, select.EPOLLIN | select.EPOLLOUT)
        return True

    def close(self) -> None:
        """Drops what is unsent, ends every connection and removes the socket's path. Idempotent."""
        if self.socket.closed:
            return
        self.socket.close()
        for peer in self._peers.values():
            peer.socket.close()
        self._peers.clear()
        self._peer_at.clear()
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError:
                self._on_drop("connection_not_accepted")
                return
            connection.setblocking(False)
            self._peers_so_far += 1
            name = self._peers_so_far.to_bytes(5, "big")
            peer = _FramePeer(name, connection, FrameSplitter(self._receives.max_frame_bytes))
            self._peers[name] = self._peer_at[connection.fileno()] = peer
            self.socket.register(connection, select.EPOLLIN)

    def _read(self, peer: _FramePeer, arrived: list[tuple[bytes, list[In]]]) -> None:
        taken_bytes = 0
        while taken_bytes < READ_BYTES_PER_TURN:
            try:
                data = peer.socket.recv(READ_BYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._end(peer)
                return
            taken_bytes += len(data)
            try:
                for frame in peer.frames.feed(data):
                    self._take_frame(peer, frame, arrived)
            except FrameTooLong as error:
                self._on_drop("oversized_frame")
                self._refuse(peer, str(error))
                self._end(peer)
                return

    def _take_frame(self, peer: _FramePeer, frame: bytes, arrived: list[tuple[bytes, list[In]]]) -> None:
        mismatches: list[str] = []
        on_bad = None if self._on_bad is None else partial(self._on_bad, peer.name)
        messages = decode_frame(self._receives, [frame], self._on_drop, mismatches.append, on_bad)
        if messages is not None:
            arrived.append((peer.name, messages))
        elif mismatches:
            self._refuse(peer, mismatches[0])

    def _refuse(self, peer: _FramePeer, why: str) -> None:
        if self._refusal is not None:
            self.send(peer.name, [self._refusal(why)])

    def _send_unsent(self, peer: _FramePeer) -> None:
        del peer.unsent[: _send_some(peer.socket, peer.unsent) or 0]
        if not peer.unsent:
            self.socket.modify(peer.socket, select.EPOLLIN)

    def _end(self, peer: _FramePeer) -> None:
        del self._peers[peer.name], self._peer_at[peer.socket.fileno()]
        peer.socket.close()  # which takes it out of the epoll set, too
        self._on_end(peer.name)


def _listen(path: Path, endpoint: str) -> sockets.socket:
    listener = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
    try:
        if path.is_socket():  # of a worker that was killed
            path.unlink()
        listener.bind(str(path))
        path.chmod(SOCKET_MODE)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise TransferConfigError(f"endpoint {endpoint} cannot be bound: {error}") from error
    listener.setblocking(False)
    return listener


def _send_some(socket: sockets.socket, data: bytes | bytearray) -> int | None:
    """How many bytes the socket took. None: the other end is gone, which the next read finds, too."""
    try:
        return socket.send(data)
    except BlockingIOError:
        return 0
    except OSError:
        return None
