"""Decode steps as CUDA graphs, one for each batch size of a ladder (as vLLM and SGLang do).

A decode step of a large model is some hundreds of kernels of a few microseconds; launched one by one, the
host is slower than the device. A graph is launched once. Its inputs lie at fixed addresses: token ids,
positions, the pool rows to write, page tables and lengths. A step with fewer sequences than its graph has
places leaves the rest at length 0, which reads no page, and at write row -1, which writes none.
"""

import numpy as np
import torch
from torch import Tensor

from services.engine.attention_plan import KvLayout
from services.engine.batch import Row
from services.engine.errors import RowError
from services.engine.kv_pool import KvPool
from services.engine.layers import Decoder
from services.engine.ops.decode_attention import decode_splits
from services.engine.step_attention import KernelAttention
from services.engine.step_inputs import StepInputs

TABLE_ALIGNMENT = 16
LARGE_STEP = 16


def ladder(max_batch: int) -> list[int]:
    """Batch sizes that get a graph: powers of two, then every `LARGE_STEP`, and the largest."""
    sizes = {1, 2, 4, 8, *range(LARGE_STEP, max_batch, LARGE_STEP), max_batch}
    return sorted(size for size in sizes if size <= max_batch)


class DecodeGraphs:
    """`capture` once the pool is there, then `run` for every step that `takes` accepts."""

    def __init__(
        self, decoder: Decoder, pool: KvPool, layout: KvLayout, max_batch: int, max_model_len: int
    ) -> None:
        self._decoder, self._pool, self._layout = decoder, pool, layout
        self._max_batch, self._max_model_len = max_batch, max_model_len
        device = pool.data.device
        pages = -(-max_model_len // layout.page_size_tokens)
        width = -(-pages // TABLE_ALIGNMENT) * TABLE_ALIGNMENT
        self._heads = np.arange(2 * layout.kv_heads, dtype=np.int64) * layout.page_size_tokens

        def pair(shape: tuple[int, ...], dtype: torch.dtype, fill: int = 0) -> tuple[Tensor, Tensor]:
            host = torch.full(shape, fill, dtype=dtype, pin_memory=True)
            return host, host.to(device)

        self._tokens_host, self._tokens = pair((max_batch,), torch.int64)
        self._positions_host, self._positions = pair((max_batch,), torch.int64)
        self._write_host, self._write = pair((max_batch, 2 * layout.kv_heads), torch.int64, -1)
        self._lengths_host, self._lengths = pair((max_batch,), torch.int32)
        self._tables_host, self._tables = pair((max_batch, width), torch.int32)
        self._held: list[list[int] | None] = [None] * max_batch
        self._held_pages = [0] * max_batch
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def capture(self) -> None:
        """Largest first, so that the smaller graphs find the shared memory pool already grown."""
        shared = None
        for batch in reversed(ladder(self._max_batch)):
            step = self._step(batch)
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._forward(step)  # compiles kernels and makes cuBLAS choose, which a capture must not
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=shared):
                logits = self._forward(step)
            shared = shared or graph.pool()
            self._graphs[batch] = (graph, logits)

    def takes(self, rows: list[Row]) -> bool:
        """One token of each row, each drawing, and no more rows than the largest graph."""
        return len(rows) <= self._max_batch and all(
            len(row.tokens) == 1 and row.draws and not row.targets for row in rows
        )

    def run(self, rows: list[Row]) -> Tensor:
        """Logits `[rows, vocab]`, overwritten by the next step. Raises `RowError` before anything runs."""
        count = len(rows)
        batch = next(size for size in ladder(self._max_batch) if size >= count)
        self._fill(rows, batch)
        graph, logits = self._graphs[batch]
        graph.replay()
        return logits[:count]

    def _fill(self, rows: list[Row], batch: int) -> None:
        count, layout = len(rows), self._layout
        size = layout.page_size_tokens
        tokens = np.fromiter((row.tokens[0] for row in rows), dtype=np.int64, count=count)
        positions = np.fromiter((row.start for row in rows), dtype=np.int64, count=count)
        if tokens.min() < 0 or tokens.max() >= self._decoder.model.vocab_size:
            raise RowError(f"token out of range: the vocabulary has {self._decoder.model.vocab_size}")
        if positions.min() < 0 or positions.max() >= self._max_model_len:
            raise RowError(f"position out of range: a sequence has at most {self._max_model_len} tokens")
        self._fill_tables(rows)
        tables = self._tables_host.numpy()
        own = tables[np.arange(count), positions // size].astype(np.int64)
        written = own * (layout.layers * 2 * layout.kv_heads * size) + positions % size
        self._tokens_host.numpy()[:count] = tokens
        self._positions_host.numpy()[:count] = positions
        self._lengths_host.numpy()[:count] = positions + 1
        self._lengths_host.numpy()[count:batch] = 0
        self._write_host.numpy()[:count] = written[:, None] + self._heads
        self._write_host.numpy()[count:batch] = -1
        for host, device in (
            (self._tokens_host, self._tokens),
            (self._positions_host, self._positions),
            (self._lengths_host, self._lengths),
            (self._write_host, self._write),
        ):
            device[:batch].copy_(host[:batch], non_blocking=True)

    def _fill_tables(self, rows: list[Row]) -> None:
        """Write the page tables that changed: a sequence's list only ever grows, or is another list."""
        tables = self._tables_host.numpy()
        changed: list[int] = []
        for row in rows:
            if row.start // self._layout.page_size_tokens >= len(row.pages):
                raise RowError(f"{len(row.pages)} pages do not cover position {row.start}")
        for at, row in enumerate(rows):
            pages = row.pages
            if self._held[at] is pages and self._held_pages[at] == len(pages):
                continue
            if min(pages) < 0 or max(pages) >= self._pool.pages or len(pages) > tables.shape[1]:
                self._held = [None] * self._max_batch  # what was written above is not on the device
                raise RowError(f"page out of range: the pool has {self._pool.pages}")
            tables[at, : len(pages)] = pages
            self._held[at], self._held_pages[at] = pages, len(pages)
            changed.append(at)
        if len(changed) > 8:
            self._tables[: len(rows)].copy_(self._tables_host[: len(rows)], non_blocking=True)
        else:
            for at in changed:
                self._tables[at].copy_(self._tables_host[at], non_blocking=True)

    def _step(self, batch: int) -> StepInputs:
        device = self._pool.data.device
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        none = torch.empty(0, dtype=torch.int32, device=device)
        attention = KernelAttention(
            decode_tables=self._tables[:batch],
            lengths=self._lengths[:batch],
            splits=decode_splits(batch, self._layout.kv_heads, self._max_model_len, processors),
            chunk_tables=none,
            query_starts=none,
            query_counts=none,
            context_starts=none,
            max_query_count=0,
        )
        return StepInputs(
            self._tokens[:batch], self._positions[:batch], self._write[:batch].view(-1), attention
        )

    def _forward(self, step: StepInputs) -> Tensor:
        return self._decoder.logits(self._decoder.forward(step, self._pool))
