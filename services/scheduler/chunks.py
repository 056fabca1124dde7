"""How a prompt is cut into chunks when its KV is pushed to another worker. Pure.

A chunk's KV travels while the next chunk is computed. Nothing hides the last one's: from the first token to
the last unpacked byte it takes the time to move one chunk. So the last chunk of a long prompt is a small one.

The arithmetic, for Qwen3-8B in bf16 (144 KiB a token) on an H200: moved at 340 GB/s a token takes 0.43 µs,
computed at 40,000 tokens/s it takes 25 µs. A last chunk of 8192 tokens would leave 3.6 ms exposed, one of 512
leaves 0.2 ms, and 512 tokens hide the transfer of up to 29,000 before them: one small chunk is enough. Its
price is one more step, in which the weights are read for fewer tokens: at most the time of that read, 3.7 ms,
and by the rates of 1024 and 8192 tokens (27 and 25.6 µs a token) about 1 ms. A smaller head than 3 times the
tail saves less than that.
"""

DEFAULT_TAIL_TOKENS = 512
LEAST_HEAD_TAILS = 3
"""The tail is cut off only where so many times its tokens are left before it."""


def chunk_tokens(pending_tokens: int, budget_tokens: int, tail_tokens: int) -> int:
    """How many of a prompt's pending tokens the next step computes, of at most `budget_tokens`: all that fit,
    but for a tail of `tail_tokens` (0: none) if they are many more."""
    if tail_tokens and pending_tokens >= (1 + LEAST_HEAD_TAILS) * tail_tokens:
        return min(budget_tokens, pending_tokens - tail_tokens)
    return min(budget_tokens, pending_tokens)
