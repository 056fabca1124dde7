"""Turns the rows of one engine step into the tensors every layer shares."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from services.engine.attention_plan import IntArray, KvLayout, Sequence, SpanLimits, plan_spans
from services.engine.batch import Row
from services.engine.errors import RowError
from services.engine.model_config import ModelConfig
from services.engine.step_attention import SpanAttention, StepAttention, kernel_attention


@dataclass(frozen=True, slots=True)
class StepInputs:
    """`tokens`, `positions`: int64 `[tokens]`. `write_index`: int64 `[tokens * 2 * kv_heads]`, rows of
    `KvPool.layer_rows`. `attention` knows which tokens attend to which pages."""

    tokens: Tensor
    positions: Tensor
    write_index: Tensor
    attention: StepAttention


def order_rows(rows: list[Row]) -> list[int]:
    """Row numbers in the order their tokens take in the step: single tokens first, longest context first,
    so that rows which attend together are neighbours."""
    return sorted(range(len(rows)), key=lambda at: (len(rows[at].tokens) > 1, -rows[at].start))


def build_step(
    rows: list[Row],
    model: ModelConfig,
    layout: KvLayout,
    pages: int,
    limits: SpanLimits,
    device: torch.device,
) -> StepInputs:
    """Rows in `order_rows` order to device tensors. Raises `RowError` before anything is written: on a GPU
    an index out of range would end the whole process."""
    sequences: list[Sequence] = []
    first = 0
    for row in rows:
        table = np.array(row.pages, dtype=np.int64)
        count = len(row.tokens)
        if count < 1 or row.start < 0:
            raise RowError(f"row needs at least one token and a start >= 0, has {count} and {row.start}")
        if (row.start + count - 1) // layout.page_size_tokens >= len(table):
            raise RowError(f"{len(table)} pages do not cover positions up to {row.start + count - 1}")
        if table.min() < 0 or table.max() >= pages:
            raise RowError(f"page out of range: the pool has {pages}")
        sequences.append(Sequence(first, count, row.start, table))
        first += count

    tokens = np.fromiter((token for row in rows for token in row.tokens), dtype=np.int64, count=first)
    if tokens.min() < 0 or tokens.max() >= model.vocab_size:
        raise RowError(f"token out of range: the vocabulary has {model.vocab_size}")
    positions = np.concatenate([np.arange(s.start, s.start + s.count, dtype=np.int64) for s in sequences])
    attention: StepAttention
    if device.type == "cuda":
        attention = kernel_attention(sequences, layout.kv_heads, device)
    else:
        attention = SpanAttention(
            {
                window: plan_spans(sequences, layout, model.heads, window, limits, device)
                for window in set(model.windows)
            }
        )
    return StepInputs(
        tokens=torch.from_numpy(tokens).to(device),
        positions=torch.from_numpy(positions).to(device),
        write_index=torch.from_numpy(_write_index(sequences, positions, layout)).to(device),
        attention=attention,
    )


def _write_index(sequences: list[Sequence], positions: IntArray, layout: KvLayout) -> IntArray:
    """Layer 0's row for each token's each KV head, keys then values, as `[tokens * 2 * kv_heads]`."""
    size = layout.page_size_tokens
    pages = np.concatenate([s.pages[positions[s.first : s.first + s.count] // size] for s in sequences])
    heads = np.arange(2 * layout.kv_heads, dtype=np.int64)
    token_rows = pages * (layout.layers * 2 * layout.kv_heads * size) + positions % size
    return (token_rows[:, None] + heads[None, :] * size).reshape(-1)
