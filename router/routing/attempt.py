"""One attempt: some choices of a prompt on their way through a prefill worker and decode workers. Pure.

Reports of workers go in, what must be sent to workers comes out as `WorkerMessage`s. Tokens go to the routed
request that the attempt belongs to (routed_request.py), which also decides what follows when the attempt has
failed or has lost its decode worker.

    QUEUED ──> PREFILLING ──> JOINING ──> DECODING ──> FINISHED
                  │ ↑ └──(unified worker)───↑↑
                  ↓ │            │ ↑        ││
                UNPAIRED ──────> HELD       (a decode worker is lost before it has the KV; another is found)
    (any living phase) ──> FAILED, CANCELLED
    PREFILLING, UNPAIRED ──> FINISHED where every choice ends with its first token

Whichever way an attempt ends, it sends `Cancel` to every worker that may still hold something of it.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from router.errors import ApiError
from router.routing.failures import error_of, lost_error
from router.routing.policy import Pairing
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

if TYPE_CHECKING:  # it makes its attempts, and imports this module
    from router.routing.routed_request import RoutedRequest


class AttemptPhase(enum.Enum):
    __hash__ = object.__hash__  # Enum's own is Python code, and an attempt looks its phase up again and again

    QUEUED = "queued"  # no workers yet
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
    """An attempt was to change between two phases that `TRANSITIONS` does not join."""


class WorkerMessage(Struct, frozen=True):
    """One message and the endpoint of the worker that it is for."""

    worker: str
    message: Request


@dataclass(slots=True)
class Times:
    """When a request reached each stage (the loop's clock), and what workers measured; None: not reached."""

    submitted_s: float
    first_token_s: float | None = None
    ended_s: float | None = None
    queue_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float | None = None
    tail_s: float | None = None
    decode_started_s: float | None = None


class Wait(Struct, frozen=True):
    """How an attempt waits for workers: from `not_before_s` on; `strict`: not for those it is to avoid, even
    if there are no others."""

    not_before_s: float = 0.0
    strict: bool = False


AT_ONCE = Wait()

_NOTHING: tuple[WorkerMessage, ...] = ()


@dataclass(slots=True, eq=False)
class Attempt:
    """The unit of a retry: `work` on one prefill worker, or none on a unified one, and a decode worker.

    Methods return what to send, in order. A report changes nothing and counts as `ignored` if it comes from a
    worker that has no part in the attempt (any more), under a former decode worker's id, or for a choice that
    has ended or never was. In a phase of `WITHOUT_DECODE` the attempt needs `pair`. While it has a `wait` it
    waits for workers, and `error` is what its request fails with if there are none.
    """

    routed: "RoutedRequest"
    work: SequenceRequest
    """Until `start` its id is only that of the request's first attempt, or 0."""
    times: Times
    retry_after_s: int
    wait: Wait | None = AT_ONCE
    error: ApiError | None = None
    retries: int = 0
    """How often what it runs was tried before."""
    avoid: frozenset[str] = frozenset()
    """Workers that have failed it before."""
    prefill: str | None = None
    decode: str = ""
    transfer_id: int = 0
    source: WorkerTransferAddress | None = None
    phase: AttemptPhase = AttemptPhase.QUEUED
    failed_on: str | None = None
    """The worker that failed it, if one did."""
    decode_id: int = 0
    """Its id on the decode worker: that of `work` at first, a new one with each `pair`."""
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

    @property
    def needs_decision(self) -> bool:
        """Whether its request is to decide what follows: it has ended, or just lost its decode worker."""
        return self.ended or (self.wait is None and self.phase in WITHOUT_DECODE)

    def start(self, work: SequenceRequest, pairing: Pairing, transfer_id: int) -> Sequence[WorkerMessage]:
        """Sends `work` to its first workers."""
        self._transition(AttemptPhase.PREFILLING)
        self.work, self.decode_id, self.transfer_id = work, work.request_id, transfer_id
        self.prefill, self.decode, self.source = pairing.prefill, pairing.decode, pairing.source
        self.wait = self.error = None
        self._alive = set(work.choice_numbers)
        self._waited_for = set(self._alive)
        if self.prefill is None or self.source is None:
            return (WorkerMessage(self.decode, Generate(work)),)
        # Both leave at once, but one of them first: the one that the first token waits for.
        return (
            WorkerMessage(self.prefill, Prefill(work, transfer_id)),
            WorkerMessage(self.decode, ReserveKv(work, transfer_id, self.source)),
        )

    def pair(self, pairing: Pairing, decode_id: int, transfer_id: int) -> Sequence[WorkerMessage]:
        """Another decode worker takes the KV that the prefill worker has, or will have."""
        decode, source = pairing.decode, pairing.source
        if self.prefill is None or source is None:
            raise IllegalAttemptTransition("a unified worker has no pair")
        held = self.phase is AttemptPhase.HELD
        self._transition(AttemptPhase.JOINING if held else AttemptPhase.PREFILLING)
        self.decode, self.decode_id, self.transfer_id, self.source = decode, decode_id, transfer_id, source
        self.wait = self.error = None
        work = replace(self.work, request_id=decode_id)
        sends = [
            WorkerMessage(self.prefill, RepushKv(self.work.request_id, transfer_id)),
            WorkerMessage(decode, ReserveKv(work, transfer_id, source)),
        ]
        return [*sends, self._start_decode()] if held else sends

    def on_prefill_done(self, worker: str, report: PrefillDone) -> None:
        if self.phase not in _BEFORE_FIRST_TOKENS or worker != (self.prefill or self.decode):
            self.ignored += 1
            return
        if self.times.first_token_s is None:
            self.times.queue_s, self.times.prefill_s = report.queue_s, report.prefill_s
        self.cached_tokens = report.cached_tokens
        self.routed.on_prefilled(report)

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
            if self.routed.on_tokens(report, now_s):
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
        goes_on = self.routed.on_tokens(report, now_s)
        if self.prefill is None:
            self.times.decode_started_s = self.times.decode_started_s or now_s
            self._transition(AttemptPhase.DECODING)
            return _NOTHING if goes_on else self._end_choice(report, now_s)
        if goes_on:
            self._firsts[choice] = report.tokens[-1]
        else:
            self._alive.discard(choice)
            # A choice the router ended is one the prefill worker still means to hand over.
            self._prefill_holds |= report.finish is None
        if self._waited_for:
            return _NOTHING
        unpaired = self.phase is AttemptPhase.UNPAIRED
        if self._firsts:
            self._transition(AttemptPhase.HELD if unpaired else AttemptPhase.JOINING)
            return _NOTHING if unpaired else (self._start_decode(),)
        holders = self.workers if self._prefill_holds else self.workers[1:]
        self._end(AttemptPhase.FINISHED, now_s)
        return self._cancels(holders)

    def _start_decode(self) -> WorkerMessage:
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
        self._transition(AttemptPhase.DECODING)

    def on_kv_transfer_failed(self, worker: str, report: KvTransferFailed) -> Sequence[WorkerMessage]:
        """The prefill worker goes on without its decode worker, whose part is cancelled. If the decode worker
        decodes already, it has the KV and only the word of that was lost: the prefill worker lets it go."""
        if self.phase is AttemptPhase.DECODING and worker == self.prefill:
            return self.on_kv_lease_expiring(worker)
        paired = self.phase is AttemptPhase.PREFILLING or self.phase is AttemptPhase.JOINING
        if not paired or worker != self.prefill or report.transfer_id != self.transfer_id:
            self.ignored += 1
            return _NOTHING
        failed = Failed(report.request_id, "transfer", report.message, True)
        self._unpair(error_of(failed, self.retry_after_s, self._committed))
        return self._cancels((self.decode,))

    def on_kv_lease_expiring(self, worker: str) -> Sequence[WorkerMessage]:
        """A worker still holds KV. `Cancel` lets it go if nobody will ask for it again."""
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
        """`worker` no longer knows the attempt. The prefill worker's part outlives its decode worker's."""
        handed_over = self.phase is AttemptPhase.DECODING
        if error.retry_reason is None or self.prefill is None or worker == self.prefill or handed_over:
            return self.fail(error, now_s, gone=worker)
        self._unpair(error)
        return _NOTHING

    def _unpair(self, error: ApiError) -> None:
        self._transition(AttemptPhase.HELD if self.phase is AttemptPhase.JOINING else AttemptPhase.UNPAIRED)
        self.error = error

    @property
    def _committed(self) -> bool:
        return self.times.first_token_s is not None

    def fail(self, error: ApiError, now_s: float, gone: str | None = None) -> Sequence[WorkerMessage]:
        """Ends the attempt with an error. `gone` is the worker that no longer knows it."""
        if self.ended:
            return _NOTHING
        holders = [worker for worker in self.workers if worker != gone]
        if self.phase is AttemptPhase.DECODING and gone == self.decode and self.prefill is not None:
            # The word that the KV was taken may have died with who took it.
            holders.append(self.prefill)
        self.error, self.failed_on = error, gone
        self._end(AttemptPhase.FAILED, now_s)
        return self._cancels(holders)

    def cancel(self, now_s: float) -> Sequence[WorkerMessage]:
        """Ends the attempt because nobody wants its result any more."""
        if self.ended:
            return _NOTHING
        holders = self.workers
        self._end(AttemptPhase.CANCELLED, now_s)
        return self._cancels(holders)

    def recall(self) -> Sequence[WorkerMessage]:
        """Cancels an attempt whose state cannot be trusted on every worker that it ever had."""
        self.ended, self.wait = True, None
        return self._cancels([worker for worker in (self.prefill, self.decode) if worker])

    def _cancels(self, holders: Sequence[str]) -> Sequence[WorkerMessage]:
        ids = {self.decode: self.decode_id}
        return [WorkerMessage(one, Cancel(ids.get(one, self.work.request_id))) for one in holders]

    def _end(self, phase: AttemptPhase, now_s: float) -> None:
        self._transition(phase)
        self.ended = True
        self.open_choices = sorted(self._alive)
        self._alive.clear()
        self.wait = None
        self.times.ended_s = now_s

    def _transition(self, phase: AttemptPhase) -> None:
        if phase not in TRANSITIONS[self.phase]:
            raise IllegalAttemptTransition(f"{self.phase.value} -> {phase.value}")
        self.phase = phase
