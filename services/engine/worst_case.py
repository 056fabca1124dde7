"""The step that takes the most memory, which the ledger's activation line is measured with, and small ones
that use what it does not: every kernel of a draw is compiled before a request waits for it."""


from services.config import WorkerConfig
from services.engine.attention_plan import KvLayout, SpanLimits
from services.engine.batch import Draw, Row
from services.messages import MAX_TOP_LOGPROBS, Sampling

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


def worst_case_rows(
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

    def draw() -> Draw:
        return Draw(choice=0, position=context, sampling=_EVERY_FILTER, prompt=[0, 1], output=[])

    prefill = Row(
        tokens=[0] * chunk,
        start=context - chunk,
        pages=table,
        draws=[draw()],
        targets=[0] * min(chunk, logprob_rows),
        prompt_logprobs=MAX_TOP_LOGPROBS,
    )
    return [prefill] + [Row([0], context - 1, table, [draw()]) for _ in range(decodes)]


def draw_rows() -> list[Row]:
    """One token each on page 0, drawn in every way that has kernels of its own: the best, at random, at
    random among those that are kept; from the logits as they are, and from changed ones."""
    samplings = [
        Sampling(max_tokens=1, seed=1, temperature=temperature, top_p=top_p, repetition_penalty=penalty)
        for temperature, top_p in ((0.0, 1.0), (1.0, 1.0), (1.0, 0.9))
        for penalty in (1.0, 1.1)
    ]
    return [Row([0], 0, [0], [Draw(0, 1, sampling, [0], [])]) for sampling in samplings]
