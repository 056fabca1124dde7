"""What one engine step is asked and what it answers: plain values, so that schedulers need no torch."""

from dataclasses import dataclass, field

from services.protocol.messages import Sampling, TokenLogprob


@dataclass(slots=True)
class SampleSpec:
    """One token to sample after a row's last position.

    `position` is the index the new token will have in the sequence: with the request's seed and the
    choice it keys the random number, so a draw does not depend on the batch, worker or attempt.
    `prompt` and `output` are what the penalties look at; `output` holds the choice's tokens so far.
    """

    choice: int
    position: int
    sampling: Sampling
    prompt: list[int]
    output: list[int]


@dataclass(slots=True)
class Row:
    """New tokens of one sequence: a prefill chunk or a single decode token.

    `tokens` take positions `start ...`; `pages` is the sequence's page table and covers all of them.
    `samples` is empty for a chunk that does not end its prompt, and has one entry for each choice that
    starts from this position. `targets[i]` is the token that really follows `tokens[i]`; given only
    when the prompt's log probabilities are wanted (`prompt_logprobs` alternatives each).

    A row of one token may name it by the draw it came from, while the host does not know it yet: `sampled_by`
    is that draw's number among all of the launch before, counted through its rows; what `tokens` says is
    then not read. -1 for a row whose tokens are known.
    """

    tokens: list[int]
    start: int
    pages: list[int]
    samples: list[SampleSpec] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    prompt_logprobs: int = 0
    sampled_by: int = -1


@dataclass(slots=True)
class SampledToken:
    token: int
    logprob: TokenLogprob | None = None


@dataclass(slots=True)
class RowResult:
    """`nonfinite_at` is the first of the row's positions at which the model's numbers were NaN or infinite,
    None if they never were: what was computed from there on, and sampled, is worth nothing."""

    sampled: list[SampledToken] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    nonfinite_at: int | None = None

    def spoil(self, position: int) -> None:
        if self.nonfinite_at is None or position < self.nonfinite_at:
            self.nonfinite_at = position
