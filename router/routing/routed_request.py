"""One prompt's whole request: the attempts that it takes, and what follows when one of them fails. Pure.

A request begins with one attempt, all choices of the prompt on one pair of workers. `decide` is the only
place that says what follows from the state of an attempt. Where another attempt may mend a failure:

- before the first token, all choices run again, under ids of their own (`RETRY`);
- after it, each choice that has not ended goes on by itself: its prompt is the original one and all tokens
  that the client has, so nothing is sampled or sent twice. Samples are keyed by choice and position, and
  `SequenceRequest.output_tokens` tells lengths and penalties where the output began (migration in the sense
  of Llumnix, Sun et al., 2024, but by tokens and not by KV: the KV is what was lost);
- where only the decode worker is lost and the KV is not, the attempt itself goes on with another (`PAIR`).

Each of these is a retry. An attempt may have `max_retries` before it, so that a request which kills every
worker it meets ends; and all requests together a share, so that an outage is not multiplied by its repair.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from msgspec import Struct
from msgspec.structs import replace

from router.errors import ApiError
from router.routing.attempt import WITHOUT_DECODE, Attempt, AttemptPhase, Times, Wait, WorkerMessage
from router.routing.failures import given_up
from router.routing.policy import Pairing
from services.protocol.messages import PrefillDone, Sampling, SequenceRequest, Tokens

FIRST_BACKOFF_S = 0.5


class ChoiceOutput(Protocol):
    """Where one choice's tokens go."""

    def on_tokens(self, report: Tokens, now_s: float) -> bool:
        """Takes a choice's next tokens. False: the choice has ended, by `finish` or by a stop string."""


class PromptOutput(Protocol):
    """Where a prompt's results go: `choices` has one output for each choice."""

    @property
    def choices(self) -> Sequence[ChoiceOutput]: ...

    def on_prefilled(self, report: PrefillDone) -> None: ...

    def on_failed(self, error: ApiError) -> None: ...


class PromptRequest(Struct, frozen=True):
    """One prompt to run, as an endpoint gives it to the dispatcher."""

    prompt: list[int]
    sampling: Sampling
    choices: int
    salt: bytes
    output: PromptOutput


@dataclass(slots=True)
class RetryBudget:
    """A token bucket: full at first, every new prompt puts `share` of a retry in, every retry takes one out
    (the retry budget of Finagle). `counts` are retries by reason, `denied` those refused, by which bound.
    """

    max_retries: int
    share: float
    burst: int
    counts: dict[str, int] = field(default_factory=dict)
    denied: dict[str, int] = field(default_factory=dict)
    level: float = field(init=False)

    def __post_init__(self) -> None:
        self.level = float(self.burst)

    def on_prompt(self) -> None:
        self.level = min(self.level + self.share, float(self.burst))

    def denial(self, retries: int) -> str | None:
        """The bound that forbids another retry of what was tried again `retries` times; None: it may be."""
        return "count" if retries >= self.max_retries else "share" if self.level < 1 else None

    def deny(self, bound: str) -> None:
        self.denied[bound] = self.denied.get(bound, 0) + 1

    def spend(self, reason: str) -> None:
        self.level -= 1
        self.counts[reason] = self.counts.get(reason, 0) + 1


class NextStep(enum.Enum):
    """What follows for a request from the state of one of its attempts."""

    GO_ON = "go_on"  # nothing: it runs, or waits, or is over while others of the request are not
    FINISH = "finish"  # every choice has ended
    START = "start"  # it gets the workers that were found
    WAIT = "wait"  # no workers were found, or its back-off is not over
    PAIR = "pair"  # its prefill worker has the KV: it waits for another decode worker
    RETRY = "retry"  # what it has not generated waits for workers, as new attempts
    FAIL = "fail"  # the request ends with the error


class Decision(Struct, frozen=True):
    """`denied` is the bound of the retry budget that a failure is due to."""

    step: NextStep
    error: ApiError | None = None
    denied: str | None = None


class WorkersOffer(Struct, frozen=True):
    """What there is for an attempt that waits. `due`: its back-off is over, and workers were looked for;
    `pairing` None: there are none. `room`: it may wait (on) in the queue."""

    pairing: Pairing | None
    due: bool
    room: bool


_GO_ON = Decision(NextStep.GO_ON)


@dataclass(slots=True, eq=False)
class RoutedRequest:
    """`work` is the prompt as it was asked for, under the id of its first attempt; `tokens[c]` is all that
    choice `c` has been given. A request ends once: with all choices ended, one `error`, or cancelled."""

    work: SequenceRequest
    output: PromptOutput
    times: Times
    retry_after_s: int
    budget: RetryBudget
    attempts: list[Attempt] = field(init=False)
    """Those that have not ended. An attempt and its request know each other: the dispatcher empties the list
    at the request's end, or thousands of requests would wait for the garbage collector, whose pause is
    long."""
    tokens: list[list[int]] = field(init=False)
    phase: AttemptPhase | None = None
    error: ApiError | None = None
    ignored: int = 0
    cached_tokens: int = 0
    _choices: Sequence[ChoiceOutput] = field(init=False)
    _prefilled: bool = False

    def __post_init__(self) -> None:
        self.attempts = [Attempt(self, self.work, self.times, self.retry_after_s)]
        self.tokens = [[] for _ in self.work.choice_numbers]
        self._choices = self.output.choices

    @property
    def ended(self) -> bool:
        return self.phase is not None

    # ------------------------------------------------------------ what attempts report

    def on_prefilled(self, report: PrefillDone) -> None:
        if not self._prefilled:
            self._prefilled = True
            self.cached_tokens = report.cached_tokens
            self.output.on_prefilled(report)

    def on_tokens(self, report: Tokens, now_s: float) -> bool:
        choice = report.choice
        self.tokens[choice] += report.tokens
        return self._choices[choice].on_tokens(report, now_s)

    # ------------------------------------------------------------ what follows

    def decide(self, attempt: Attempt, offer: WorkersOffer | None = None) -> Decision:
        """What follows from the state of an attempt: of one that has ended or lost its decode worker, or of
        one that waits for workers and has an `offer`. Changes nothing."""
        error, wait = attempt.error, attempt.wait
        match attempt.phase:
            case _ if self.ended or attempt not in self.attempts:
                return _GO_ON
            case AttemptPhase.FINISHED:
                return Decision(NextStep.FINISH) if len(self.attempts) == 1 else _GO_ON
            case AttemptPhase.QUEUED | AttemptPhase.UNPAIRED | AttemptPhase.HELD if wait is not None:
                if offer is None:
                    return _GO_ON
                if offer.pairing is not None:
                    return Decision(NextStep.START)
                hopeless = wait.strict and offer.due
                return (
                    Decision(NextStep.FAIL, error) if hopeless or not offer.room else Decision(NextStep.WAIT)
                )
            case AttemptPhase.UNPAIRED | AttemptPhase.HELD | AttemptPhase.FAILED if error is not None:
                if error.retry_reason is None:
                    return Decision(NextStep.FAIL, error)
                denied = self.budget.denial(attempt.retries)
                if denied is not None:
                    last = 0 < self.budget.max_retries <= attempt.retries
                    return Decision(NextStep.FAIL, given_up(error, last), denied)
                return Decision(NextStep.PAIR if attempt.phase in WITHOUT_DECODE else NextStep.RETRY)
            case _:
                return _GO_ON

    def apply(self, attempt: Attempt, decision: Decision, now_s: float) -> Sequence[WorkerMessage]:
        """Makes what was decided the request's state. An attempt that needs workers then has a `wait`."""
        error = attempt.error
        if attempt.ended and attempt in self.attempts:
            self.attempts.remove(attempt)
            self.ignored += attempt.ignored
        if decision.denied is not None:
            self.budget.deny(decision.denied)
        if decision.step is NextStep.FINISH:
            self.phase = AttemptPhase.FINISHED
        elif decision.step is NextStep.FAIL:
            return self.end(now_s, decision.error)
        elif error is not None and error.retry_reason is not None:
            if decision.step is NextStep.PAIR:
                self.budget.spend(error.retry_reason)
                attempt.avoid |= {attempt.decode}
                attempt.retries += 1
                attempt.wait = _wait(error, attempt.retries, now_s)
            elif decision.step is NextStep.RETRY:
                self.budget.spend(error.retry_reason)
                self._retry(attempt, error, now_s)
        return ()

    def _retry(self, failed: Attempt, error: ApiError, now_s: float) -> None:
        avoid = failed.avoid if failed.failed_on is None else failed.avoid | {failed.failed_on}
        retries = failed.retries + 1
        wait = _wait(error, retries, now_s)
        for choices in self._groups(failed.open_choices):
            work = self._rest_of(choices)
            self.attempts.append(
                Attempt(self, work, self.times, self.retry_after_s, wait, error, retries, avoid)
            )

    def _groups(self, choices: list[int]) -> list[list[int]]:
        """Choices that can go on as one attempt: those without tokens, if they follow each other, else
        each."""
        begun = any(self.tokens[choice] for choice in choices)
        if not begun and choices == list(range(choices[0], choices[-1] + 1)):
            return [choices]
        return [[choice] for choice in choices]

    def _rest_of(self, choices: list[int]) -> SequenceRequest:
        """What is left to generate of these choices. It gets an id and a deadline when it starts."""
        work, output = self.work, self.tokens[choices[0]]
        # The prompt's log probabilities are reported once, and cost the use of the prefix cache.
        sampling = replace(work.sampling, prompt_logprobs=None) if self._prefilled else work.sampling
        return replace(
            work,
            request_id=0,
            prompt=work.prompt + output,
            sampling=sampling,
            choices=len(choices),
            first_choice=choices[0],
            output_tokens=len(output),
        )

    def start(
        self, attempt: Attempt, pairing: Pairing, request_id: int, transfer_id: int, now_s: float
    ) -> Sequence[WorkerMessage]:
        """Sends an attempt that waits to the workers that were found for it; both ids are new ones."""
        if attempt.phase in WITHOUT_DECODE:
            return attempt.pair(pairing, request_id, transfer_id)
        work = attempt.work
        if attempt.retries:
            left_s = max(work.deadline_s - (now_s - self.times.submitted_s), 0.001)
            work = replace(work, request_id=request_id, deadline_s=left_s)
        return attempt.start(work, pairing, transfer_id)

    def end(self, now_s: float, error: ApiError | None = None) -> Sequence[WorkerMessage]:
        """Ends with an error for the client, or because nobody wants the rest. Idempotent."""
        if self.ended:
            return ()
        self.phase, self.error = (AttemptPhase.CANCELLED if error is None else AttemptPhase.FAILED), error
        sends: list[WorkerMessage] = []
        try:
            for attempt in self.attempts:
                sends += attempt.cancel(now_s)
                self.ignored += attempt.ignored
        finally:  # whatever an attempt's state was, the client hears of the end
            self.times.ended_s = now_s
            if error is not None:
                self.output.on_failed(error)
        return sends


def _wait(error: ApiError, retries: int, now_s: float) -> Wait:
    # The first retry leaves at once; what fails again and again may only need a moment.
    backoff_s = FIRST_BACKOFF_S * 2 ** (retries - 2) if retries > 1 else 0.0
    return Wait(now_s + backoff_s, strict=error.retry_reason == "overloaded")
