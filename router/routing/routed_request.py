"""One prompt's whole request: the attempts it takes, and what follows when one of them fails. Pure.

A request begins with one branch, all choices of the prompt on one pair of workers. When an attempt fails in a
way that another attempt may mend:

- before the first token, the same branch flies again, with ids of its own;
- after it, each choice that has not ended goes on by itself: its prompt is the original one and all tokens
  that the client has, so nothing is drawn or sent twice. Draws are keyed by choice and position, and
  `SequenceRequest.output_tokens` tells lengths and penalties where the output began (migration in the sense
  of Llumnix, Sun et al., 2024, but by tokens and not by KV: the KV is what was lost);
- where only the decode worker is lost and the KV is not, the attempt itself goes on: it is paired anew.

Each of these is a retry. A branch may have `max_retries` of them, so that a request which kills every worker
it meets ends; and all requests together a share, so that an outage is not multiplied by its own repair.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from router.errors import ApiError
from router.routing.attempt import (
    WITHOUT_DECODE,
    Attempt,
    AttemptListener,
    AttemptPhase,
    Times,
    WorkerMessage,
)
from router.routing.failures import given_up
from router.routing.policy import Pairing
from services.protocol.messages import PrefillDone, SequenceRequest, Tokens

FIRST_BACKOFF_S = 0.5


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

    def take(self, retries: int, reason: str) -> bool:
        """Whether a branch that was tried again `retries` times may be once more."""
        why = "count" if retries >= self.max_retries else "share" if self.level < 1 else None
        if why is not None:
            self.denied[why] = self.denied.get(why, 0) + 1
            return False
        self.level -= 1
        self.counts[reason] = self.counts.get(reason, 0) + 1
        return True


@dataclass(slots=True, eq=False)
class Branch:
    """Some choices of a prompt that run together, and the `AttemptListener` of the attempt that runs them.

    It is `waiting` while it needs workers: all it needs, or, if it has a `attempt`, another decode worker.
    Then `not_before_s` and `avoid` say when to look, and which workers not to take if there are others;
    `strict`: rather none than those. `error` is what it comes to if none is found.
    """

    routed: "RoutedRequest"
    choices: list[int]
    retries: int = 0
    attempt: Attempt | None = None
    waiting: bool = True
    not_before_s: float = 0.0
    avoid: frozenset[str] = frozenset()
    strict: bool = False
    error: ApiError | None = None

    @property
    def over(self) -> bool:
        """No workers are needed any more."""
        return self.routed.ended or not self.waiting or (self.attempt is not None and self.attempt.ended)

    def close(self) -> None:
        """Its attempt has ended. Leg and attempt know each other: what is left of a request would wait for
        the garbage collector, thousands of them at a time, and its pause is long."""
        self.waiting, self.attempt = False, None

    # ------------------------------------------------------------ as an attempt's output

    def on_prefilled(self, report: PrefillDone) -> None:
        self.routed.on_prefilled(report)

    def on_tokens(self, report: Tokens, now_s: float) -> bool:
        return self.routed.on_tokens(report, now_s)

    def on_failed(self, error: ApiError) -> None:
        self.error = error  # what follows is decided by `settle`, once the attempt has told its workers


@dataclass(slots=True, eq=False)
class RoutedRequest:
    """`work` is the prompt as it was asked for, under the id of its first attempt; `tokens[c]` is all that
    choice `c` has been given. It ends once: with all choices ended, one `error`, or cancelled."""

    work: SequenceRequest
    output: AttemptListener
    times: Times
    retry_after_s: int
    budget: RetryBudget
    branches: list[Branch] = field(init=False)
    tokens: list[list[int]] = field(init=False)
    phase: AttemptPhase | None = None
    error: ApiError | None = None
    ignored: int = 0
    cached_tokens: int = 0
    _prefilled: bool = False

    def __post_init__(self) -> None:
        self.branches = [Branch(self, list(self.work.choice_numbers))]
        self.tokens = [[] for _ in self.work.choice_numbers]

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
        self.tokens[report.choice] += report.tokens
        return self.output.on_tokens(report, now_s)

    # ------------------------------------------------------------ attempts that begin

    def depart(
        self, branch: Branch, pairing: Pairing, request_id: int, transfer_id: int, now_s: float
    ) -> Sequence[WorkerMessage]:
        """The branch has workers; both ids are new ones. Its `attempt` is then on its way."""
        branch.waiting = False
        if branch.attempt is not None:
            if pairing.source is None:
                raise ValueError("an attempt is paired anew with the address of its prefill worker")
            return branch.attempt.pair(pairing.decode, request_id, transfer_id, pairing.source)
        attempt = Attempt(
            self._work_of(branch, request_id, now_s), pairing.decode, branch, self.times, self.retry_after_s,
            prefill=pairing.prefill, transfer_id=transfer_id, source=pairing.source,
        )  # fmt: skip
        branch.attempt = attempt
        return attempt.start()

    def _work_of(self, branch: Branch, request_id: int, now_s: float) -> SequenceRequest:
        work, first = self.work, branch.choices[0]
        if branch.retries == 0:
            return work
        output, sampling = self.tokens[first], work.sampling
        return replace(
            work,
            request_id=request_id,
            prompt=work.prompt + output,
            # The prompt's log probabilities are reported once, and cost the use of the prefix cache.
            sampling=replace(sampling, prompt_logprobs=None) if self._prefilled else sampling,
            choices=len(branch.choices),
            first_choice=first,
            output_tokens=len(output),
            deadline_s=max(work.deadline_s - (now_s - self.times.submitted_s), 0.001),
        )

    # ------------------------------------------------------------ attempts that fail or end

    def settle(self, branch: Branch, now_s: float) -> Sequence[WorkerMessage]:
        """What follows for the request where a branch's attempt has ended or lost its decode worker. Branches
        that need workers are `waiting` then."""
        attempt = branch.attempt
        if attempt is None or self.ended or branch not in self.branches:
            return ()
        sends: Sequence[WorkerMessage] = ()
        if attempt.phase in WITHOUT_DECODE and not branch.waiting and attempt.error is not None:
            if self._may_retry(branch, attempt.error):
                self._wait(branch, attempt.error, branch.avoid | {attempt.decode}, branch.retries + 1, now_s)
                return ()
            sends = attempt.fail(self._given_up(branch, attempt.error), now_s)
        if not attempt.ended:
            return sends
        self.branches.remove(branch)
        branch.close()
        self.ignored += attempt.ignored
        if attempt.phase is AttemptPhase.FINISHED:
            if not self.branches:
                self.phase = AttemptPhase.FINISHED
        elif attempt.error is not None:
            if attempt.error.retry_reason is None:
                return [*sends, *self.end(now_s, attempt.error)]
            if not self._may_retry(branch, attempt.error):
                return [*sends, *self.end(now_s, self._given_up(branch, attempt.error))]
            avoid = branch.avoid if attempt.failed_on is None else branch.avoid | {attempt.failed_on}
            for choices in self._parts(attempt.open_choices):
                again = Branch(self, choices)
                self.branches.append(again)
                self._wait(again, attempt.error, avoid, branch.retries + 1, now_s)
        return sends

    def end(self, now_s: float, error: ApiError | None = None) -> Sequence[WorkerMessage]:
        """With an error for the client, or because nobody wants the rest. Idempotent."""
        if self.ended:
            return ()
        self.phase, self.error = (AttemptPhase.CANCELLED if error is None else AttemptPhase.FAILED), error
        sends: list[WorkerMessage] = []
        try:
            for branch in self.branches:
                if branch.attempt is not None:
                    sends += branch.attempt.cancel(now_s)
                    self.ignored += branch.attempt.ignored
        finally:  # whatever an attempt's state was, the client hears of the end
            self.times.ended_s = now_s
            if error is not None:
                self.output.on_failed(error)
        return sends

    def close(self) -> None:
        """Lets go of the branches of a request that has ended, which hold it too."""
        for branch in self.branches:
            branch.close()
        self.branches.clear()

    def _may_retry(self, branch: Branch, error: ApiError) -> bool:
        return error.retry_reason is not None and self.budget.take(branch.retries, error.retry_reason)

    def _given_up(self, branch: Branch, error: ApiError) -> ApiError:
        return given_up(error, last=0 < self.budget.max_retries <= branch.retries)

    def _wait(
        self, branch: Branch, error: ApiError, avoid: frozenset[str], retries: int, now_s: float
    ) -> None:
        branch.waiting, branch.error, branch.avoid, branch.retries = True, error, avoid, retries
        branch.strict = error.retry_reason == "overloaded"
        # The first retry leaves at once; what fails again and again may only need a moment.
        branch.not_before_s = now_s + (FIRST_BACKOFF_S * 2 ** (retries - 2) if retries > 1 else 0.0)

    def _parts(self, choices: list[int]) -> list[list[int]]:
        """Choices that can go on as one branch: those without tokens, if they follow each other, else
        each."""
        begun = any(self.tokens[choice] for choice in choices)
        if not begun and choices == list(range(choices[0], choices[-1] + 1)):
            return [choices]
        return [[choice] for choice in choices]
