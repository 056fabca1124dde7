"""Packs and unpacks of one rank as sender and receiver queue them: in rank 0, or in another process."""

from collections.abc import Sequence
from typing import Protocol

from kvtransfer.client import TransferClient
from services.engine.engine import Engine
from services.engine.events import NOW
from services.engine.kv.copies import Copy
from services.engine.kv.run_table import SlotRun
from services.tensor_parallel.leader_engine import LeaderEngine
from services.tensor_parallel.messages import CopyKv, CopyRun, FenceSteps, MapStaging
from services.transfer.staging import StagingSlots


class KvCopier(Protocol):
    """Slots are numbers in the rank's staging buffer, heads are counted within the rank.

    One call is one launch: whoever has several runs hands them over together. What a copy needs must be done
    already, by `passed_step`: nothing is queued that would wait.
    """

    def pack(self, runs: Sequence[SlotRun], with_checksums: bool) -> Copy: ...

    def unpack(self, runs: Sequence[SlotRun], with_checksums: bool) -> Copy: ...

    def passed_step(self) -> int:
        """The number of the newest step that is done; see `Engine.passed_step`."""

    def fence(self, copy: Copy) -> None:
        """See `Engine.fence`."""

    def unmap_staging(self) -> None:
        """The staging buffer's owner is gone: mapped, its memory would stay taken."""


class OwnCopier:
    """Of rank 0, in this process."""

    def __init__(self, engine: Engine, staging: StagingSlots) -> None:
        self._engine, self._staging = engine, staging

    def pack(self, runs: Sequence[SlotRun], with_checksums: bool) -> Copy:
        return self._engine.pack(runs, self._staging.slots(), with_checksums, NOW)

    def unpack(self, runs: Sequence[SlotRun], with_checksums: bool) -> Copy:
        return self._engine.unpack(runs, self._staging.slots(), with_checksums, NOW)

    def passed_step(self) -> int:
        return self._engine.passed_step()

    def fence(self, copy: Copy) -> None:
        self._engine.fence(copy)

    def unmap_staging(self) -> None:
        self._staging.close()


class RankCopier:
    """Of another rank. It queues the same steps under the same numbers; what has passed in the leading rank
    is about to pass there, and its device waits for that."""

    def __init__(
        self, engine: LeaderEngine, rank: int, client: TransferClient, page_size_tokens: int
    ) -> None:
        self._engine, self._ranks, self._rank, self._client = engine, engine.ranks, rank, client
        self._head_bytes = engine.geometry.token_bytes // engine.geometry.kv_heads
        self._page_size_tokens = page_size_tokens
        self._mapped_epoch = 0

    def pack(self, runs: Sequence[SlotRun], with_checksums: bool) -> Copy:
        return self._copy(True, runs, with_checksums)

    def unpack(self, runs: Sequence[SlotRun], with_checksums: bool) -> Copy:
        return self._copy(False, runs, with_checksums)

    def passed_step(self) -> int:
        return self._engine.passed_step()

    def fence(self, copy: Copy) -> None:
        self._ranks.send_one(self._rank, FenceSteps())

    def map_staging(self) -> None:
        """Has the rank map the buffer of its transfer process, anew in each incarnation of that. What goes
        wrong is the rank's answer to the next command."""
        attached = self._client.attached
        if self._mapped_epoch != attached.address.epoch:
            command = MapStaging(
                attached.slots, attached.slot_bytes, attached.staging_socket, attached.cuda_ipc_handle
            )
            self._ranks.send_one(self._rank, command)
            self._mapped_epoch = attached.address.epoch

    def unmap_staging(self) -> None:
        self._ranks.send_one(self._rank, MapStaging(0, 0, None, None))
        self._mapped_epoch = 0

    def _copy(self, is_pack: bool, runs: Sequence[SlotRun], with_checksums: bool) -> Copy:
        self.map_staging()
        size = self._page_size_tokens
        sent, byte_counts = [], []
        for pages, start, count, slot, heads in runs:
            covering = pages[start // size : (start + count - 1) // size + 1]
            sent.append(CopyRun(covering, start % size, count, slot, heads.start, heads.stop))
            byte_counts.append(count * len(heads) * self._head_bytes)
        command = CopyKv(is_pack, self.passed_step(), sent, with_checksums)
        answer = self._ranks.copy_kv(self._rank, command)
        # An answer is asked as an event is, and as checksums that are on their way.
        return Copy(byte_counts, answer, answer if with_checksums else None)  # type: ignore[arg-type]
