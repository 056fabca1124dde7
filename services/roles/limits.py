"""Pure rules of every role: which work is taken in, and when a choice ends."""

from dataclasses import dataclass

from services.protocol.messages import MAX_CHOICES, Failed, FinishReason, SequenceRequest


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """What a worker can do for one request; the router knows it from `WorkerHello`."""

    vocab_size: int
    max_sequence_tokens: int
    max_batch: int
    max_queue: int
    eos_token_ids: frozenset[int]


def refuse(work: SequenceRequest, limits: WorkerLimits, queued: int) -> Failed | None:
    """Why this work cannot be taken, or None. Nothing has been kept for it yet."""

    def failed(code: str, message: str, retryable: bool = False) -> Failed:
        return Failed(work.request_id, code, message, retryable)  # type: ignore[arg-type]

    sampling = work.sampling
    if queued >= limits.max_queue:
        return failed("overloaded", f"{queued} requests are waiting; at most {limits.max_queue} may", True)
    if len(work.prompt) + 1 > limits.max_sequence_tokens:
        return failed(
            "too_long",
            f"the prompt has {len(work.prompt)} tokens; this worker holds at most "
            f"{limits.max_sequence_tokens - 1} and one to generate",
        )
    if work.output_tokens >= min(len(work.prompt), sampling.max_tokens):
        return failed("invalid", f"output_tokens is {work.output_tokens}: no prompt, or nothing to draw")
    if work.choice_numbers.stop > MAX_CHOICES:
        return failed("invalid", f"choice {work.choice_numbers.stop - 1} is over {MAX_CHOICES - 1}")
    if work.choices > limits.max_batch:
        return failed("invalid", f"n is {work.choices}; at most {limits.max_batch} choices fit a batch")
    for name, ids in (
        ("prompt", work.prompt),
        ("stop_token_ids", sampling.stop_token_ids),
        ("logit_bias", sampling.logit_bias),
    ):
        if ids and max(ids) >= limits.vocab_size:
            return failed("invalid", f"{name}: token id {max(ids)} is not in 0..{limits.vocab_size - 1}")
    return None


def finish_reason(
    work: SequenceRequest, token: int, output_tokens: int, limits: WorkerLimits
) -> FinishReason | None:
    """Whether `token`, a choice's `output_tokens`-th from its very beginning, ends the choice."""
    sampling = work.sampling
    if token in sampling.stop_token_ids:
        return "stop"
    if token in limits.eos_token_ids and not sampling.ignore_eos:
        return "stop"
    if output_tokens >= sampling.max_tokens:
        return "length"
    if len(work.prompt) - work.output_tokens + output_tokens >= limits.max_sequence_tokens:
        return "length"
    return None


def named_request(said: object) -> int | None:
    """The id that a message which is no request names as its own, if it is one."""
    if isinstance(said, dict) and isinstance(said.get("work"), dict):
        said = said["work"]
    named = said.get("request_id") if isinstance(said, dict) else None
    return named if type(named) is int and 0 < named < 2**63 else None
