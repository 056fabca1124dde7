"""The framing of every ZMQ edge: one byte of protocol version, then a msgpack list of tagged structs. Between
the two, a sealed frame has the CRC-32 of the list, in little-endian order.

A frame is a list so that a step costs one message, whatever it has to send. Decoding is strict: it checks
types, bounds and list lengths, and raises nothing but `ProtocolError`.
"""

import zlib
from collections.abc import Callable
from typing import Annotated, Any, Generic, TypeVar

import msgspec

from kvtransfer.errors import ProtocolError, VersionMismatch

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 256 << 20
MAX_MESSAGES_PER_FRAME = 1 << 16
SEAL_BYTES = 4

Message = TypeVar("Message")
OnBad = Callable[[object, str], None]
"""Called with the content of a message that is not allowed (None: it cannot be read), and what is wrong with
it."""
_MALFORMED = (msgspec.MsgspecError, ValueError, OverflowError, RecursionError)
"""Beside msgspec's own errors, bad UTF-8 raises ValueError and deep nesting RecursionError."""


class Codec(Generic[Message]):
    """Encodes and decodes frames of one union of tagged structs: `Codec[Command](Command)`.

    `max_frame_bytes` bounds what is decoded, and what the socket accepts at all. `sealed`: a frame that was
    changed on its way is never taken for another that could have been sent.
    """

    def __init__(self, union: Any, max_frame_bytes: int = MAX_FRAME_BYTES, sealed: bool = False) -> None:
        self.max_frame_bytes = max_frame_bytes
        self._sealed = sealed
        bounded = Annotated[list[union], msgspec.Meta(max_length=MAX_MESSAGES_PER_FRAME)]
        self._decoder: msgspec.msgpack.Decoder[list[Message]] = msgspec.msgpack.Decoder(bounded)
        self._encoder = msgspec.msgpack.Encoder()
        self._one: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(union)

    def encode(self, messages: list[Message]) -> bytes:
        """One frame. Raises ProtocolError if it would be larger than the other side accepts."""
        payload = self._encoder.encode(messages)
        seal = zlib.crc32(payload).to_bytes(SEAL_BYTES, "little") if self._sealed else b""
        frame = bytes((PROTOCOL_VERSION,)) + seal + payload
        if len(frame) > self.max_frame_bytes:
            raise ProtocolError(f"a frame of {len(frame)} bytes is over the limit of {self.max_frame_bytes}")
        return frame

    def decode(self, frame: bytes | memoryview) -> list[Message]:
        """The messages of one frame. Raises ProtocolError (VersionMismatch for another version)."""
        payload = self._payload(frame)
        try:
            return self._decoder.decode(payload)
        except _MALFORMED as error:
            raise ProtocolError(f"malformed frame: {error}") from error

    def decode_each(self, frame: bytes | memoryview, on_bad: OnBad) -> list[Message]:
        """As `decode`, but a message that is not allowed costs the others of its frame nothing. Raises
        ProtocolError if none is allowed."""
        try:
            return self.decode(frame)
        except VersionMismatch:
            raise
        except ProtocolError:
            good: list[Message] = []
            for part in self._parts(frame):
                try:
                    good.append(self._one.decode(part))
                except _MALFORMED as error:
                    on_bad(_anything(part), str(error))
            if not good:
                raise
            return good

    def _parts(self, frame: bytes | memoryview) -> list[msgspec.Raw]:
        try:
            parts = msgspec.msgpack.decode(self._payload(frame), type=list[msgspec.Raw])
        except _MALFORMED as error:
            raise ProtocolError(f"malformed frame: {error}") from error
        return parts if len(parts) <= MAX_MESSAGES_PER_FRAME else []

    def _payload(self, frame: bytes | memoryview) -> memoryview:
        if len(frame) == 0:
            raise ProtocolError("empty frame")
        if len(frame) > self.max_frame_bytes:
            raise ProtocolError(f"a frame of {len(frame)} bytes is over the limit of {self.max_frame_bytes}")
        if frame[0] != PROTOCOL_VERSION:
            raise VersionMismatch(f"protocol version {frame[0]}, this side speaks {PROTOCOL_VERSION}")
        payload = memoryview(frame)[1:]
        if self._sealed:
            seal, payload = payload[:SEAL_BYTES], payload[SEAL_BYTES:]
            if zlib.crc32(payload).to_bytes(SEAL_BYTES, "little") != seal:
                raise ProtocolError("a frame was changed on its way")
        return payload


def _anything(part: msgspec.Raw) -> object:
    try:
        return msgspec.msgpack.decode(part)
    except _MALFORMED:
        return None
