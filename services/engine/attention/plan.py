"""What every layer's attention of one step shares: which queries go together, which blocks of the pool they
read, and what is masked. Made once a step, so that a layer costs a few tensor operations however many
pages there are."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from services.engine.kv.layout import IntArray, KvLayout

MASKED = -1e30
"""Added to scores that must not count: finite, so that no difference of two of them is NaN."""


@dataclass(frozen=True, slots=True)
class KeyBlock:
    """`blocks`: int64 `[2 * sequences * kv_heads * pages]`, rows of `KvPool.layer_blocks`, keys first.

    `mask`: float32 `[sequences, queries, keys]` to add to the scores; None where all keys are seen.
    """

    blocks: Tensor
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class AttentionSpan:
    """Tokens `[first, end)` of the step: `sequences` equal runs that read equally many pages."""

    first: int
    end: int
    sequences: int
    kv_heads: int
    key_blocks: list[KeyBlock]


@dataclass(frozen=True, slots=True)
class AttentionSequence:
    """One row's queries: tokens `[first, first + count)` of the step, at positions `start ...`."""

    first: int
    count: int
    start: int
    pages: IntArray


@dataclass(frozen=True, slots=True)
class SpanLimits:
    """Bounds on what one attention call may hold, in float32 elements."""

    score_elements: int
    gather_elements: int


CPU_LIMITS = SpanLimits(1 << 20, 1 << 20)
"""4 MiB each: what is gathered is still in the cache when it is multiplied (a batch of 64 at 1000 tokens
gathers three times as fast in groups of 8 as at once)."""
CUDA_LIMITS = SpanLimits(16 << 20, 16 << 20)


def plan_spans(
    sequences: list[AttentionSequence],
    layout: KvLayout,
    heads: int,
    window: int | None,
    limits: SpanLimits,
    device: torch.device,
) -> list[AttentionSpan]:
    """Cut a step into spans. Single-token sequences must come first, sorted by descending length."""
    singles = [sequence for sequence in sequences if sequence.count == 1]
    spans = [
        _span(group, layout, heads, window, limits, device)
        for group in _groups(singles, layout, window, limits)
    ]
    for sequence in sequences[len(singles) :]:
        for run in _query_runs(sequence, layout, heads, limits):
            spans.append(_span([run], layout, heads, window, limits, device))
    return spans


def _page_range(sequence: AttentionSequence, layout: KvLayout, window: int | None) -> tuple[int, int]:
    """Pages `[first, end)` that the sequence's queries can see."""
    size = layout.page_size_tokens
    first = 0 if window is None else max(0, sequence.start - window + 1) // size
    return first, (sequence.start + sequence.count - 1) // size + 1


def _groups(
    singles: list[AttentionSequence], layout: KvLayout, window: int | None, limits: SpanLimits
) -> list[list[AttentionSequence]]:
    """Sequences whose padding to a common length is worth saving a call: within a factor of two."""
    page_elements = 2 * layout.kv_heads * layout.page_size_tokens * layout.head_dim
    groups: list[list[AttentionSequence]] = []
    longest = 0
    for sequence in singles:
        first, end = _page_range(sequence, layout, window)
        pages = end - first
        room = (
            groups and (len(groups[-1]) + 1) * max(longest, pages) * page_elements <= limits.gather_elements
        )
        if room and 2 * pages + 4 >= longest:
            groups[-1].append(sequence)
        else:
            groups.append([sequence])
            longest = 0
        longest = max(longest, pages)
    return groups


def _key_block_pages(layout: KvLayout, sequences: int, limits: SpanLimits) -> int:
    page_elements = 2 * layout.kv_heads * layout.page_size_tokens * layout.head_dim * sequences
    return max(1, limits.gather_elements // page_elements)


def _query_runs(
    sequence: AttentionSequence, layout: KvLayout, heads: int, limits: SpanLimits
) -> list[AttentionSequence]:
    """Split a prefill chunk so that its scores against one block of keys stay within the limit."""
    keys = _key_block_pages(layout, 1, limits) * layout.page_size_tokens
    keys = min(keys, sequence.start + sequence.count)
    run = max(1, limits.score_elements // (heads * keys))
    return [
        AttentionSequence(
            sequence.first + at, min(run, sequence.count - at), sequence.start + at, sequence.pages
        )
        for at in range(0, sequence.count, run)
    ]


def _span(
    group: list[AttentionSequence],
    layout: KvLayout,
    heads: int,
    window: int | None,
    limits: SpanLimits,
    device: torch.device,
) -> AttentionSpan:
    count = group[0].count
    ranges = [_page_range(sequence, layout, window) for sequence in group]
    pages = max(end - first for first, end in ranges)
    table = np.empty((len(group), pages), dtype=np.int64)
    for at, (sequence, (first, end)) in enumerate(zip(group, ranges, strict=True)):
        table[at, : end - first] = sequence.pages[first:end]
        table[at, end - first :] = sequence.pages[
            first
        ]  # padding reads the sequence's own data, and is masked
    first_keys = np.array([first * layout.page_size_tokens for first, _ in ranges], dtype=np.int64)
    starts = np.array([sequence.start for sequence in group], dtype=np.int64)

    key_blocks: list[KeyBlock] = []
    step = _key_block_pages(layout, len(group), limits)
    for at in range(0, pages, step):
        block_table = table[:, at : at + step]
        keys_from = first_keys + at * layout.page_size_tokens
        key_count = block_table.shape[1] * layout.page_size_tokens
        blocks = torch.from_numpy(_block_rows(block_table, layout)).to(device)
        key_blocks.append(KeyBlock(blocks, _mask(starts, count, keys_from, key_count, window, device)))
    return AttentionSpan(group[0].first, group[-1].first + count, len(group), layout.kv_heads, key_blocks)


def _block_rows(table: IntArray, layout: KvLayout) -> IntArray:
    """Rows of layer 0's blocks for a page table `[sequences, pages]`: `[k|v][sequence][kv_head][page]`."""
    page_rows = layout.layers * 2 * layout.kv_heads
    rows = table[:, None, :] * page_rows + np.arange(layout.kv_heads, dtype=np.int64)[None, :, None]
    return np.concatenate((rows.reshape(-1), rows.reshape(-1) + layout.kv_heads))


def _mask(
    starts: IntArray,
    count: int,
    keys_from: IntArray,
    key_count: int,
    window: int | None,
    device: torch.device,
) -> Tensor | None:
    """Causal and window mask `[sequences, count, key_count]`, or None if every query sees every key."""
    last_visible = bool((keys_from + key_count - 1 <= starts).all())
    first_visible = window is None or bool((keys_from > starts + count - 1 - window).all())
    if last_visible and first_visible:
        return None
    queries = (
        torch.from_numpy(starts).to(device)[:, None, None] + torch.arange(count, device=device)[None, :, None]
    )
    keys = (
        torch.from_numpy(keys_from).to(device)[:, None, None]
        + torch.arange(key_count, device=device)[None, None]
    )
    hidden = keys > queries
    if window is not None:
        hidden |= keys <= queries - window
    return torch.zeros(hidden.shape, dtype=torch.float32, device=device).masked_fill_(hidden, MASKED)
