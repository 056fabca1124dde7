"""Decode steps as CUDA graphs, one for each batch size of a ladder (as vLLM and SGLang do).

A decode step of a large model is some hundreds of kernels of a few microseconds; launched one by one, the
host is slower than the device. A graph is launched once. Its inputs lie at fixed addresses: what changes with
every step is packed by the host and sent in one copy, page tables are written where they have changed. A step
with fewer sequences than its graph has places leaves the rest at length 0, which reads no page, and at a
negative write row, which writes none.
"""

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from services.engine.attention.backend import KernelAttention, table_width
from services.engine.attention.decode_attention import decode_splits
from services.engine.attention.page_table_rows import TableSlots
from services.engine.batch import Row
from services.engine.errors import RowError
from services.engine.host_copy import aligned_bytes, indices, pinned, to_device
from services.engine.kv.layout import IntArray, KvLayout
from services.engine.kv.pool import KvPool
from services.engine.models.layers import Decoder
from services.engine.ops.processors import processors
from services.engine.step_inputs import StepInputs, with_sampled

LARGE_STEP = 16
NOT_WRITTEN = -(1 << 40)
"""A write row that stays negative whatever head is added to it."""


def ladder(max_batch: int) -> list[int]:
    """Batch sizes that get a graph: powers of two, then every `LARGE_STEP`, and the largest."""
    sizes = {1, 2, 4, 8, *range(LARGE_STEP, max_batch, LARGE_STEP), max_batch}
    return sorted(size for size in sizes if size <= max_batch)


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What one graph reads, one entry a place: int64 but for `lengths`, int32. `source` counts through the
    sampled ids and then through `tokens`; `write` is the pool row of the token's first head. `nonfinite`
    int32 is written too: it is sent as zeros (step_inputs.py)."""

    tokens: Tensor
    source: Tensor
    positions: Tensor
    write: Tensor
    lengths: Tensor
    nonfinite: Tensor


class DecodeGraphs:
    """`capture` once the pool is there, then `order` and `run` for every step that `takes` accepts.

    `sampled` int64 is where every step's draws are kept for the next one.
    """

    def __init__(
        self,
        decoder: Decoder,
        pool: KvPool,
        layout: KvLayout,
        max_batch: int,
        max_model_len: int,
        sampled: Tensor,
    ) -> None:
        self._decoder, self._pool, self._layout, self._sampled = decoder, pool, layout, sampled
        self._max_batch, self._max_model_len = max_batch, max_model_len
        self._ladder = ladder(max_batch)
        device = pool.data.device
        self._width = table_width(-(-max_model_len // layout.page_size_tokens))
        self._heads = (
            torch.arange(2 * layout.kv_heads, dtype=torch.int64, device=device) * layout.page_size_tokens
        )
        self._packed = torch.zeros(6 * aligned_bytes(8 * max_batch), dtype=torch.uint8, device=device)
        self._tables = torch.zeros((max_batch, self._width), dtype=torch.int32, device=device)
        self._slots = TableSlots(max_batch)
        self._logits = torch.empty(
            (max_batch, decoder.model.vocab_size), dtype=decoder.embedding.dtype, device=device
        )
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def capture(self) -> None:
        """Largest first, so that the smaller graphs find the shared memory pool already grown. All on one
        stream: cuBLAS keeps a workspace for each that it has seen."""
        shared = None
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        for batch in reversed(self._ladder):
            inputs = self._inputs(batch)
            self._send(indices([]), indices([]), indices([]), indices([]), batch)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                # compiles kernels and makes cuBLAS choose, which a capture must not
                self._forward(inputs, batch)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: NCCL's own thread asks the device about former collectives meanwhile
            mode = "thread_local" if self._decoder.group.size > 1 else "global"
            with torch.cuda.graph(graph, pool=shared, stream=stream, capture_error_mode=mode):
                self._forward(inputs, batch)
            shared = shared or graph.pool()
            self._graphs[batch] = graph

    def warm_up(self, layers: int) -> None:
        """What `capture` runs before it records, with only so many layers."""
        for batch in self._ladder:
            self._send(indices([]), indices([]), indices([]), indices([]), batch)
            self._forward(self._inputs(batch), batch, layers)

    def close(self) -> None:
        """Give up what was captured; none of it may be running. Dropping the graphs would not do: whoever
        holds a traceback holds them too."""
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()

    def takes(self, rows: list[Row]) -> bool:
        """One token of each row, each drawing, and no more rows than the largest graph."""
        return len(rows) <= self._max_batch and all(
            len(row.tokens) == 1 and row.samples and not row.targets for row in rows
        )

    def order(self, rows: list[Row]) -> list[int]:
        """Row numbers in the order in which `run` wants them."""
        return self._slots.place(rows)

    def run(self, rows: list[Row], sampled_at: list[int]) -> tuple[Tensor, Tensor]:
        """Logits `[rows, vocab]` and the tokens' marks (`StepInputs.nonfinite`), both overwritten by the next
        step; nothing is waited for. `rows` are in `order`, `sampled_at[i]` is where row i finds its token
        among the sampled ids, -1 if it brings its own.

        Raises `RowError` before anything runs."""
        count = len(rows)
        batch = self._ladder[bisect_left(self._ladder, count)]
        size = self._layout.page_size_tokens
        source = indices(sampled_at)
        tokens = indices([row.tokens[0] for row in rows])
        tokens[source >= 0] = 0
        positions = indices([row.start for row in rows])
        if tokens.min() < 0 or tokens.max() >= self._decoder.model.vocab_size:
            raise RowError(f"token out of range: the vocabulary has {self._decoder.model.vocab_size}")
        if positions.min() < 0 or positions.max() >= self._max_model_len:
            raise RowError(f"position out of range: a sequence has at most {self._max_model_len} tokens")
        try:
            pages = indices([row.pages[row.start // size] for row in rows])
        except IndexError:
            short = next(row for row in rows if row.start // size >= len(row.pages))
            raise RowError(f"{len(short.pages)} pages do not cover position {short.start}") from None
        self._write_tables(rows)
        self._send(tokens, source, positions, pages, batch)
        self._graphs[batch].replay()
        return self._logits[:count], self._inputs(batch).nonfinite[:count]

    def _write_tables(self, rows: list[Row]) -> None:
        """Send the pages that the tables lack: one copy and one kernel, however many rows changed."""
        changed = self._slots.changes(rows)
        if not changed:
            return
        new = [rows[slot].pages[first:] for slot, first in changed]
        counts = [len(pages) for pages in new]
        pages = np.array([page for run in new for page in run], dtype=np.int32)
        # where each run begins in the flattened tables, less what the runs before it count
        starts = indices([slot * self._width + first for slot, first in changed])
        cells = np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(len(pages))
        in_pool = len(pages) == 0 or (pages.min() >= 0 and pages.max() < self._pool.pages)
        if not in_pool or any(len(rows[slot].pages) > self._width for slot, _ in changed):
            self._slots = TableSlots(self._max_batch)  # what counts as written is not on the device
            raise RowError(f"page out of range: the pool has {self._pool.pages}")
        sent = to_device({"cells": cells, "pages": pages}, self._tables.device)
        self._tables.view(-1).index_copy_(0, sent["cells"], sent["pages"])

    def _send(
        self, tokens: IntArray, source: IntArray, positions: IntArray, pages: IntArray, batch: int
    ) -> None:
        """The graph's inputs in one copy, the places without a row filled in. `pages` are those that the
        tokens are written to."""
        count, layout = len(tokens), self._layout
        size = layout.page_size_tokens
        inputs = np.zeros((4, batch), dtype=np.int64)
        lengths = np.zeros(batch, dtype=np.int32)
        inputs[0, :count] = tokens
        inputs[1] = np.arange(batch) + self._sampled.shape[0]
        np.copyto(inputs[1, :count], source, where=source >= 0)
        inputs[2, :count] = positions
        inputs[3] = NOT_WRITTEN
        inputs[3, :count] = pages * (layout.layers * 2 * layout.kv_heads * size) + positions % size
        lengths[:count] = positions + 1
        host = pinned([*inputs, lengths, np.zeros(batch, dtype=np.int32)])
        self._packed[: host.shape[0]].copy_(host, non_blocking=True)

    def _inputs(self, batch: int) -> _Inputs:
        """Where `_send` puts the inputs of the graph for `batch`."""
        wide, narrow = aligned_bytes(8 * batch), aligned_bytes(4 * batch)

        def column(first: int, dtype: torch.dtype) -> Tensor:
            return self._packed[first : first + dtype.itemsize * batch].view(dtype)

        return _Inputs(
            tokens=column(0, torch.int64),
            source=column(wide, torch.int64),
            positions=column(2 * wide, torch.int64),
            write=column(3 * wide, torch.int64),
            lengths=column(4 * wide, torch.int32),
            nonfinite=column(4 * wide + narrow, torch.int32),
        )

    def _forward(self, inputs: _Inputs, batch: int, layers: int | None = None) -> None:
        device = self._pool.data.device
        none = torch.empty(0, dtype=torch.int32, device=device)
        attention = KernelAttention(
            decode_tables=self._tables[:batch],
            lengths=inputs.lengths,
            splits=decode_splits(batch, self._layout.kv_heads, self._max_model_len, processors(device)),
            chunk_tables=none,
            query_starts=none,
            query_counts=none,
            context_starts=none,
            max_query_count=0,
        )
        step = StepInputs(
            tokens=with_sampled(inputs.tokens, self._sampled, inputs.source),
            positions=inputs.positions,
            write_index=(inputs.write[:, None] + self._heads).view(-1),
            attention=attention,
            nonfinite=inputs.nonfinite,
        )
        hidden = self._decoder.forward(step, self._pool, layers)
        self._decoder.logits(hidden, out=self._logits[:batch])
