"""ZMTP 3.0 with the NULL mechanism (RFC 23), the side that connects: bytes to frames and back. Pure.

A DEALER that talks to one ROUTER needs a greeting, one command, and frames of one part.
"""

import struct

_GREETING_BYTES = 64
_SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
_MAJOR = 3
_MECHANISM = b"NULL".ljust(20, b"\0")
_MORE, _LONG, _COMMAND = 1, 2, 4
_SHORT_BYTES = 255
_READY = b"\x05READY"
_SOCKET_TYPE = b"\x0bSocket-Type\x00\x00\x00\x06DEALER"

GREETING = _SIGNATURE + bytes((_MAJOR, 0)) + _MECHANISM + bytes(32)
"""Major and minor version, mechanism, not a server, filler."""
READY = bytes((_COMMAND, len(_READY) + len(_SOCKET_TYPE))) + _READY + _SOCKET_TYPE


class ZmtpError(RuntimeError):
    """What arrived is not ZMTP 3 as spoken here; nothing that follows on the connection has a meaning."""


def message(body: bytes) -> bytes:
    """A message of one part, as it travels."""
    size = len(body)
    if size > _SHORT_BYTES:
        return struct.pack(">BQ", _LONG, size) + body
    return bytes((0, size)) + body


class Incoming:
    """What a peer sends on one connection, in pieces of any size. `ready`: its handshake is complete, and
    messages may be sent to it."""

    def __init__(self, max_message_bytes: int) -> None:
        self._max_message_bytes = max_message_bytes
        self._held = bytearray()
        self._needed_bytes = _GREETING_BYTES
        self._greeted = False
        self._in_parts = False
        self.ready = False

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies of the messages that are now complete. One of several parts, which nobody here sends,
        counts as one without any content. Raises ZmtpError."""
        held = self._held
        if held:
            held += data
            if len(held) < self._needed_bytes:
                return []
            data = bytes(held)
            held.clear()
        bodies: list[bytes] = []
        at = 0
        if not self._greeted and len(data) >= _GREETING_BYTES:
            self._check_greeting(data)
            at = _GREETING_BYTES
        while self._greeted:
            head = self._head(data, at)
            if head is None:
                self._needed_bytes = 2
                break
            flags, start, end = head
            if end > len(data):
                self._needed_bytes = end - at
                break
            body, at = data[start:end], end
            if flags & _COMMAND:
                self._on_command(body)
            elif not self.ready:
                raise ZmtpError("a message before the handshake's end")
            elif flags & _MORE:
                self._in_parts = True
            else:
                bodies.append(b"" if self._in_parts else body)
                self._in_parts = False
        held += data[at:]
        return bodies

    def _check_greeting(self, data: bytes) -> None:
        # Bytes 1 to 8 of the signature are padding, in which older versions find a length.
        if data[0] != 0xFF or data[9] != 0x7F or data[10] < _MAJOR:
            raise ZmtpError("the greeting is not one of ZMTP 3")
        if data[12:32] != _MECHANISM:
            raise ZmtpError("the peer wants another mechanism than NULL")
        self._greeted = True

    def _head(self, data: bytes, at: int) -> tuple[int, int, int] | None:
        """Flags, start and end of the frame at `at`; None while its head is not there."""
        if len(data) < at + 2:
            return None
        flags = data[at]
        if not flags & _LONG:
            return flags, at + 2, at + 2 + data[at + 1]
        if len(data) < at + 9:
            return None
        size: int = struct.unpack_from(">Q", data, at + 1)[0]
        if size > self._max_message_bytes:
            raise ZmtpError(f"a frame of {size} bytes")
        return flags, at + 9, at + 9 + size

    def _on_command(self, body: bytes) -> None:
        if body.startswith(b"\x05ERROR"):
            raise ZmtpError(f"the peer refuses: {body[7:]!r}")
        if body.startswith(_READY):
            self.ready = True
