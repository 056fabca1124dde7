"""Runs of tokens and the slots they go to or come from, as one table of numbers that a single launch reads.

Plain Python and no tensors: a table is built for every launch, on the path that bounds how fast one worker
moves KV.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from services.engine.errors import SegmentError
from services.engine.kv.layout import KvLayout

RUN_FIELDS = 8
"""int32 fields that describe a run: slot, 64-bit words, tokens, first token's place in its first page, first
head, heads, where its pages begin in the table, 0."""


class SlotRun(NamedTuple):
    """Tokens `[start_token, start_token + token_count)` of a sequence, and the staging slot that has them.

    `pages` is the sequence's page table from its first token, `heads` those of the pool's heads that are
    meant.
    """

    pages: list[int]
    start_token: int
    token_count: int
    slot: int
    heads: range


@dataclass(frozen=True, slots=True)
class RunTable:
    """`words`: int32, `RUN_FIELDS` for each run, then the pages of all of them. `byte_counts[i]` is what run
    `i` takes of its slot; `most_heads` and `most_tokens` those of the largest runs."""

    words: "array[int]"
    byte_counts: list[int]
    most_heads: int
    most_tokens: int


class RunTables:
    """Tables for a pool of `pages` pages whose numbers have `item_bytes` bytes."""

    def __init__(self, layout: KvLayout, pages: int, item_bytes: int) -> None:
        self._page_size, self._kv_heads, self._pages = layout.page_size_tokens, layout.kv_heads, pages
        self.head_bytes = layout.layers * 2 * layout.head_dim * item_bytes
        """Of one head of one token, in all layers."""

    def of(self, runs: Sequence[SlotRun], slots: int, slot_bytes: int) -> RunTable:
        """The slots are equal and numbered from 0. Raises `SegmentError` for a run that cannot be."""
        if not runs:
            raise SegmentError("no runs to move")
        size, kv_heads, head_bytes = self._page_size, self._kv_heads, self.head_bytes
        fields: list[int] = []
        pages: list[int] = []
        byte_counts: list[int] = []
        most_heads = most_tokens = 0
        pages_at = len(runs) * RUN_FIELDS
        for table, start, count, slot, heads in runs:
            if start < 0 or count < 1:
                raise SegmentError(f"segment needs start >= 0 and tokens >= 1, has {start} and {count}")
            first_page, end_page = start // size, (start + count - 1) // size + 1
            if end_page > len(table):
                raise SegmentError(f"{len(table)} pages do not cover tokens up to {start + count - 1}")
            first_head, end_head = heads.start, heads.stop
            head_count = end_head - first_head
            if head_count < 1 or first_head < 0 or end_head > kv_heads:
                raise SegmentError(f"{heads} out of range: the pool has {kv_heads} heads")
            byte_count = count * head_count * head_bytes
            if byte_count > slot_bytes or not 0 <= slot < slots:
                raise SegmentError(
                    f"segment of {byte_count} bytes does not fit the slot: "
                    f"{slot} of {slots} slots of {slot_bytes} bytes"
                )
            first_offset = start - first_page * size
            fields += (slot, byte_count >> 3, count, first_offset, first_head, head_count, pages_at, 0)
            pages += table[first_page:end_page]
            pages_at += end_page - first_page
            byte_counts.append(byte_count)
            if count > most_tokens:
                most_tokens = count
            if head_count > most_heads:
                most_heads = head_count
        if min(pages) < 0 or max(pages) >= self._pages:
            raise SegmentError(f"page out of range: the pool has {self._pages}")
        return RunTable(array("i", fields + pages), byte_counts, most_heads, most_tokens)
