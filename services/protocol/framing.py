"""Frames in a byte stream: four bytes of length, in little-endian order, before each frame. Pure.

What a frame holds is the codec's (kvtransfer/net/codec.py).
"""

from collections.abc import Iterator

from kvtransfer.errors import ProtocolError

LENGTH_BYTES = 4


class FrameTooLong(ProtocolError):
    """A length over the limit: a peer's mistake, or no frames at all. Nothing that follows it in the stream
    has a meaning."""


def with_length(frame: bytes) -> bytes:
    """A frame as it travels."""
    return len(frame).to_bytes(LENGTH_BYTES, "little") + frame


class FrameSplitter:
    """The frames of one stream, which arrives in pieces of any size."""

    def __init__(self, max_frame_bytes: int) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._partial = bytearray()
        self._needed_bytes = LENGTH_BYTES
        """How long `_partial` must be before another look at it can find anything."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The frames that `data` completes, to be taken to the end before the next piece is fed. Raises
        FrameTooLong after those that came before it."""
        partial = self._partial
        if partial:
            partial += data
            if len(partial) < self._needed_bytes:
                return
            data = bytes(partial)
            partial.clear()
        start, size = 0, len(data)
        self._needed_bytes = LENGTH_BYTES
        while size - start >= LENGTH_BYTES:
            frame_start = start + LENGTH_BYTES
            frame_bytes = int.from_bytes(data[start:frame_start], "little")
            if frame_bytes > self._max_frame_bytes:
                limit_bytes = self._max_frame_bytes
                raise FrameTooLong(f"a frame of {frame_bytes} bytes is over the limit of {limit_bytes}")
            end = frame_start + frame_bytes
            if end > size:
                self._needed_bytes = end - start
                break
            yield data[frame_start:end]
            start = end
        partial += data[start:]
