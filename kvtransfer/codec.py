"""The framing of every ZMQ edge: one byte of protocol version, then a msgpack list of tagged structs.

A list, so that a step costs one message however many things it says. Decoding is strict: types, bounds and
list lengths are checked while decoding, and nothing but `ProtocolError` comes out of it.
"""

from typing import Annotated, Any, Generic, TypeVar

import msgspec

from kvtransfer.errors import ProtocolError, VersionMismatch

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 256 << 20
MAX_MESSAGES_PER_FRAME = 1 << 16

Message = TypeVar("Message")


class Codec(Generic[Message]):
    """Encodes and decodes frames of one union of tagged structs: `Codec[Command](Command)`.

    `max_frame_bytes` bounds what is decoded, and what the socket accepts at all.
    """

    def __init__(self, union: Any, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self.max_frame_bytes = max_frame_bytes
        bounded = Annotated[list[union], msgspec.Meta(max_length=MAX_MESSAGES_PER_FRAME)]
        self._decoder: msgspec.msgpack.Decoder[list[Message]] = msgspec.msgpack.Decoder(bounded)
        self._encoder = msgspec.msgpack.Encoder()

    def encode(self, messages: list[Message]) -> bytes:
        """One frame. Raises ProtocolError if it would be larger than the other side accepts."""
        frame = bytes((PROTOCOL_VERSION,)) + self._encoder.encode(messages)
        if len(frame) > self.max_frame_bytes:
            raise ProtocolError(f"a frame of {len(frame)} bytes is over the limit of {self.max_frame_bytes}")
        return frame

    def decode(self, frame: bytes | memoryview) -> list[Message]:
        """The messages of one frame. Raises ProtocolError (VersionMismatch for another version)."""
        if len(frame) == 0:
            raise ProtocolError("empty frame")
        if len(frame) > self.max_frame_bytes:
            raise ProtocolError(f"a frame of {len(frame)} bytes is over the limit of {self.max_frame_bytes}")
        if frame[0] != PROTOCOL_VERSION:
            raise VersionMismatch(f"protocol version {frame[0]}, this side speaks {PROTOCOL_VERSION}")
        try:
            return self._decoder.decode(memoryview(frame)[1:])
        except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
            # Beside msgspec's own errors, bad UTF-8 raises ValueError and deep nesting RecursionError.
            raise ProtocolError(f"malformed frame: {error}") from error
