"""The deadline of a step in which sequences decode: what users wait for between two tokens. Pure.

Chunks of prompts share steps with sequences that decode, and lengthen the gap between two of their tokens. A
chunk size alone bounds that gap for one length of context, batch and device; the deadline bounds it for all
(step_time.py says how long a step will take).
"""

from dataclasses import dataclass, field

from services.scheduler.step_time import StepShape, StepTimeModel, unknown_costs

LIMIT_SHARE = 0.9
"""Of the limit: the rest is for what the model does not know, the host's part among it."""
LEAST_PROMPT_TOKENS = 64
"""The first prompt of a step gets so many tokens of it whatever they take, so that every prompt ends."""
GPU_FREE_PROMPT_TOKENS = 64
"""So many cost about nothing beside decodes, whose step waits for weights to be read."""


@dataclass(slots=True, eq=False)
class StepDeadline:
    """Bounds the prompt tokens of a step by the time that they take.

    `itl_limit_s` is the longest gap between two tokens; 0: no deadline. Until the model has been fitted once,
    its costs are zero and everything is in time: the deadline applies from the first fit on.
    """

    itl_limit_s: float = 0.0
    model: StepTimeModel = field(default_factory=lambda: StepTimeModel(unknown_costs()))
    least_prompt_tokens: int = LEAST_PROMPT_TOKENS

    @property
    def target_s(self) -> float:
        return LIMIT_SHARE * self.itl_limit_s

    def chunk_tokens(self, step: StepShape, start: int, most_tokens: int) -> int:
        """How many tokens of a prompt whose first `start` are computed may join a step that is planned so far
        as `step`: at most `most_tokens`, and as many as end in time. The first prompt of a step gets
        `least_prompt_tokens` of them at any rate; the others may get none."""
        # Of the largest chunk that it may be; a smaller one has less context, and ends a little earlier.
        context_tokens = start + most_tokens / 2
        costs = self.model.costs
        # What the step has already is counted as if it had this context too; the target takes the difference.
        other_pairs = step.prompt_tokens * (step.context_tokens - context_tokens)
        in_time = costs.prompt_tokens_within(
            self.target_s - costs.per_pair_s * other_pairs, step.decodes, step.cached_tokens, context_tokens
        )
        least = 0 if step.prompt_tokens else self.least_prompt_tokens
        return min(most_tokens, max(in_time - step.prompt_tokens, least))


def step_deadline(slo_itl_ms: float, device: str) -> StepDeadline:
    """For a worker that has measured nothing yet."""
    free = GPU_FREE_PROMPT_TOKENS if device == "cuda" else 0
    return StepDeadline(slo_itl_ms / 1000, StepTimeModel(unknown_costs(free)))
