"""What a request may ask for: the smallest of what the workers take, and the router's own caps. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """`max_sequence_tokens` is what a worker's KV pool could ever hold for one sequence."""

    vocab_size: int
    max_model_len: int
    max_sequence_tokens: int
    max_choices: int
    max_prompts: int
    max_total_choices: int

    @property
    def context_tokens(self) -> int:
        return min(self.max_model_len, self.max_sequence_tokens)
