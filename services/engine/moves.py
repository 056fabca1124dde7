"""Packs and unpacks beside the steps: on a GPU they run on a stream of their own, in the worker's context.

What orders the two streams is events, and the host waits for none of them:

    a pack     starts after the step that computed its tokens; its slot is handed over once it is done
    an unpack  starts after every step that was queued when its pages were taken, for those may still use
               them; its slot is given back, and its sequence may be computed with, once it is done
    a step     starts after a move that was given up while it ran, whose pages somebody else may have by now

Moves are done in the order in which they were queued. On a CPU each is done when the call returns.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from services.engine.errors import ChecksumMismatch
from services.engine.kv_pool import KvPool
from services.engine.ops.checksum import QueuedChecksum
from services.engine.segments import Slot, pack, unpack

Mark = torch.cuda.Event
"""A place in the steps' stream."""


@dataclass(frozen=True, slots=True, eq=False)
class Move:
    """A pack or an unpack of `byte_count` bytes that was handed to the device."""

    byte_count: int
    _done: Mark | None = None
    _checksum: QueuedChecksum | None = None

    @property
    def is_done(self) -> bool:
        """Asks the device, and does not wait for it."""
        return self._done is None or bool(self._done.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        if self._done is not None:
            self._done.synchronize()

    def checksum(self) -> int | None:
        """Of the slot's bytes, if it was asked for. Only of a move that is done."""
        return None if self._checksum is None else self._checksum.value()

    def judge(self, expected: int | None) -> None:
        """Compare what an unpack that is done has read with what the sender packed; None: nothing is known.

        Raises `ChecksumMismatch`.
        """
        found = self.checksum()
        if expected is not None and found != expected:
            was = "was not computed" if found is None else f"is {found:016x}"
            raise ChecksumMismatch(
                f"the checksum of {self.byte_count} bytes {was}, the sender packed {expected:016x}"
            )


class Moves:
    """The moves of one pool, whose steps run on what is the current stream here and whenever `mark` and
    `hold_steps` are called."""

    def __init__(self, pool: KvPool) -> None:
        self._pool = pool
        device = pool.data.device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def mark(self) -> Mark | None:
        """Passes when all steps queued so far are done. None on a CPU: they are."""
        return None if self._stream is None else _recorded(torch.cuda.current_stream(self._stream.device))

    def pack(
        self,
        pages: list[int],
        start_token: int,
        token_count: int,
        slot: Slot,
        with_checksum: bool,
        after: Mark | None,
        heads: range | None = None,
    ) -> Move:
        """See `segments.pack`. It starts when `after` has passed; None: when all queued steps are done."""
        with self._beside(after):
            byte_count, queued = pack(
                self._pool, pages, start_token, token_count, slot, with_checksum, heads
            )
        return Move(byte_count, self._recorded(), queued)

    def unpack(
        self,
        pages: list[int],
        start_token: int,
        token_count: int,
        slot: Slot,
        with_checksum: bool,
        after: Mark | None,
        heads: range | None = None,
    ) -> Move:
        """See `segments.unpack`, and `pack` for `after`."""
        with self._beside(after):
            byte_count, queued = unpack(
                self._pool, pages, start_token, token_count, slot, with_checksum, heads
            )
        return Move(byte_count, self._recorded(), queued)

    def hold_steps(self, move: Move) -> None:
        """Steps queued from now on start after this move."""
        if self._stream is not None and move._done is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(move._done)

    def _beside(self, after: Mark | None) -> AbstractContextManager[object]:
        """What is queued within runs beside the steps, after `after` or all that are queued."""
        mark = after or self.mark()
        if self._stream is None or mark is None:
            return nullcontext()
        self._stream.wait_event(mark)
        return torch.cuda.stream(self._stream)

    def _recorded(self) -> Mark | None:
        return None if self._stream is None else _recorded(self._stream)


def _recorded(stream: torch.cuda.Stream) -> Mark:
    event = Mark()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event
