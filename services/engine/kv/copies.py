"""Packs and unpacks beside the steps: on a GPU they run on a stream of their own, in the worker's context.

What orders the two streams is steps by number (step_events.py), and the host waits for none of them:

    a pack     belongs after the step that computed its tokens; its slot is handed over once it is done
    an unpack  belongs after the steps that may still use its pages for who had them before; its slot is given
               back, and its sequence may be computed with, once it is done
    a step     starts after a copy that was given up while it ran, whose pages somebody else may have by now

A copy is one launch for any number of runs, of one transfer or of several, with one event behind it. Copies
are done in the order in which they were queued, so whoever queues one sees to it that its step is done
already: it would hold up all that come after it. Their stream goes before that of the steps where both have
something to run: a copy is small, and a step can be 100 ms of kernels. On a CPU each is done when the call
returns.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from services.engine.errors import ChecksumMismatch
from services.engine.events import AllQueuedSteps, Event, EventPassed, Now, StartAfter, StepsUpTo
from services.engine.kv.checksum import QueuedChecksums
from services.engine.kv.pool import KvPool
from services.engine.kv.run_table import SlotRun
from services.engine.kv.segments import Segments, SlotBuffer
from services.engine.step_events import StepEvents


@dataclass(slots=True, eq=False)
class Copy:
    """Packs or unpacks that were handed to the device together; `byte_counts[i]` is what run `i` has."""

    byte_counts: list[int]
    _done: Event | None = None
    """None: it was done when it was queued."""
    _queued: QueuedChecksums | None = None
    """None: no checksums were asked for."""
    _checksums: list[int] | None = None

    @property
    def is_done(self) -> bool:
        """Asks the device, and does not wait for it."""
        return self._done is None or self._done.query()

    def wait(self) -> None:
        if self._done is not None:
            self._done.synchronize()

    def checksum(self, run: int) -> int | None:
        """Of a run's bytes in its slot, if it was asked for. Only of a copy that is done."""
        found = self.checksums()
        return None if found is None else found[run]

    def checksums(self) -> list[int] | None:
        """Of all runs; see `checksum`."""
        if self._checksums is None and self._queued is not None:
            self._checksums = self._queued.values()
        return self._checksums

    def judge(self, run: int, expected: int | None) -> None:
        """Compare what an unpack that is done has read with what the sender packed; None: nothing is known.

        Raises `ChecksumMismatch`.
        """
        if expected is None:
            return
        found = self.checksum(run)
        if found != expected:
            was = "was not computed" if found is None else f"is {found:016x}"
            raise ChecksumMismatch(
                f"the checksum of {self.byte_counts[run]} bytes {was}, the sender packed {expected:016x}"
            )


class CopyStream:
    """The packs and unpacks of one pool. Its steps, known to `steps` by number, run on what is the current
    stream here and whenever a method is called. `slots`: of the staging buffer; a copy that is not done has
    one at least."""

    def __init__(self, pool: KvPool, slots: int, steps: StepEvents) -> None:
        self._segments = Segments(pool, slots)
        self._steps = steps
        device = pool.data.device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device, priority=-1)

    def steps_event(self) -> Event | None:
        """An event that passes when all steps queued so far are done. None on a CPU: they are."""
        return None if self._stream is None else _recorded(torch.cuda.current_stream(self._stream.device))

    def pack(
        self, runs: Sequence[SlotRun], buffer: SlotBuffer, with_checksums: bool, after: StartAfter
    ) -> Copy:
        """See `Segments.pack`. Raises `ValueError` for an `after` that names a step not queued yet."""
        with self._beside(after):
            byte_counts, queued = self._segments.pack(runs, buffer, with_checksums)
        return self._queued(byte_counts, queued)

    def unpack(
        self, runs: Sequence[SlotRun], buffer: SlotBuffer, with_checksums: bool, after: StartAfter
    ) -> Copy:
        """See `Segments.unpack`, and `pack` for `after`."""
        with self._beside(after):
            byte_counts, queued = self._segments.unpack(runs, buffer, with_checksums)
        return self._queued(byte_counts, queued)

    def fence(self, copy: Copy) -> None:
        """Steps queued from now on start after this copy."""
        if self._stream is not None and copy._done is not None:
            copy._done.wait(torch.cuda.current_stream(self._stream.device))

    def _beside(self, after: StartAfter) -> AbstractContextManager[object]:
        """What is queued within runs beside the steps, once `after` has passed."""
        if isinstance(after, StepsUpTo):
            after = self._steps.after(after.step)
        if self._stream is None:
            return nullcontext()
        match after:
            case EventPassed(event):
                event.wait(self._stream)
            case AllQueuedSteps():
                self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            case Now():
                pass
        return torch.cuda.stream(self._stream)

    def _queued(self, byte_counts: list[int], queued: QueuedChecksums | None) -> Copy:
        done = None if self._stream is None else _recorded(self._stream)
        self._segments.ring.used(done)
        return Copy(byte_counts, done, queued)


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(stream)
    return event
