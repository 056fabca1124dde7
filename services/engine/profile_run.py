"""The step that takes the most memory, which the ledger's activation line is measured with, and small ones
that use what it does not: every kernel is compiled before a request waits for it."""

from dataclasses import replace

import msgspec

from services.config import WorkerConfig
from services.engine.attention.decode_attention import decode_splits
from services.engine.attention.plan import SpanLimits
from services.engine.batch import Row, SampleSpec
from services.engine.kv.layout import KvLayout
from services.engine.ops.small_gemm import MAX_TOKENS
from services.protocol.messages import MAX_TOP_LOGPROBS, Sampling

_EVERY_FILTER = Sampling(
    max_tokens=1,
    seed=1,
    temperature=1.0,
    top_p=0.9,
    top_k=0,
    min_p=0.01,
    repetition_penalty=1.1,
    logprobs=MAX_TOP_LOGPROBS,
)


def profile_rows(
    config: WorkerConfig,
    layout: KvLayout,
    limits: SpanLimits,
    pages: int,
    max_model_len: int,
    logprob_rows: int,
) -> list[Row]:
    """Rows of one step with `max_chunk_tokens` tokens and `max_batch` draws: one prefill chunk and otherwise
    decodes, all at long contexts. Page tables cycle through `pages` scratch pages.

    Attention's memory stops growing once a block of keys is full, so a context of a few blocks is enough.
    """
    tokens = max(1, min(config.max_chunk_tokens, max_model_len))
    block_tokens = limits.gather_elements // (2 * layout.kv_heads * layout.head_dim) + 1
    context = min(max_model_len, tokens + 2 * block_tokens)
    decodes = min(config.max_batch - 1, config.max_chunk_tokens - 1)
    chunk = max(1, min(config.max_chunk_tokens - decodes, context))
    table = [at % pages for at in range(-(-context // layout.page_size_tokens))]

    def draw() -> SampleSpec:
        return SampleSpec(choice=0, position=context, sampling=_EVERY_FILTER, prompt=[0, 1], output=[])

    prefill = Row(
        tokens=[0] * chunk,
        start=context - chunk,
        pages=table,
        samples=[draw()],
        targets=[0] * min(chunk, logprob_rows),
        prompt_logprobs=MAX_TOP_LOGPROBS,
    )
    return [prefill] + [Row([0], context - 1, table, [draw()]) for _ in range(decodes)]


def sample_rows() -> list[Row]:
    """One token each on page 0, sampled in every way that has kernels of its own: the best, at random, at
    random among those that are kept; from the logits as they are, and from changed ones."""
    samplings = [
        Sampling(max_tokens=1, seed=1, temperature=temperature, top_p=top_p, repetition_penalty=penalty)
        for temperature, top_p in ((0.0, 1.0), (1.0, 1.0), (1.0, 0.9))
        for penalty in (1.0, 1.1)
    ]
    return [Row([0], 0, [0], [SampleSpec(0, 1, sampling, [0], [])]) for sampling in samplings]


def small_chunks(config: WorkerConfig, max_model_len: int) -> list[Row]:
    """A chunk on page 0 of each number of tokens that small products are told apart by, each for a step of
    its own."""
    most = min(MAX_TOKENS, config.max_chunk_tokens, max_model_len)
    return [Row([0] * size, 0, [0] * -(-size // config.page_size_tokens)) for size in powers_of_two(most)]


def mixed_steps(
    config: WorkerConfig, kv_heads: int, max_model_len: int, processor_count: int
) -> list[list[Row]]:
    """A chunk and some decodes, on page 0: for the least and the largest batch of each launch that was
    tuned, one step for each number of splits that decode attention takes beside a chunk."""
    steps: dict[tuple[int, int], list[Row]] = {}
    largest = min(config.max_batch, config.max_chunk_tokens) - 1
    powers = powers_of_two(largest)
    for batch in sorted({*powers, *(power + 1 for power in powers if power < largest)}):
        for context in powers_of_two(max_model_len):
            splits = decode_splits(batch, kv_heads, context, processor_count)
            decode = Row([0], context - 1, [0] * -(-context // config.page_size_tokens))
            steps.setdefault((batch, splits), [Row([0, 0], 0, [0]), *[decode] * batch])
    return list(steps.values())


def without_logprobs(rows: list[Row]) -> list[Row]:
    """The same rows, but that nothing is looked up by the ids that are sampled."""

    def silent(draw: SampleSpec) -> SampleSpec:
        return replace(draw, sampling=msgspec.structs.replace(draw.sampling, logprobs=None))

    return [replace(row, samples=[silent(draw) for draw in row.samples], targets=[]) for row in rows]


def powers_of_two(most: int) -> list[int]:
    """Up to `most`."""
    return [1 << power for power in range(most.bit_length())]
