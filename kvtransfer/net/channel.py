"""ZMQ sockets for every edge: `Server` (ROUTER, bound) and `Link` (DEALER, connected).

Nothing here ever blocks, and nothing that arrives ever raises: a socket drops frames that do not decode, and
reports them through `on_drop(reason)`. `ipc://` paths lie in a directory of mode 0700 that is ours; `tcp://`
is refused without CURVE keys and an allow-list (see keys.py).

Both poll with `zmq.Poller` on `.socket`. A `Link` reconnects by itself and keeps up to its high-water mark
of frames for a server that is not there: its user must cope with a restarted server (epochs do that).
"""

import contextlib
import errno
import socket as sockets
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import zmq
from zmq.auth.thread import ThreadAuthenticator

from kvtransfer.errors import ProtocolError, TransferConfigError, VersionMismatch
from kvtransfer.net.codec import Codec, OnBad
from kvtransfer.net.keys import ChannelKeys, require_private_directory, write_new_keys

__all__ = ["ChannelKeys", "Codec", "Link", "Server", "write_new_keys"]

HIGH_WATER_FRAMES = 4096
FRAMES_PER_RECEIVE = 256
MAX_IPC_PATH_BYTES = 107
RECONNECT_MS = 20
RECONNECT_MAX_MS = 500
_EVENTS, _READABLE, _NOBLOCK = int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.NOBLOCK)
"""Plain ints: the enums' own `&` and conversions cost more than asking ZMQ."""
NEEDS_KEYS = "tcp:// needs CURVE keys and an allow-list (key_dir)"

In = TypeVar("In")
Out = TypeVar("Out")
DropReport = Callable[[str], None]


def split_endpoint(endpoint: str) -> tuple[str, str, str]:
    """`(scheme, address without fragment, key name or "")`. Raises TransferConfigError."""
    scheme, separator, rest = endpoint.partition("://")
    if not separator or not rest or scheme not in ("ipc", "tcp"):
        raise TransferConfigError(f"endpoint {endpoint!r}: must be ipc:///path or tcp://host:port")
    if scheme == "ipc":
        if len(rest.encode()) > MAX_IPC_PATH_BYTES:
            raise TransferConfigError(f"endpoint {endpoint!r}: path over {MAX_IPC_PATH_BYTES} bytes")
        if not rest.startswith("/"):
            raise TransferConfigError(f"endpoint {endpoint!r}: the path must be absolute")
        return scheme, endpoint, ""
    address, _, key_name = endpoint.partition("#")
    return scheme, address, key_name


def _new_socket(context: "zmq.Context[Any]", kind: int, limit_bytes: int) -> "zmq.Socket[bytes]":
    socket: zmq.Socket[bytes] = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_FRAMES)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_FRAMES)
    socket.setsockopt(zmq.MAXMSGSIZE, limit_bytes)
    socket.setsockopt(zmq.HANDSHAKE_IVL, 10_000)
    return socket


def claim_ipc_path(endpoint: str) -> Path:
    """The path of an `ipc://` endpoint that nobody listens at. A live listener must not be shadowed: libzmq
    would silently unlink its path and take it over."""
    path = Path(endpoint.removeprefix("ipc://"))
    require_private_directory(path.parent, f"endpoint {endpoint}")
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
                return path
            raise TransferConfigError(f"endpoint {endpoint}: {error}") from error
    raise TransferConfigError(f"endpoint {endpoint}: another process is listening there")


def decode_frame(
    codec: Codec[In],
    parts: list[bytes],
    on_drop: DropReport,
    on_mismatch: Callable[[str], None],
    on_bad: OnBad | None = None,
) -> list[In] | None:
    if len(parts) != 1:
        on_drop("malformed_frame")
        return None
    try:
        return codec.decode(parts[0]) if on_bad is None else codec.decode_each(parts[0], on_bad)
    except VersionMismatch as error:
        on_drop("other_version")
        on_mismatch(str(error))
    except ProtocolError:
        on_drop("malformed_frame")
    return None


class Server(Generic[In, Out]):
    """A bound ROUTER. A peer is named by the opaque id its connection has; a reconnect is a new peer.

    Raises TransferConfigError if the endpoint cannot be bound, is not private, or lacks keys.
    """

    def __init__(
        self,
        endpoint: str,
        receives: Codec[In],
        sends: Codec[Out],
        *,
        keys: ChannelKeys | None = None,
        on_drop: DropReport,
        refusal: Callable[[str], Out] | None = None,
        on_bad: Callable[[bytes, object, str], None] | None = None,
    ) -> None:
        """`refusal(why)` answers a frame of another protocol version: its sender cannot read the answer, but
        sees our version in front of it. `on_bad(peer, message, why)` gets messages that are not allowed, and
        the others of their frame count; without it such a frame is dropped as a whole."""
        scheme, address, _ = split_endpoint(endpoint)
        self._receives, self._sends, self._on_drop, self._refusal = receives, sends, on_drop, refusal
        self._on_bad = on_bad
        self._ipc_path = claim_ipc_path(address) if scheme == "ipc" else None
        if scheme == "tcp" and keys is None:
            raise TransferConfigError(f"endpoint {endpoint}: {NEEDS_KEYS}")
        # A context of its own: closing it is synchronous, so a successor can bind the same path at once,
        # and the authenticator (one per context) guards this socket only.
        self._context: zmq.Context[Any] = zmq.Context()
        self._authenticator: ThreadAuthenticator | None = None
        self.socket = _new_socket(self._context, zmq.ROUTER, receives.max_frame_bytes)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            if scheme == "tcp" and keys is not None:
                self._authenticator = ThreadAuthenticator(self._context)
                self._authenticator.start()
                self._authenticator.configure_curve(domain="*", location=str(keys.allowed_dir))
                self.socket.curve_server = True
                self.socket.curve_publickey = keys.public
                self.socket.curve_secretkey = keys.secret
            self.socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            raise TransferConfigError(f"endpoint {endpoint} cannot be bound: {error}") from error
        bound = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.endpoint: str = f"{bound}#{keys.name}" if scheme == "tcp" and keys is not None else bound

    def receive(self) -> list[tuple[bytes, list[In]]]:
        """The messages that have arrived, as `(peer, messages)`, oldest first; at most 256 frames a call."""
        arrived: list[tuple[bytes, list[In]]] = []
        for _ in range(FRAMES_PER_RECEIVE):
            try:
                peer, *parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.ZMQError as error:
                if error.errno in (zmq.EAGAIN, errno.EINTR):
                    break
                raise
            mismatches: list[str] = []
            on_bad = None if self._on_bad is None else partial(self._on_bad, peer)
            messages = decode_frame(self._receives, parts, self._on_drop, mismatches.append, on_bad)
            if messages is not None:
                arrived.append((peer, messages))
            elif mismatches and self._refusal is not None:
                self.send(peer, [self._refusal(mismatches[0])])
        return arrived

    def send(self, peer: bytes, messages: list[Out]) -> bool:
        """One frame to `peer`. False: the peer is gone, or its queue is full."""
        try:
            self.socket.send_multipart([peer, self._sends.encode(messages)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                return False
            raise
        return True

    def close(self) -> None:
        """Drops what is unsent, closes the socket and removes the `ipc://` path. Idempotent."""
        if self._context.closed:
            return
        self.socket.close(linger=0)
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.term()
        if self._ipc_path is not None:
            self._ipc_path.unlink(missing_ok=True)


class Link(Generic[In, Out]):
    """A connected DEALER. Raises TransferConfigError for a bad endpoint or missing keys.

    A server that is not there yet is no error: the socket goes on trying, with growing pauses.
    """

    def __init__(
        self,
        endpoint: str,
        receives: Codec[In],
        sends: Codec[Out],
        *,
        keys: ChannelKeys | None = None,
        on_drop: DropReport,
        on_bad: OnBad | None = None,
    ) -> None:
        """`on_bad`: as `Server`'s."""
        self._on_bad = on_bad
        scheme, address, key_name = split_endpoint(endpoint)
        if scheme == "ipc":
            parent = Path(address.removeprefix("ipc://")).parent
            require_private_directory(parent, f"endpoint {endpoint}")
        elif keys is None:
            raise TransferConfigError(f"endpoint {endpoint}: {NEEDS_KEYS}")
        self.endpoint = endpoint
        self.mismatch = ""
        """Which other protocol version the server has spoken, if it has, and ours."""
        self._receives, self._sends, self._on_drop = receives, sends, on_drop
        context: zmq.Context[Any] = zmq.Context.instance()
        self.socket = _new_socket(context, zmq.DEALER, receives.max_frame_bytes)
        self.socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        self.socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        try:
            if scheme == "tcp" and keys is not None:
                self.socket.curve_serverkey = keys.server_key(key_name or keys.name)
                self.socket.curve_publickey = keys.public
                self.socket.curve_secretkey = keys.secret
            self.socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise TransferConfigError(f"endpoint {endpoint} cannot be connected: {error}") from error
        except TransferConfigError:
            self.close()
            raise

    def pending(self) -> bool:
        """Whether a frame is there to be received. Only a look that finds none arms the descriptor again."""
        return bool(int(self.socket.get(_EVENTS)) & _READABLE)

    def receive(self) -> list[In]:
        """All messages that have arrived, oldest first; at most 256 frames a call."""
        arrived: list[In] = []
        for _ in range(FRAMES_PER_RECEIVE):
            # Cheaper than one call too many: that ends in an exception.
            if not self.pending():
                break
            parts = self.socket.recv_multipart(_NOBLOCK)
            messages = decode_frame(self._receives, parts, self._on_drop, self._note_mismatch, self._on_bad)
            if messages is not None:
                arrived.extend(messages)
        return arrived

    def _note_mismatch(self, what: str) -> None:
        self.mismatch = what

    def send(self, messages: list[Out]) -> bool:
        """One frame. False: the queue is full (the server has been away for long)."""
        try:
            self.socket.send(self._sends.encode(messages), _NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno == zmq.EAGAIN:
                return False
            raise
        return True

    def close(self) -> None:
        """Drops what is unsent. Idempotent."""
        with contextlib.suppress(zmq.ZMQError):
            self.socket.close(linger=0)
