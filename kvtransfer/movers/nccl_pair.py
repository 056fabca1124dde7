"""One NCCL communicator of two processes: rank 0 sends, rank 1 receives, batch after batch in the same order.

    JOINING ──> READY <──> ISSUING      a batch is handed to NCCL, which may take some calls
       └──────────┴──────────┴──> STOPPING ──> STOPPED

NCCL wants one operation at a time, so batches wait for READY. `stop` aborts, in a thread, since that may
take a while; only when it is STOPPED is nothing in flight, and what was not done has failed.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from kvtransfer.buffer.cuda import CudaError
from kvtransfer.errors import IllegalTransition, MoverBroken, MoverError
from kvtransfer.movers.base import Progress

SENDER, RECEIVER = 0, 1


class PairState(Enum):
    JOINING = "joining"
    READY = "ready"
    ISSUING = "issuing"
    STOPPING = "stopping"
    STOPPED = "stopped"


TRANSITIONS: dict[PairState, frozenset[PairState]] = {
    PairState.JOINING: frozenset({PairState.READY, PairState.STOPPING}),
    PairState.READY: frozenset({PairState.ISSUING, PairState.STOPPING}),
    PairState.ISSUING: frozenset({PairState.READY, PairState.STOPPING}),
    PairState.STOPPING: frozenset({PairState.STOPPED}),
    PairState.STOPPED: frozenset(),
}


class PairLibrary(Protocol):
    """The part of `NcclLibrary` that a pair needs."""

    def unique_id(self) -> bytes: ...
    def join(self, unique_id: bytes, rank: int) -> int: ...
    def finished(self, comm: int) -> bool: ...
    def exchange(
        self, comm: int, rank: int, pieces: list[tuple[int, int]], stream: int, *, sends: bool
    ) -> bool: ...
    def abort(self, comm: int) -> None: ...


class Streams(Protocol):
    """The part of `CudaDevice` that a pair needs."""

    uuid: str

    def new_stream(self) -> Any: ...
    def drop_stream(self, stream: Any) -> None: ...
    def new_event(self) -> Any: ...
    def drop_event(self, event: Any) -> None: ...
    def record(self, event: Any, stream: Any) -> None: ...
    def reached(self, event: Any) -> bool: ...


RunInBackground = Callable[[Callable[[], None]], Callable[[], bool]]
"""Begins some work and returns a function that answers whether it has ended."""


def in_thread(work: Callable[[], None]) -> Callable[[], bool]:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return lambda: not thread.is_alive()


@dataclass(slots=True, eq=False)
class Batch:
    """The pieces of one write: `(address, byte_count)` of the own memory, and how far they are."""

    pieces: list[tuple[int, int]]
    progress: Progress = Progress.PENDING


class NcclPair:
    """One end of a communicator, with its batches. Raises MoverError if the pair cannot begin to join."""

    def __init__(
        self,
        library: PairLibrary,
        device: Streams,
        unique_id: bytes,
        rank: int,
        run_in_background: RunInBackground = in_thread,
    ) -> None:
        self._library, self._device, self._rank = library, device, rank
        self._run_in_background = run_in_background
        self.state = PairState.JOINING
        self.fault: str | None = None
        """Why it was stopped, if by itself."""
        self._comm = library.join(unique_id, rank)
        self._stream = device.new_stream()
        self._waiting: deque[Batch] = deque()
        self._issuing: Batch | None = None
        self._flying: deque[tuple[Batch, Any]] = deque()
        self._stopped: Callable[[], bool] = lambda: False

    @property
    def idle(self) -> bool:
        """Whether there is nothing to advance."""
        if self.state is PairState.STOPPED:
            return True
        return self.state is PairState.READY and not (self._waiting or self._flying)

    def put(self, batch: Batch) -> None:
        if self.state in (PairState.STOPPING, PairState.STOPPED):
            raise MoverError(f"the pair is {self.state.value}")
        self._waiting.append(batch)
        self.advance()

    def advance(self) -> None:
        """Advances everything as far as it goes without waiting. Raises MoverBroken for a failed device."""
        if self.state is PairState.STOPPED:
            return
        if self.state is PairState.STOPPING:
            if self._stopped():
                self._end()
            return
        try:
            self._land()
            if self.state is not PairState.READY and self._library.finished(self._comm):
                self._issued()
            while self.state is PairState.READY and self._waiting:
                self._issuing = self._waiting.popleft()
                self._transition(PairState.ISSUING)
                stream, sends = int(self._stream), self._rank == SENDER
                if self._library.exchange(self._comm, self._rank, self._issuing.pieces, stream, sends=sends):
                    self._issued()
            if self.state is PairState.READY:
                self._library.finished(self._comm)  # Raises what has failed since.
        except MoverError as error:
            self.fault = str(error)
            self.stop()
        except CudaError as error:
            raise MoverBroken(str(error)) from error

    def stop(self) -> None:
        """Begins to abort. Idempotent."""
        if self.state not in (PairState.STOPPING, PairState.STOPPED):
            self._transition(PairState.STOPPING)
            self._stopped = self._run_in_background(lambda: self._library.abort(self._comm))

    def _issued(self) -> None:
        batch, self._issuing = self._issuing, None
        if batch is not None:
            event = self._device.new_event()
            self._device.record(event, self._stream)
            self._flying.append((batch, event))
        self._transition(PairState.READY)

    def _land(self) -> None:
        while self._flying and self._device.reached(self._flying[0][1]):
            batch, event = self._flying.popleft()
            batch.progress = Progress.DONE
            self._device.drop_event(event)

    def _end(self) -> None:
        """What had landed before the abort is there; all else has failed."""
        for batch, event in self._flying:
            batch.progress = Progress.FAILED
            self._device.drop_event(event)
        for batch in (*self._waiting, *([self._issuing] if self._issuing is not None else [])):
            batch.progress = Progress.FAILED
        self._flying.clear()
        self._waiting.clear()
        self._issuing = None
        self._device.drop_stream(self._stream)
        self._transition(PairState.STOPPED)

    def _transition(self, state: PairState) -> None:
        if state not in TRANSITIONS[self.state]:
            raise IllegalTransition(f"pair: {self.state.value} to {state.value}")
        self.state = state
