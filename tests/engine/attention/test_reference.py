"""Paged attention against dense attention written out token by token, in plain numpy."""

import math

import numpy as np
import pytest
import torch

from services.engine.attention.plan import AttentionSequence, SpanLimits, plan_spans
from services.engine.attention.reference import paged_attention
from services.engine.kv.layout import KvLayout
from services.engine.kv.pool import KvPool

HEADS = 6
LAYOUT = KvLayout(layers=3, kv_heads=2, page_size_tokens=4, head_dim=8)
LAYER = 1
CPU = torch.device("cpu")
ROOMY = SpanLimits(1 << 20, 1 << 20)
TIGHT = SpanLimits(score_elements=HEADS * 8 * 3, gather_elements=2 * 2 * 4 * 8 * 2)
"""Two pages of keys at once, and three queries against them."""


def _dense(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, start: int, window: int | None
) -> np.ndarray:
    """`queries` [n, heads, dim] at positions start...; `keys`, `values` [length, kv_heads, dim]."""
    out = np.zeros_like(queries)
    for token in range(queries.shape[0]):
        position = start + token
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(HEADS):
            kv_head = head // (HEADS // LAYOUT.kv_heads)
            scores = keys[first : position + 1, kv_head] @ queries[token, head] / math.sqrt(LAYOUT.head_dim)
            weights = np.exp(scores - scores.max())
            out[token, head] = weights @ values[first : position + 1, kv_head] / weights.sum()
    return out


@pytest.mark.parametrize("limits", [ROOMY, TIGHT], ids=["roomy", "tight"])
@pytest.mark.parametrize("window", [None, 1, 5, 13])
def test_equals_dense_attention(window: int | None, limits: SpanLimits) -> None:
    rng = np.random.default_rng(0)
    pool = KvPool(LAYOUT, 96, torch.float32, CPU)
    pool.data.copy_(torch.from_numpy(rng.standard_normal(pool.data.shape, dtype=np.float32)))
    shapes = [(1, 40), (1, 37), (1, 19), (1, 3), (1, 0), (9, 0), (4, 30), (2, 15)]
    tables = rng.permutation(96)
    sequences, first, page = [], 0, 0
    for count, start in shapes:
        pages = -(-(start + count) // LAYOUT.page_size_tokens) + 1
        sequences.append(AttentionSequence(first, count, start, tables[page : page + pages].astype(np.int64)))
        first, page = first + count, page + pages
    queries = rng.standard_normal((first, HEADS, LAYOUT.head_dim), dtype=np.float32)

    spans = plan_spans(sequences, LAYOUT, HEADS, window, limits, CPU)
    covered = sorted(token for span in spans for token in range(span.first, span.end))
    assert covered == list(range(first))
    found = paged_attention(torch.from_numpy(queries), pool.layer_blocks[LAYER], spans, LAYOUT.head_dim**-0.5)

    for sequence in sequences:
        length = sequence.start + sequence.count
        held = pool.data[sequence.pages, LAYER].numpy()  # [pages, 2, kv_heads, page_size, dim]
        keys, values = held.transpose(1, 0, 3, 2, 4).reshape(2, -1, LAYOUT.kv_heads, LAYOUT.head_dim)[
            :, :length
        ]
        span = slice(sequence.first, sequence.first + sequence.count)
        expected = _dense(queries[span], keys, values, sequence.start, window)
        np.testing.assert_allclose(found[span].numpy(), expected, atol=2e-5)


def test_a_batch_of_decodes_of_like_length_is_one_call() -> None:
    table = np.zeros(64, dtype=np.int64)
    sequences = [AttentionSequence(at, 1, 250 - at, table) for at in range(64)]
    roomy = SpanLimits(1 << 24, 1 << 24)
    assert len(plan_spans(sequences, LAYOUT, HEADS, None, roomy, CPU)) == 1


def test_very_different_lengths_are_not_padded_to_the_longest() -> None:
    table = np.zeros(256, dtype=np.int64)
    starts = sorted((1000 if at == 0 else 20 for at in range(16)), reverse=True)
    sequences = [AttentionSequence(at, 1, start, table) for at, start in enumerate(starts)]
    assert [span.sequences for span in plan_spans(sequences, LAYOUT, HEADS, None, ROOMY, CPU)] == [1, 15]


def test_a_window_reads_only_the_pages_it_covers() -> None:
    sequence = AttentionSequence(0, 1, 400, np.arange(101, dtype=np.int64))
    (span,) = plan_spans([sequence], LAYOUT, HEADS, 9, ROOMY, CPU)
    pages = set((span.key_blocks[0].blocks // (LAYOUT.layers * 2 * LAYOUT.kv_heads)).tolist())
    assert pages == {98, 99, 100}
