"""From a step's plan to the engine's rows."""

from collections.abc import Iterable

from services.engine.batch import Row, SampleSpec
from services.scheduler.sequence import PENDING, Chunk, Sequence, StepPlan


def rows_of(plan: StepPlan) -> list[Row]:
    """One row for each decode, then one for each chunk, in the plan's order."""
    return [*map(decode_row, plan.decodes), *map(chunk_row, plan.chunks)]


def decode_row(sequence: Sequence) -> Row:
    """The last token of a sequence that has nothing else to compute, known or named by its sample; lists are
    shared, not copied."""
    token = sequence.tokens[-1]
    row = Row([token], sequence.computed_tokens, sequence.pages, _samples(sequence, sequence.choices))
    if token == PENDING:
        row.sampled_by = sequence.sample_index
    return row


def chunk_row(chunk: Chunk) -> Row:
    sequence, start, count = chunk.sequence, chunk.start, chunk.count
    row = Row(sequence.tokens[start : start + count], start, sequence.pages)
    if chunk.samples:
        row.samples = _samples(sequence, chunk.samples)
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


def _samples(sequence: Sequence, choices: Iterable[int]) -> list[SampleSpec]:
    sampling, position = sequence.work.sampling, len(sequence.tokens)
    prompt: list[int] = []
    output: list[int] = []
    if sequence.reads_output:
        work = sequence.work
        prompt = work.prompt[: sequence.output_start] if work.output_tokens else work.prompt
        output = sequence.output
    return [SampleSpec(choice, position, sampling, prompt, output) for choice in choices]
