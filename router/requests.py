"""One prompt on its way through the workers: the dispatch state machine. Pure.

What arrives goes in, what must be sent comes out as `Send`s; text and HTTP are the `Output`'s business.

    QUEUED ──> PREFILLING ──> JOINING ──> DECODING ──> FINISHED
                    └────(unified worker)─────┘
    (any living phase) ──> FAILED, CANCELLED
    PREFILLING ──> FINISHED where every choice ends with its first token

Whichever way a flight ends, every worker that may still hold something of it is told `Cancel`.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from msgspec import Struct

from router.errors import ApiError
from services.messages import (
    Cancel,
    DecodeStarted,
    Failed,
    FirstToken,
    Generate,
    Join,
    Prefill,
    PrefillDone,
    Request,
    Reserve,
    Tokens,
    TransferAddress,
    Work,
)


class Phase(enum.Enum):
    QUEUED = "queued"
    PREFILLING = "prefilling"
    JOINING = "joining"
    DECODING = "decoding"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


_ENDED = frozenset({Phase.FAILED, Phase.CANCELLED})
MOVES: dict[Phase, frozenset[Phase]] = {
    Phase.QUEUED: _ENDED | {Phase.PREFILLING},
    Phase.PREFILLING: _ENDED | {Phase.JOINING, Phase.DECODING, Phase.FINISHED},
    Phase.JOINING: _ENDED | {Phase.DECODING},
    Phase.DECODING: _ENDED | {Phase.FINISHED},
    Phase.FINISHED: frozenset(),
    Phase.FAILED: frozenset(),
    Phase.CANCELLED: frozenset(),
}


class IllegalPhase(RuntimeError):
    """A flight was moved between two phases that `MOVES` does not join."""


class Output(Protocol):
    """Where a flight's results go: one for each prompt of an HTTP request."""

    def on_prefilled(self, report: PrefillDone) -> None: ...

    def on_tokens(self, report: Tokens, now_s: float) -> bool:
        """Passes a choice's tokens on. False: the choice has ended, by `finish` or by a stop string."""

    def on_failed(self, error: ApiError) -> None: ...


class Send(Struct, frozen=True):
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


_ERRORS: dict[str, tuple[int, str | None]] = {
    "invalid": (400, None),
    "too_long": (400, "context_length_exceeded"),
    "overloaded": (429, "overloaded"),
    "deadline": (504, "deadline_exceeded"),
    "transfer": (503, "transfer_failed"),
    "draining": (503, "draining"),
    "internal": (500, "internal_error"),
}


def error_of(report: Failed, retry_after_s: int, committed: bool) -> ApiError:
    """The client's view of a worker's failure."""
    status, code = _ERRORS[report.code]
    retry = retry_after_s if status in (429, 503) else None
    return ApiError(
        status, report.message or report.code, code=code, retry_after_s=retry, committed=committed
    )


_NOTHING: tuple[Send, ...] = ()


@dataclass(slots=True)
class Flight:
    """`prefill` is None on a unified worker; `transfer_id` and `source` belong to the pair otherwise.

    Methods return what to send, in order. Reports from a worker that has no part in the flight (any more),
    for choices that have ended or never were, change nothing and count as `ignored`.
    """

    work: Work
    decode: str
    output: Output
    times: Times
    retry_after_s: int
    prefill: str | None = None
    transfer_id: int = 0
    source: TransferAddress | None = None
    phase: Phase = Phase.QUEUED
    error: ApiError | None = None
    ended: bool = False
    ignored: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    _alive: set[int] = field(default_factory=set)
    _waited_for: set[int] = field(default_factory=set)
    _firsts: dict[int, int] = field(default_factory=dict)
    _prefill_holds: bool = False

    @property
    def workers(self) -> tuple[str, ...]:
        """Workers that may hold something of this flight now."""
        if self.ended or self.phase is Phase.QUEUED:
            return ()
        if self.prefill is None or self.phase is Phase.DECODING:
            return (self.decode,)
        return (self.prefill, self.decode)

    def start(self) -> Sequence[Send]:
        self._alive = set(range(self.work.choices))
        self._waited_for = set(self._alive)
        self._move(Phase.PREFILLING)
        if self.prefill is None or self.source is None:
            return (Send(self.decode, Generate(self.work)),)
        # Both leave at once, but one of them first: the one that the first token waits for.
        return (
            Send(self.prefill, Prefill(self.work, self.transfer_id)),
            Send(self.decode, Reserve(self.work, self.transfer_id, self.source)),
        )

    def on_prefill_done(self, worker: str, report: PrefillDone) -> None:
        if self.phase is not Phase.PREFILLING or worker != (self.prefill or self.decode):
            self.ignored += 1
            return
        self.times.queue_s, self.times.prefill_s = report.queue_s, report.prefill_s
        self.cached_tokens = report.cached_tokens
        self.output.on_prefilled(report)

    def on_tokens(self, worker: str, report: Tokens, now_s: float) -> Sequence[Send]:
        choice = report.choice
        if choice not in self._alive:
            self.ignored += 1
            return _NOTHING
        if self.phase is Phase.DECODING:
            if worker != self.decode:
                self.ignored += 1
                return _NOTHING
            self.generated_tokens += len(report.tokens)
            if self.output.on_tokens(report, now_s):
                return _NOTHING
            return self._end_choice(report, now_s)
        if self.phase is Phase.PREFILLING and worker == (self.prefill or self.decode):
            return self._on_first_tokens(report, now_s)
        if worker == self.decode:
            return self.fail(ApiError(500, "The decode worker broke the protocol.", committed=True), now_s)
        self.ignored += 1
        return _NOTHING

    def _on_first_tokens(self, report: Tokens, now_s: float) -> Sequence[Send]:
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
            self._move(Phase.DECODING)
            return _NOTHING if going_on else self._end_choice(report, now_s)
        if going_on:
            self._firsts[choice] = report.tokens[-1]
        else:
            self._alive.discard(choice)
            # A choice the router ended is one the prefill worker still means to hand over.
            self._prefill_holds |= report.finish is None
        if self._waited_for:
            return _NOTHING
        if self._firsts:
            self._move(Phase.JOINING)
            firsts = [FirstToken(index, token) for index, token in sorted(self._firsts.items())]
            return (Send(self.decode, Join(self.work.request_id, firsts)),)
        holders = (self.prefill, self.decode) if self._prefill_holds else (self.decode,)
        self._end(Phase.FINISHED, now_s)
        return [Send(holder, Cancel(self.work.request_id)) for holder in holders]

    def _end_choice(self, report: Tokens, now_s: float) -> Sequence[Send]:
        self._alive.discard(report.choice)
        if not self._alive:
            self._end(Phase.FINISHED, now_s)
            if report.finish is None:
                return (Send(self.decode, Cancel(self.work.request_id)),)
        elif report.finish is None:
            return (Send(self.decode, Cancel(self.work.request_id, report.choice)),)
        return _NOTHING

    def on_decode_started(self, worker: str, report: DecodeStarted, now_s: float) -> None:
        if self.phase is not Phase.JOINING or worker != self.decode:
            self.ignored += 1
            return
        self.times.transfer_s, self.times.tail_s = report.transfer_s, report.tail_s
        self.times.decode_started_s = now_s
        self._move(Phase.DECODING)

    def on_failed(self, worker: str, report: Failed, now_s: float) -> Sequence[Send]:
        if worker not in self.workers:
            self.ignored += 1
            return _NOTHING
        error = error_of(report, self.retry_after_s, self.times.first_token_s is not None)
        return self.fail(error, now_s, gone=worker)

    def on_worker_lost(self, worker: str, now_s: float) -> Sequence[Send]:
        if worker not in self.workers:
            return _NOTHING
        role = "prefill" if worker == self.prefill else "decode"
        error = ApiError(
            503,
            f"The {role} worker was lost while it ran this request.",
            code="worker_lost",
            retry_after_s=self.retry_after_s,
            committed=self.times.first_token_s is not None,
        )
        return self.fail(error, now_s, gone=worker)

    def fail(self, error: ApiError, now_s: float, gone: str | None = None) -> Sequence[Send]:
        """Ends with an error. `gone` is the worker that no longer knows the flight."""
        if self.ended:
            return _NOTHING
        holders = [worker for worker in self.workers if worker != gone]
        self.error = error
        self._end(Phase.FAILED, now_s)
        self.output.on_failed(error)
        return [Send(worker, Cancel(self.work.request_id)) for worker in holders]

    def cancel(self, now_s: float) -> Sequence[Send]:
        """Nobody wants the result any more."""
        if self.ended:
            return _NOTHING
        holders = self.workers
        self._end(Phase.CANCELLED, now_s)
        return [Send(worker, Cancel(self.work.request_id)) for worker in holders]

    def _end(self, phase: Phase, now_s: float) -> None:
        self._move(phase)
        self.ended = True
        self._alive.clear()
        self.times.ended_s = now_s

    def _move(self, phase: Phase) -> None:
        if phase not in MOVES[self.phase]:
            raise IllegalPhase(f"{self.phase.value} -> {phase.value}")
        self.phase = phase
