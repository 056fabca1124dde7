"""Moves runs of sequences' tokens between their pages and staging slots, all of them by one launch, with
optional checksums.

Everything is queued on the current stream; nothing here waits for a device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.errors import SegmentError
from services.engine.kv.checksum import QueuedChecksums, queue_checksums
from services.engine.kv.pack_kernels import pack_runs, unpack_runs
from services.engine.kv.pinned_ring import TableRing
from services.engine.kv.pool import KvPool
from services.engine.kv.run_table import RunTables, SlotRun
from services.engine.kv.staging_view import host_view

Memory = memoryview | Tensor


@dataclass(frozen=True, slots=True)
class SlotBuffer:
    """A staging buffer: equal slots one behind the other, in mapped host memory or as uint8 of a device."""

    memory: Memory
    slot_bytes: int

    @property
    def slots(self) -> int:
        return len(self.memory) // self.slot_bytes

    def tensor(self) -> Tensor:
        """uint8 `[bytes]`. Raises `SegmentError` if it is none."""
        whole = self.memory if isinstance(self.memory, Tensor) else host_view(self.memory)
        if whole.dtype != torch.uint8 or whole.dim() != 1:
            raise SegmentError(f"slots are uint8 [bytes], not {whole.dtype} {tuple(whole.shape)}")
        return whole


class Segments:
    """Packs and unpacks of one pool, queued on one stream, at most `launches` at a time."""

    def __init__(self, pool: KvPool, launches: int) -> None:
        self._pool = pool
        self._tables = RunTables(pool.layout, pool.pages, pool.data.element_size())
        self.ring = TableRing(pool.data.device, launches)

    def pack(
        self, runs: Sequence[SlotRun], buffer: SlotBuffer, with_checksums: bool
    ) -> tuple[list[int], QueuedChecksums | None]:
        """Write each run to the head of its slot, as `[head][layer][k|v][token][head_dim]`.

        No two runs may share a slot. Returns the bytes written for each and, if asked for, their checksums.
        Raises `SegmentError`; then nothing was queued.
        """
        table = self._tables.of(runs, buffer.slots, buffer.slot_bytes)
        staging, sent = buffer.tensor(), self.ring.send(table.words)
        pack_runs(self._pool.data, staging, buffer.slot_bytes, sent, table)
        queued = None
        if with_checksums:
            queued = queue_checksums(staging, buffer.slot_bytes, sent, table)
        return table.byte_counts, queued

    def unpack(
        self, runs: Sequence[SlotRun], buffer: SlotBuffer, with_checksums: bool
    ) -> tuple[list[int], QueuedChecksums | None]:
        """The inverse of `pack`; no two runs may share a token of a page. Returns the bytes read for each
        and, if asked for, their checksums: the pages must not be used before those were compared."""
        table = self._tables.of(runs, buffer.slots, buffer.slot_bytes)
        staging, sent = buffer.tensor(), self.ring.send(table.words)
        queued = None
        if with_checksums:
            queued = queue_checksums(staging, buffer.slot_bytes, sent, table)
        unpack_runs(self._pool.data, staging, buffer.slot_bytes, sent, table)
        return table.byte_counts, queued
