"""Turns the rows of one engine step into the tensors every layer shares."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from services.engine.attention.backend import SpanAttention, StepAttention, kernel_attention, kernel_columns
from services.engine.attention.plan import AttentionSequence, SpanLimits, plan_spans
from services.engine.batch import Row
from services.engine.errors import RowError
from services.engine.host_copy import Column, to_device
from services.engine.kv.layout import IntArray, KvLayout


@dataclass(frozen=True, slots=True)
class StepInputs:
    """`tokens`, `positions`: int64 `[tokens]`. `write_index`: int64 `[tokens * 2 * kv_heads]`, rows of
    `KvPool.layer_rows`. `attention` knows which tokens attend to which pages. `nonfinite`: int32 `[tokens]`,
    zeros, where the forward marks tokens whose queries, keys or values are not all finite."""

    tokens: Tensor
    positions: Tensor
    write_index: Tensor
    attention: StepAttention
    nonfinite: Tensor


def order_rows(rows: list[Row]) -> list[int]:
    """Row numbers in the order their tokens take in the step: single tokens first, longest context first,
    so that rows which attend together are neighbours."""
    return sorted(range(len(rows)), key=lambda at: (len(rows[at].tokens) > 1, -rows[at].start))


def check_row(row: Row, vocab_size: int, samples_before: int) -> None:
    """What neither `build_step` nor a graph sees, and what on a GPU would end the process. `samples_before`
    is how many draws the launch before had. Raises `RowError`."""
    if row.sampled_by >= 0 and (len(row.tokens) != 1 or row.sampled_by >= samples_before):
        raise RowError(
            f"row of {len(row.tokens)} tokens wants sample {row.sampled_by} of {samples_before} "
            "for its only one"
        )
    if len(row.targets) > len(row.tokens):
        raise RowError(f"row has {len(row.targets)} targets for {len(row.tokens)} tokens")
    if row.targets and not 0 <= min(row.targets) <= max(row.targets) < vocab_size:
        raise RowError(f"target out of range: the vocabulary has {vocab_size}")
    for draw in row.samples:
        sampling = draw.sampling
        if not sampling.logit_bias and sampling.repetition_penalty == 1.0:
            continue
        named = list(sampling.logit_bias)
        if sampling.repetition_penalty != 1.0:
            named += draw.prompt
        if named and not 0 <= min(named) <= max(named) < vocab_size:
            raise RowError(f"draw names a token out of range: the vocabulary has {vocab_size}")


class AttendingModel(Protocol):
    """What a step's tensors depend on of a model; `windows` has each layer's sliding window."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def heads(self) -> int: ...

    @property
    def windows(self) -> tuple[int | None, ...]: ...


def with_sampled(tokens: Tensor, sampled: Tensor, source: Tensor) -> Tensor:
    """int64 `[tokens]`: each from where `source` says, counted through `sampled` and then through
    `tokens`."""
    return torch.cat((sampled, tokens)).index_select(0, source)


def build_step(
    rows: list[Row],
    sampled: Tensor,
    sampled_at: list[int],
    model: AttendingModel,
    layout: KvLayout,
    pages: int,
    limits: SpanLimits,
) -> StepInputs:
    """Rows in `order_rows` order to tensors of `sampled`'s device, without waiting for it. `sampled` int64
    holds the draws of the launch before; `sampled_at[i]` is where row i finds its token there, -1 if it
    brings its own. Raises `RowError` before anything is written: an index out of range would end a GPU's
    process."""
    device = sampled.device
    sequences: list[AttentionSequence] = []
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
        sequences.append(AttentionSequence(first, count, row.start, table))
        first += count

    tokens = np.fromiter((token for row in rows for token in row.tokens), dtype=np.int64, count=first)
    waiting = [(one.first, at) for one, at in zip(sequences, sampled_at, strict=True) if at >= 0]
    tokens[[at for at, _ in waiting]] = 0
    if tokens.min() < 0 or tokens.max() >= model.vocab_size:
        raise RowError(f"token out of range: the vocabulary has {model.vocab_size}")
    positions = np.concatenate([np.arange(s.start, s.start + s.count, dtype=np.int64) for s in sequences])
    columns: dict[str, Column] = {
        "tokens": tokens,
        "positions": positions,
        "write_index": _write_index(sequences, positions, layout),
        "nonfinite": np.zeros(first, dtype=np.int32),
    }
    if waiting:
        source = np.arange(first, dtype=np.int64) + sampled.shape[0]
        source[[at for at, _ in waiting]] = [draw for _, draw in waiting]
        columns["source"] = source
    if device.type == "cuda":
        columns |= kernel_columns(sequences)
    sent = to_device(columns, device)
    attention: StepAttention
    if device.type == "cuda":
        attention = kernel_attention(sent, sequences, layout.kv_heads, device)
    else:
        attention = SpanAttention(
            {
                window: plan_spans(sequences, layout, model.heads, window, limits, device)
                for window in set(model.windows)
            }
        )
    return StepInputs(
        tokens=with_sampled(sent["tokens"], sampled, sent["source"]) if waiting else sent["tokens"],
        positions=sent["positions"],
        write_index=sent["write_index"],
        attention=attention,
        nonfinite=sent["nonfinite"],
    )


def _write_index(sequences: list[AttentionSequence], positions: IntArray, layout: KvLayout) -> IntArray:
    """Layer 0's row for each token's each KV head, keys then values, as `[tokens * 2 * kv_heads]`."""
    size = layout.page_size_tokens
    pages = np.concatenate([s.pages[positions[s.first : s.first + s.count] // size] for s in sequences])
    heads = np.arange(2 * layout.kv_heads, dtype=np.int64)
    token_rows = pages * (layout.layers * 2 * layout.kv_heads * size) + positions % size
    return (token_rows[:, None] + heads[None, :] * size).reshape(-1)
