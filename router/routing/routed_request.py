"""One prompt's whole journey: the flights it takes, and what follows when one of them fails. Pure.

A journey begins with one leg, all choices of the prompt on one pair of workers. When a flight fails in a way
that another attempt may mend:

- before the first token, the same leg flies again, with ids of its own;
- after it, each choice that has not ended goes on by itself: its prompt is the original one and all tokens
  that the client has, so nothing is drawn or sent twice. Draws are keyed by choice and position, and
  `Work.output_tokens` tells lengths and penalties where the output began (migration in the sense of Llumnix,
  Sun et al., 2024, but by tokens and not by KV: the KV is what was lost);
- where only the decode worker is lost and the KV is not, the flight itself goes on: it is paired anew.

Each of these is a retry. A leg may have `max_retries` of them, so that a request which kills every worker it
meets ends; and all requests together a share, so that an outage is not multiplied by its own repair.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from router.errors import ApiError
from router.routing.attempt import WITHOUT_DECODE, Flight, Output, Phase, Send, Times
from router.routing.failures import given_up
from router.routing.policy import Pairing
from services.protocol.messages import PrefillDone, Tokens, Work

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
        """Whether a leg that was tried again `retries` times may be once more."""
        why = "count" if retries >= self.max_retries else "share" if self.level < 1 else None
        if why is not None:
            self.denied[why] = self.denied.get(why, 0) + 1
            return False
        self.level -= 1
        self.counts[reason] = self.counts.get(reason, 0) + 1
        return True


@dataclass(slots=True, eq=False)
class Leg:
    """Some choices of a prompt that run together, and the `Output` of the flight that runs them.

    It is `waiting` while it needs workers: all it needs, or, if it has a `flight`, another decode worker.
    Then `not_before_s` and `avoid` say when to look, and which workers not to take if there are others;
    `strict`: rather none than those. `error` is what it comes to if none is found.
    """

    journey: "Journey"
    choices: list[int]
    retries: int = 0
    flight: Flight | None = None
    waiting: bool = True
    not_before_s: float = 0.0
    avoid: frozenset[str] = frozenset()
    strict: bool = False
    error: ApiError | None = None

    @property
    def over(self) -> bool:
        """No workers are needed any more."""
        return self.journey.ended or not self.waiting or (self.flight is not None and self.flight.ended)

    def close(self) -> None:
        """Its flight has ended. Leg and flight know each other: what is left of a request would wait for the
        garbage collector, thousands of them at a time, and its pause is long."""
        self.waiting, self.flight = False, None

    # ------------------------------------------------------------ as a flight's output

    def on_prefilled(self, report: PrefillDone) -> None:
        self.journey.on_prefilled(report)

    def on_tokens(self, report: Tokens, now_s: float) -> bool:
        return self.journey.on_tokens(report, now_s)

    def on_failed(self, error: ApiError) -> None:
        self.error = error  # what follows is decided by `settle`, once the flight has told its workers


@dataclass(slots=True, eq=False)
class Journey:
    """`work` is the prompt as it was asked for, under the id of its first flight; `tokens[c]` is all that
    choice `c` has been given. It ends once: with all choices ended, one `error`, or cancelled."""

    work: Work
    output: Output
    times: Times
    retry_after_s: int
    budget: RetryBudget
    legs: list[Leg] = field(init=False)
    tokens: list[list[int]] = field(init=False)
    phase: Phase | None = None
    error: ApiError | None = None
    ignored: int = 0
    cached_tokens: int = 0
    _prefilled: bool = False

    def __post_init__(self) -> None:
        self.legs = [Leg(self, list(self.work.choice_numbers))]
        self.tokens = [[] for _ in self.work.choice_numbers]

    @property
    def ended(self) -> bool:
        return self.phase is not None

    # ------------------------------------------------------------ what flights report

    def on_prefilled(self, report: PrefillDone) -> None:
        if not self._prefilled:
            self._prefilled = True
            self.cached_tokens = report.cached_tokens
            self.output.on_prefilled(report)

    def on_tokens(self, report: Tokens, now_s: float) -> bool:
        self.tokens[report.choice] += report.tokens
        return self.output.on_tokens(report, now_s)

    # ------------------------------------------------------------ flights that begin

    def depart(
        self, leg: Leg, pairing: Pairing, request_id: int, transfer_id: int, now_s: float
    ) -> Sequence[Send]:
        """The leg has workers; both ids are new ones. Its `flight` is then on its way."""
        leg.waiting = False
        if leg.flight is not None:
            if pairing.source is None:
                raise ValueError("a flight is paired anew with the address of its prefill worker")
            return leg.flight.pair(pairing.decode, request_id, transfer_id, pairing.source)
        flight = Flight(
            self._work_of(leg, request_id, now_s), pairing.decode, leg, self.times, self.retry_after_s,
            prefill=pairing.prefill, transfer_id=transfer_id, source=pairing.source,
        )  # fmt: skip
        leg.flight = flight
        return flight.start()

    def _work_of(self, leg: Leg, request_id: int, now_s: float) -> Work:
        work, first = self.work, leg.choices[0]
        if leg.retries == 0:
            return work
        output, sampling = self.tokens[first], work.sampling
        return replace(
            work,
            request_id=request_id,
            prompt=work.prompt + output,
            # The prompt's log probabilities are reported once, and cost the use of the prefix cache.
            sampling=replace(sampling, prompt_logprobs=None) if self._prefilled else sampling,
            choices=len(leg.choices),
            first_choice=first,
            output_tokens=len(output),
            deadline_s=max(work.deadline_s - (now_s - self.times.submitted_s), 0.001),
        )

    # ------------------------------------------------------------ flights that fail or end

    def settle(self, leg: Leg, now_s: float) -> Sequence[Send]:
        """What follows for the journey where a leg's flight has ended or lost its decode worker. Legs that
        need workers are `waiting` then."""
        flight = leg.flight
        if flight is None or self.ended or leg not in self.legs:
            return ()
        sends: Sequence[Send] = ()
        if flight.phase in WITHOUT_DECODE and not leg.waiting and flight.error is not None:
            if self._may_retry(leg, flight.error):
                self._wait(leg, flight.error, leg.avoid | {flight.decode}, leg.retries + 1, now_s)
                return ()
            sends = flight.fail(self._given_up(leg, flight.error), now_s)
        if not flight.ended:
            return sends
        self.legs.remove(leg)
        leg.close()
        self.ignored += flight.ignored
        if flight.phase is Phase.FINISHED:
            if not self.legs:
                self.phase = Phase.FINISHED
        elif flight.error is not None:
            if flight.error.retry_reason is None:
                return [*sends, *self.end(now_s, flight.error)]
            if not self._may_retry(leg, flight.error):
                return [*sends, *self.end(now_s, self._given_up(leg, flight.error))]
            avoid = leg.avoid if flight.failed_on is None else leg.avoid | {flight.failed_on}
            for choices in self._parts(flight.open_choices):
                again = Leg(self, choices)
                self.legs.append(again)
                self._wait(again, flight.error, avoid, leg.retries + 1, now_s)
        return sends

    def end(self, now_s: float, error: ApiError | None = None) -> Sequence[Send]:
        """With an error for the client, or because nobody wants the rest. Idempotent."""
        if self.ended:
            return ()
        self.phase, self.error = (Phase.CANCELLED if error is None else Phase.FAILED), error
        sends: list[Send] = []
        try:
            for leg in self.legs:
                if leg.flight is not None:
                    sends += leg.flight.cancel(now_s)
                    self.ignored += leg.flight.ignored
        finally:  # whatever a flight's state was, the client hears of the end
            self.times.ended_s = now_s
            if error is not None:
                self.output.on_failed(error)
        return sends

    def close(self) -> None:
        """Lets go of the legs of a journey that has ended, which hold it too."""
        for leg in self.legs:
            leg.close()
        self.legs.clear()

    def _may_retry(self, leg: Leg, error: ApiError) -> bool:
        return error.retry_reason is not None and self.budget.take(leg.retries, error.retry_reason)

    def _given_up(self, leg: Leg, error: ApiError) -> ApiError:
        return given_up(error, last=0 < self.budget.max_retries <= leg.retries)

    def _wait(self, leg: Leg, error: ApiError, avoid: frozenset[str], retries: int, now_s: float) -> None:
        leg.waiting, leg.error, leg.avoid, leg.retries = True, error, avoid, retries
        leg.strict = error.retry_reason == "overloaded"
        # The first retry leaves at once; what fails again and again may only need a moment.
        leg.not_before_s = now_s + (FIRST_BACKOFF_S * 2 ** (retries - 2) if retries > 1 else 0.0)

    def _parts(self, choices: list[int]) -> list[list[int]]:
        """Choices that can go on as one leg: those without tokens, if they follow each other, else each."""
        begun = any(self.tokens[choice] for choice in choices)
        if not begun and choices == list(range(choices[0], choices[-1] + 1)):
            return [choices]
        return [[choice] for choice in choices]
