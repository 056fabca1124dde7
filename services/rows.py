"""From a step's plan to the engine's rows."""

from services.engine.batch import Draw, Row
from services.messages import Sampling
from services.scheduler.sequence import Scheduled


def needs_history(sampling: Sampling) -> bool:
    """Whether drawing looks at earlier tokens."""
    return (
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
    )


def row_of(scheduled: Scheduled) -> Row:
    """The row that computes `scheduled`; lists are shared with the sequence, not copied, where possible."""
    sequence, start, count = scheduled.sequence, scheduled.start, scheduled.count
    work = sequence.work
    row = Row(tokens=sequence.tokens[start : start + count], start=start, pages=sequence.pages)
    if scheduled.draws:
        history = needs_history(work.sampling)
        prompt = work.prompt if history else []
        output = sequence.output if history else []
        position = len(sequence.tokens)
        row.draws = [Draw(one, position, work.sampling, prompt, output) for one in sequence.choices]
    if work.sampling.prompt_logprobs is not None and wants_prompt_logprobs(scheduled):
        row.targets = sequence.tokens[start + 1 : start + count + 1]
        row.prompt_logprobs = work.sampling.prompt_logprobs
    return row


def wants_prompt_logprobs(scheduled: Scheduled) -> bool:
    """Only a prompt on its first way through; not a preempted choice, nor a second push."""
    sequence = scheduled.sequence
    return (
        sequence.work.sampling.prompt_logprobs is not None
        and len(sequence.tokens) == sequence.prompt_tokens
        and bool(sequence.choices)
    )
