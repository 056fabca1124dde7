"""How one step's tokens attend: by gathered spans (the torch reference, on a CPU) or by kernels on a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from services.engine.attention.decode_attention import decode_attention, decode_splits
from services.engine.attention.plan import AttentionSequence, AttentionSpan
from services.engine.attention.prefill_attention import prefill_attention
from services.engine.attention.reference import paged_attention
from services.engine.host_copy import Column
from services.engine.kv.pool import KvPool
from services.engine.ops.processors import processors

TABLE_ALIGNMENT = 16


class StepAttention(Protocol):
    def attend(self, queries: Tensor, pool: KvPool, layer: int, scale: float, window: int | None) -> Tensor:
        """`[tokens, heads, head_dim]` to the same; the step's keys and values are already in the pool."""


@dataclass(frozen=True, slots=True)
class SpanAttention:
    """`spans[window]` is the plan of the layers with that sliding window."""

    spans: dict[int | None, list[AttentionSpan]]

    def attend(self, queries: Tensor, pool: KvPool, layer: int, scale: float, window: int | None) -> Tensor:
        blocks, kv_scales = pool.layer_blocks[layer], pool.layer_scales(layer)
        return paged_attention(queries, blocks, self.spans[window], scale, kv_scales)


@dataclass(frozen=True, slots=True)
class KernelAttention:
    """The step's first tokens are one decode token of a sequence each, the rest are chunks.

    All tensors int32 on the device: page tables `[sequences, max_pages]`, `lengths` `[decodes]`, the others
    `[chunks]`, with `query_starts` counted from the first chunk's first token.
    """

    decode_tables: Tensor
    lengths: Tensor
    splits: int
    chunk_tables: Tensor
    query_starts: Tensor
    query_counts: Tensor
    context_starts: Tensor
    max_query_count: int

    def attend(self, queries: Tensor, pool: KvPool, layer: int, scale: float, window: int | None) -> Tensor:
        decodes, kv_scales = self.lengths.shape[0], pool.layer_scales(layer)
        out = torch.empty_like(queries, memory_format=torch.contiguous_format)
        if decodes:
            decode_attention(
                queries[:decodes],
                pool.data,
                layer,
                self.decode_tables,
                self.lengths,
                scale,
                window,
                splits=self.splits,
                out=out[:decodes],
                kv_scales=kv_scales,
            )
        if decodes < queries.shape[0]:
            prefill_attention(
                queries[decodes:],
                pool.data,
                layer,
                self.query_starts,
                self.query_counts,
                self.context_starts,
                self.chunk_tables,
                self.max_query_count,
                scale,
                window,
                out=out[decodes:],
                kv_scales=kv_scales,
            )
        return out


def kernel_columns(sequences: Sequence[AttentionSequence]) -> dict[str, Column]:
    """What `KernelAttention` reads on the device. Single-token sequences must come first."""
    decodes = [one for one in sequences if one.count == 1]
    chunks = list(sequences[len(decodes) :])
    base = len(decodes)

    def column(values: list[int]) -> Column:
        return np.array(values, dtype=np.int32)

    return {
        "decode_tables": _tables(decodes),
        "lengths": column([one.start + 1 for one in decodes]),
        "chunk_tables": _tables(chunks),
        "query_starts": column([one.first - base for one in chunks]),
        "query_counts": column([one.count for one in chunks]),
        "context_starts": column([one.start for one in chunks]),
    }


def kernel_attention(
    sent: dict[str, Tensor], sequences: Sequence[AttentionSequence], kv_heads: int, device: torch.device
) -> KernelAttention:
    """`sent` are `kernel_columns` on the device, which may hold others besides."""
    longest = max((one.start + 1 for one in sequences if one.count == 1), default=1)
    return KernelAttention(
        decode_tables=sent["decode_tables"],
        lengths=sent["lengths"],
        splits=decode_splits(max(1, sent["lengths"].shape[0]), kv_heads, longest, processors(device)),
        chunk_tables=sent["chunk_tables"],
        query_starts=sent["query_starts"],
        query_counts=sent["query_counts"],
        context_starts=sent["context_starts"],
        max_query_count=max((one.count for one in sequences if one.count > 1), default=0),
    )


def table_width(pages: int) -> int:
    """Of tables of so many pages: kernels are compiled for rows that begin at aligned addresses."""
    return -(-pages // TABLE_ALIGNMENT) * TABLE_ALIGNMENT


def _tables(sequences: Sequence[AttentionSequence]) -> Column:
    """Page tables side by side, `[sequences, width]`; what is beyond a sequence's own is never read."""
    width = table_width(max((len(one.pages) for one in sequences), default=1))
    table = np.zeros((len(sequences), width), dtype=np.int32)
    for at, one in enumerate(sequences):
        table[at, : len(one.pages)] = one.pages
    return table
