"""A sequence: the tokens of one choice, the pages their KV lies in, and where in its life it is.

There is one idea of work for prefill and decode alike: a sequence has `tokens`, of which the first
`computed_tokens` have their KV in its pages. A step computes some of the pending ones; when none is left,
what comes next is sampled from the last position's logits. A prompt is a sequence with many tokens pending, a
decoding choice has exactly one, a preempted choice has all of them again (vLLM v1 schedules this way).

A step is planned while the one before still runs. What that one samples is in `tokens` from its launch on, as
`PENDING`, and is `settled` when the step is collected. With at most one step in flight while the next is
planned, a sequence ends in at most two such placeholders, and the first of them is the next to be settled.
"""

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum

from services.protocol.messages import FirstToken, SequenceRequest
from services.scheduler.errors import IllegalSequenceTransition
from services.scheduler.step_time import StepShape

PENDING = -1
"""In the place of a token that is sampled, but not yet known to the host."""


class State(StrEnum):
    WAITING = "waiting"  # no pages; in a queue
    RESERVED = "reserved"  # decode worker: holds pages, its KV is on the way
    RUNNING = "running"  # in the batch
    HOLDING = "holding"  # prefill worker: computed, kept until the decode worker has it
    ENDED = "ended"  # holds nothing


TRANSITIONS: dict[State, frozenset[State]] = {
    State.WAITING: frozenset({State.RESERVED, State.RUNNING, State.ENDED}),
    State.RESERVED: frozenset({State.RUNNING, State.WAITING, State.ENDED}),
    State.RUNNING: frozenset({State.WAITING, State.HOLDING, State.ENDED}),
    State.HOLDING: frozenset({State.WAITING, State.ENDED}),
    State.ENDED: frozenset(),
}


@dataclass(slots=True, eq=False)
class Sequence:
    """`prompt_tokens` of `tokens` are the prompt, whose own end may be earlier output; the rest is generated
    here.

    `choices` tells which of the request's choices start from the next sample: all of them for a prompt,
    one for a choice that decodes, none for a prompt whose first tokens are already out. `arrival` orders
    sequences by age: the youngest is preempted first.
    """

    work: SequenceRequest
    tokens: list[int]
    choices: list[int]
    state: State = State.WAITING
    arrival: int = 0
    computed_tokens: int = 0
    cached_tokens: int = 0
    pages: list[int] = field(default_factory=list)
    capacity_tokens: int = 0  # what `pages` hold; kept beside them because every step compares it
    free_after_step: int = 0  # the newest step that may still use `pages` for who had them before
    chunk_steps: deque[tuple[int, int]] = field(default_factory=deque)  # end token, and the step up to it
    done_tokens: int = 0  # computed by steps that are known to be done
    digests: list[bytes] = field(default_factory=list)
    published_pages: int = 0
    sound_tokens: int = 1 << 62  # from here on, what was computed is no prefix for anybody
    output_start: int = 0  # where the output begins, that of earlier workers included
    limit_tokens: int = 0  # with so many tokens it ends; known before the last one is
    sample_index: int = -1  # the number of its last sample, among those of that step
    reads_output: bool = False  # sampling looks at all tokens before it, so the host must know them

    def __post_init__(self) -> None:
        sampling = self.work.sampling
        self.output_start = len(self.work.prompt) - self.work.output_tokens
        self.limit_tokens = self.output_start + sampling.max_tokens
        self.reads_output = (
            sampling.repetition_penalty != 1.0
            or sampling.presence_penalty != 0.0
            or sampling.frequency_penalty != 0.0
        )

    @property
    def prompt_tokens(self) -> int:
        return len(self.work.prompt)

    @property
    def pending_tokens(self) -> int:
        return len(self.tokens) - self.computed_tokens

    @property
    def known_tokens(self) -> int:
        """How many of the tokens the host knows: all before the placeholders."""
        known = len(self.tokens)
        while known and self.tokens[known - 1] == PENDING:
            known -= 1
        return known

    @property
    def output(self) -> list[int]:
        return self.tokens[self.output_start :]

    def launched(self, sample_index: int) -> None:
        """The step that samples this choice's next token has been launched; it is its sample number
        `sample_index`."""
        self.tokens.append(PENDING)
        self.sample_index = sample_index

    def settle(self, token: int) -> int:
        """That token is known now. Returns how many tokens of output there are up to it."""
        tokens = self.tokens
        at = len(tokens) - 1
        if tokens[at] != PENDING:
            raise IllegalSequenceTransition(f"request {self.work.request_id} waits for no token")
        while tokens[at - 1] == PENDING:
            at -= 1
        tokens[at] = token
        return at + 1 - self.output_start

    def computed_up_to(self, end_token: int, step: int) -> None:
        """The tokens before `end_token` are computed once `step` is done, and the steps before it."""
        steps = self.chunk_steps
        if steps and steps[-1][1] >= step:
            step = steps.pop()[1]
        steps.append((end_token, step))

    def tokens_done(self, passed_step: int) -> int:
        """How many of the first tokens are computed by steps up to `passed_step`. Of a prompt only: what a
        choice decodes is not counted."""
        while self.chunk_steps and self.chunk_steps[0][1] <= passed_step:
            self.done_tokens = self.chunk_steps.popleft()[0]
        return self.done_tokens

    def transition(self, to: State) -> None:
        if to not in TRANSITIONS[self.state]:
            raise IllegalSequenceTransition(f"request {self.work.request_id}: {self.state} -> {to}")
        self.state = to


def prompt_sequence(work: SequenceRequest) -> Sequence:
    """The sequence that runs a request's prompt and samples every choice's first token."""
    return Sequence(work=work, tokens=list(work.prompt), choices=list(work.choice_numbers))


def choice_sequence(work: SequenceRequest, first: FirstToken) -> Sequence:
    """One choice that goes on after its first token, without pages yet."""
    return Sequence(work=work, tokens=[*work.prompt, first.token], choices=[first.choice])


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `[start, start + count)` of a sequence with many pending, computed in this step.

    `samples` are the choices that sample a token after it: none if tokens are still pending.
    """

    sequence: Sequence
    start: int
    count: int
    samples: tuple[int, ...]


@dataclass(slots=True)
class StepPlan:
    """One engine step: a token of each of `decodes`, then `chunks`. False when there is nothing to do."""

    decodes: list[Sequence] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    tokens: int = 0

    def __bool__(self) -> bool:
        return self.tokens > 0

    def shape(self) -> StepShape:
        """What the step costs is told by this. To be asked before the plan is launched."""
        shape = StepShape(len(self.decodes), sum([one.computed_tokens for one in self.decodes]))
        for chunk in self.chunks:
            shape = shape.plus_chunk(chunk.start, chunk.count)
        return shape

    def add_chunk(self, sequence: Sequence, count: int) -> None:
        samples = tuple(sequence.choices) if count == sequence.pending_tokens else ()
        self.chunks.append(Chunk(sequence, sequence.computed_tokens, count, samples))
        self.tokens += count

    def sequences(self) -> list[Sequence]:
        return [*self.decodes, *(one.sequence for one in self.chunks)]
