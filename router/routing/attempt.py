"""One attempt: some work on its way through one prefill worker and the decode workers it is pushed to. Pure.

What arrives goes in, what must be sent comes out as `WorkerMessage`s; what follows from a failure, and text
and HTTP, are the `AttemptListener`'s business (migration.py).

    QUEUED ──> PREFILLING ──> JOINING ──> DECODING ──> FINISHED
                  │ ↑ └──(unified worker)───↑↑
                  ↓ │            │ ↑        ││
                UNPAIRED ──────> HELD       (a decode worker is lost before it has the KV; another is found)
    (any living phase) ──> FAILED, CANCELLED
    PREFILLING, UNPAIRED ──> FINISHED where every choice ends with its first token

Whichever way an attempt ends, every worker that may still hold something of it is told `Cancel`.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from msgspec import Struct
from msgspec.structs import replace

from router.errors import ApiError
from router.routing.failures import error_of, lost_error
from services.protocol.messages import (
    Cancel,
    DecodeStarted,
    Failed,
    FirstToken,
    Generate,
    KvTransferFailed,
    Prefill,
    PrefillDone,
    RepushKv,
    Request,
    ReserveKv,
    SequenceRequest,
    StartDecode,
    Tokens,
    WorkerTransferAddress,
)


class AttemptPhase(enum.Enum):
    __hash__ = object.__hash__  # Enum's own is Python code, and an attempt looks its phase up again and again

    QUEUED = "queued"
    PREFILLING = "prefilling"
    UNPAIRED = "unpaired"  # prefilling, without a decode worker
    JOINING = "joining"
    HELD = "held"  # the first tokens are out, the prefill worker has the KV, nobody is there to take it
    DECODING = "decoding"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


_ENDED = frozenset({AttemptPhase.FAILED, AttemptPhase.CANCELLED})
TRANSITIONS: dict[AttemptPhase, frozenset[AttemptPhase]] = {
    AttemptPhase.QUEUED: _ENDED | {AttemptPhase.PREFILLING},
    AttemptPhase.PREFILLING: _ENDED
    | {AttemptPhase.JOINING, AttemptPhase.DECODING, AttemptPhase.FINISHED, AttemptPhase.UNPAIRED},
    AttemptPhase.UNPAIRED: _ENDED | {AttemptPhase.PREFILLING, AttemptPhase.HELD, AttemptPhase.FINISHED},
    AttemptPhase.JOINING: _ENDED | {AttemptPhase.DECODING, AttemptPhase.HELD},
    AttemptPhase.HELD: _ENDED | {AttemptPhase.JOINING},
    AttemptPhase.DECODING: _ENDED | {AttemptPhase.FINISHED},
    AttemptPhase.FINISHED: frozenset(),
    AttemptPhase.FAILED: frozenset(),
    AttemptPhase.CANCELLED: frozenset(),
}


WITHOUT_DECODE = frozenset({AttemptPhase.UNPAIRED, AttemptPhase.HELD})
_BEFORE_FIRST_TOKENS = frozenset({AttemptPhase.PREFILLING, AttemptPhase.UNPAIRED})


class IllegalAttemptTransition(RuntimeError):
    """An attempt was moved between two phases that `TRANSITIONS` does not join."""


class AttemptListener(Protocol):
    """Where an attempt's results go, and who decides what follows from its failure."""

    def on_prefilled(self, report: PrefillDone) -> None: ...

    def on_tokens(self, report: Tokens, now_s: float) -> bool:
        """Passes a choice's tokens on. False: the choice has ended, by `finish` or by a stop string."""

    def on_failed(self, error: ApiError) -> None: ...


class WorkerMessage(Struct, frozen=True):
    worker: str
    message: Request


@dataclass(slots=True)
class Times:
    """When things happened (the loop's clock) and what the workers measured; None: not reached."""

    submitted_s: float
    first_token_s: float | None = None
    ended_s: float | None = None
    queue_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float | None = None
    tail_s: float | None = None
    decode_started_s: float | None = None


_NOTHING: tuple[WorkerMessage, ...] = ()


@dataclass(slots=True)
class Attempt:
    """`prefill` is None on a unified worker; `transfer_id` and `source` belong to the pair otherwise.

    Methods return what to send, in order. Reports from a worker that has no part in the attempt (any more),
    under a former decode worker's id, for choices that have ended or never were, change nothing and count as
    `ignored`. In a phase of `WITHOUT_DECODE` the attempt waits for `pair`; `error` is what it comes to if
    nobody calls that.
    """

    work: SequenceRequest
    decode: str
    output: AttemptListener
    times: Times
    retry_after_s: int
    prefill: str | None = None
    transfer_id: int = 0
    source: WorkerTransferAddress | None = None
    phase: AttemptPhase = AttemptPhase.QUEUED
    error: ApiError | None = None
    failed_on: str | None = None
    """The worker that failed it, if one did."""
    decode_id: int = 0
    """The request's id on the decode worker: that of `work` at first, a new one with each `pair`."""
    ended: bool = False
    ignored: int = 0
    open_choices: list[int] = field(default_factory=list)
    """Of an attempt that has ended before them: the choices that have not, in order."""
    generated_tokens: int = 0
    cached_tokens: int = 0
    _alive: set[int] = field(default_factory=set)
    _waited_for: set[int] = field(default_factory=set)
    _firsts: dict[int, int] = field(default_factory=dict)
    _prefill_holds: bool = False

    @property
    def workers(self) -> tuple[str, ...]:
        """Workers that may hold something of this attempt now."""
        if self.ended or self.phase is AttemptPhase.QUEUED:
            return ()
        if self.phase in WITHOUT_DECODE and self.prefill is not None:
            return (self.prefill,)
        if self.prefill is None or self.phase is AttemptPhase.DECODING:
            return (self.decode,)
        return (self.prefill, self.decode)

    def start(self) -> Sequence[WorkerMessage]:
        self._alive = set(self.work.choice_numbers)
        self._waited_for = set(self._alive)
        self.decode_id = self.work.request_id
        self._move(AttemptPhase.PREFILLING)
        if self.prefill is None or self.source is None:
            return (WorkerMessage(self.decode, Generate(self.work)),)
        # Both leave at once, but one of them first: the one that the first token waits for.
        return (
            WorkerMessage(self.prefill, Prefill(self.work, self.transfer_id)),
            WorkerMessage(self.decode, ReserveKv(self.work, self.transfer_id, self.source)),
        )

    def pair(
        self, decode: str, decode_id: int, transfer_id: int, source: WorkerTransferAddress
    ) -> Sequence[WorkerMessage]:
        """Another decode worker takes the KV that the prefill worker has, or will have."""
        if self.prefill is None:
            raise IllegalAttemptTransition("a unified worker has no pair")
        held = self.phase is AttemptPhase.HELD
        self._move(AttemptPhase.JOINING if held else AttemptPhase.PREFILLING)
        self.decode, self.decode_id, self.transfer_id, self.source = decode, decode_id, transfer_id, source
        self.error = None
        work = replace(self.work, request_id=decode_id)
        sends = [
            WorkerMessage(self.prefill, RepushKv(self.work.request_id, transfer_id)),
            WorkerMessage(decode, ReserveKv(work, transfer_id, source)),
        ]
        return [*sends, self._join()] if held else sends

    def on_prefill_done(self, worker: str, report: PrefillDone) -> None:
        if self.phase not in _BEFORE_FIRST_TOKENS or worker != (self.prefill or self.decode):
            self.ignored += 1
            return
        if self.times.first_token_s is None:
            self.times.queue_s, self.times.prefill_s = report.queue_s, report.prefill_s
        self.cached_tokens = report.cached_tokens
        self.output.on_prefilled(report)

    def on_tokens(self, worker: str, report: Tokens, now_s: float) -> Sequence[WorkerMessage]:
        choice = report.choice
        if choice not in self._alive:
            self.ignored += 1
            return _NOTHING
        if self.phase is AttemptPhase.DECODING:
            if worker != self.decode or report.request_id != self.decode_id:
                self.ignored += 1
                return _NOTHING
            self.generated_tokens += len(report.tokens)
            if self.output.on_tokens(report, now_s):
                return _NOTHING
            return self._end_choice(report, now_s)
        if self.phase in _BEFORE_FIRST_TOKENS and worker == (self.prefill or self.decode):
            return self._on_first_tokens(report, now_s)
        if worker == self.decode and report.request_id == self.decode_id and self.phase not in WITHOUT_DECODE:
            return self.fail(ApiError(500, "The decode worker broke the protocol.", committed=True), now_s)
        self.ignored += 1
        return _NOTHING

    def _on_first_tokens(self, report: Tokens, now_s: float) -> Sequence[WorkerMessage]:
        choice = report.choice
        if self.prefill is not None and (choice not in self._waited_for or len(report.tokens) != 1):
            return self.fail(ApiError(500, "The prefill worker broke the protocol.", committed=True), now_s)
        if self.times.first_token_s is None:
            self.times.first_token_s = now_s
        self.generated_tokens += len(report.tokens)
        self._waited_for.discard(choice)
        going_on = self.output.on_tokens(report, now_s)
        if self.prefill is None:
            self.times.decode_started_s = self.times.decode_started_s or now_s
            self._move(AttemptPhase.DECODING)
            return _NOTHING if going_on else self._end_choice(report, now_s)
        if going_on:
            self._firsts[choice] = report.tokens[-1]
        else:
            self._alive.discard(choice)
            # A choice the router ended is one the prefill worker still means to hand over.
            self._prefill_holds |= report.finish is None
        if self._waited_for:
            return _NOTHING
        unpaired = self.phase is AttemptPhase.UNPAIRED
        if self._firsts:
            self._move(AttemptPhase.HELD if unpaired else AttemptPhase.JOINING)
            return _NOTHING if unpaired else (self._join(),)
        holders = self.workers if self._prefill_holds else self.workers[1:]
        self._end(AttemptPhase.FINISHED, now_s)
        return self._cancels(holders)

    def _join(self) -> WorkerMessage:
        firsts = [FirstToken(index, token) for index, token in sorted(self._firsts.items())]
        return WorkerMessage(self.decode, StartDecode(self.decode_id, firsts))

    def _end_choice(self, report: Tokens, now_s: float) -> Sequence[WorkerMessage]:
        self._alive.discard(report.choice)
        if not self._alive:
            self._end(AttemptPhase.FINISHED, now_s)
            if report.finish is None:
                return self._cancels((self.decode,))
        elif report.finish is None:
            return (WorkerMessage(self.decode, Cancel(self.decode_id, report.choice)),)
        return _NOTHING

    def on_decode_started(self, worker: str, report: DecodeStarted, now_s: float) -> None:
        if (
            self.phase is not AttemptPhase.JOINING
            or worker != self.decode
            or report.request_id != self.decode_id
        ):
            self.ignored += 1
            return
        if self.times.decode_started_s is None:
            self.times.transfer_s, self.times.tail_s = report.transfer_s, report.tail_s
            self.times.decode_started_s = now_s
        self._move(AttemptPhase.DECODING)

    def on_undelivered(self, worker: str, report: KvTransferFailed) -> Sequence[WorkerMessage]:
        """The prefill worker goes on without its decode worker, who is told to forget the request. If that
        one decodes already, the KV was taken and only the word of it was lost: nobody needs it held."""
        if self.phase is AttemptPhase.DECODING and worker == self.prefill:
            return self.on_holding(worker)
        paired = self.phase is AttemptPhase.PREFILLING or self.phase is AttemptPhase.JOINING
        if not paired or worker != self.prefill or report.transfer_id != self.transfer_id:
            self.ignored += 1
            return _NOTHING
        failed = Failed(report.request_id, "transfer", report.message, True)
        self._unpair(error_of(failed, self.retry_after_s, self._committed))
        return self._cancels((self.decode,))

    def on_holding(self, worker: str) -> Sequence[WorkerMessage]:
        """A worker that still has the KV is told to let it go where nobody will ask for it again."""
        if worker in self.workers:
            return _NOTHING
        return (WorkerMessage(worker, Cancel(self.work.request_id)),)

    def on_failed(self, worker: str, report: Failed, now_s: float) -> Sequence[WorkerMessage]:
        id_there = self.decode_id if worker == self.decode else self.work.request_id
        if worker not in self.workers or report.request_id != id_there:
            self.ignored += 1
            return _NOTHING
        error = error_of(report, self.retry_after_s, self._committed)
        return self._on_gone(worker, error, now_s)

    def on_worker_lost(self, worker: str, now_s: float) -> Sequence[WorkerMessage]:
        if worker not in self.workers:
            return _NOTHING
        role = "prefill" if worker == self.prefill else "decode"
        error = lost_error(role, self.retry_after_s, self._committed)
        return self._on_gone(worker, error, now_s)

    def _on_gone(self, worker: str, error: ApiError, now_s: float) -> Sequence[WorkerMessage]:
        """`worker` no longer knows the attempt. A prefill worker's part outlives that of its decode
        worker."""
        handed_over = self.phase is AttemptPhase.DECODING
        if error.retry_reason is None or self.prefill is None or worker == self.prefill or handed_over:
            return self.fail(error, now_s, gone=worker)
        self._unpair(error)
        return _NOTHING

    def _unpair(self, error: ApiError) -> None:
        self._move(AttemptPhase.HELD if self.phase is AttemptPhase.JOINING else AttemptPhase.UNPAIRED)
        self.error = error

    @property
    def _committed(self) -> bool:
        return self.times.first_token_s is not None

    def fail(self, error: ApiError, now_s: float, gone: str | None = None) -> Sequence[WorkerMessage]:
        """Ends with an error. `gone` is the worker that no longer knows the attempt."""
        if self.ended:
            return _NOTHING
        holders = [worker for worker in self.workers if worker != gone]
        if self.phase is AttemptPhase.DECODING and gone == self.decode and self.prefill is not None:
            # The word that the KV was taken may have died with who took it.
            holders.append(self.prefill)
        self.error, self.failed_on = error, gone
        self._end(AttemptPhase.FAILED, now_s)
        self.output.on_failed(error)
        return self._cancels(holders)

    def cancel(self, now_s: float) -> Sequence[WorkerMessage]:
        """Nobody wants the result any more."""
        if self.ended:
            return _NOTHING
        holders = self.workers
        self._end(AttemptPhase.CANCELLED, now_s)
        return self._cancels(holders)

    def recall(self) -> Sequence[WorkerMessage]:
        """To every worker that had a part in a attempt whose state is not to be trusted."""
        self.ended = True
        return self._cancels([self.decode] if self.prefill is None else [self.prefill, self.decode])

    def _cancels(self, holders: Sequence[str]) -> Sequence[WorkerMessage]:
        ids = {self.decode: self.decode_id}
        return [WorkerMessage(one, Cancel(ids.get(one, self.work.request_id))) for one in holders]

    def _end(self, phase: AttemptPhase, now_s: float) -> None:
        self._move(phase)
        self.ended = True
        self.open_choices = sorted(self._alive)
        self._alive.clear()
        self.times.ended_s = now_s

    def _move(self, phase: AttemptPhase) -> None:
        if phase not in TRANSITIONS[self.phase]:
            raise IllegalAttemptTransition(f"{self.phase.value} -> {phase.value}")
        self.phase = phase
