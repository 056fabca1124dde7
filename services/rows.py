"""From a step's plan to the engine's rows."""

from services.engine.batch import Draw, Row
from services.messages import Sampling
from services.scheduler.sequence import Chunk, Sequence, StepPlan


def rows_of(plan: StepPlan) -> list[Row]:
    """One row for each decode, then one for each chunk, in the plan's order."""
    return [*map(decode_row, plan.decodes), *map(chunk_row, plan.chunks)]


def decode_row(sequence: Sequence) -> Row:
    """The last token of a sequence that has nothing else pending; lists are shared, not copied."""
    return Row([sequence.tokens[-1]], sequence.computed_tokens, sequence.pages, _draws(sequence))


def chunk_row(chunk: Chunk) -> Row:
    sequence, start, count = chunk.sequence, chunk.start, chunk.count
    row = Row(sequence.tokens[start : start + count], start, sequence.pages)
    if chunk.draws:
        row.draws = _draws(sequence)
    alternatives = sequence.work.sampling.prompt_logprobs
    if alternatives is not None and wants_prompt_logprobs(sequence):
        row.targets = sequence.tokens[start + 1 : start + count + 1]
        row.prompt_logprobs = alternatives
    return row


def wants_prompt_logprobs(sequence: Sequence) -> bool:
    """Only a prompt on its first way through; not a preempted choice, nor a second push."""
    return (
        sequence.work.sampling.prompt_logprobs is not None
        and len(sequence.tokens) == sequence.prompt_tokens
        and bool(sequence.choices)
    )


def _draws(sequence: Sequence) -> list[Draw]:
    sampling, position = sequence.work.sampling, len(sequence.tokens)
    history = _needs_history(sampling)
    prompt = sequence.work.prompt if history else []
    output = sequence.output if history else []
    return [Draw(choice, position, sampling, prompt, output) for choice in sequence.choices]


def _needs_history(sampling: Sampling) -> bool:
    return (
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
    )
