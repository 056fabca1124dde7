"""Packs and unpacks of one rank as the leader's books see them: its own, or those of another process."""

from collections.abc import Sequence
from typing import Protocol

from kvtransfer.client import TransferClient
from kvtransfer.messages import KvGeometry
from services.engine.engine import Engine
from services.engine.marks import Mark, Marks
from services.engine.moves import Move
from services.engine.run_table import SlotRun
from services.rank_messages import HoldSteps, MapStaging, MoveKv, MoveRun
from services.ranks import Ranks
from services.staging import Staging


class KvMoves(Protocol):
    """Slots are numbers in the rank's staging buffer, heads are counted within the rank.

    One call is one launch: whoever has several runs hands them over together.
    """

    def pack(self, runs: Sequence[SlotRun], with_checksums: bool, after: Marks | None) -> Move:
        """It starts when all of `after` have passed; None: when all steps queued so far are done."""

    def unpack(self, runs: Sequence[SlotRun], with_checksums: bool, after: Marks | None) -> Move: ...

    def mark(self) -> Mark | None: ...

    def passed(self, mark: Mark | None) -> bool:
        """Whether what was queued before the mark is done, or waited for anyway; False: nobody knows."""

    def hold_steps(self, move: Move) -> None: ...

    def let_go(self) -> None:
        """The staging buffer's owner is gone: mapped, its memory would stay taken."""


class OwnMoves:
    """Of rank 0, in this process."""

    def __init__(self, engine: Engine, staging: Staging) -> None:
        self._engine, self._staging = engine, staging

    def pack(self, runs: Sequence[SlotRun], with_checksums: bool, after: Marks | None) -> Move:
        return self._engine.pack(runs, self._staging.slots(), with_checksums, after)

    def unpack(self, runs: Sequence[SlotRun], with_checksums: bool, after: Marks | None) -> Move:
        return self._engine.unpack(runs, self._staging.slots(), with_checksums, after)

    def mark(self) -> Mark | None:
        return self._engine.mark()

    def passed(self, mark: Mark | None) -> bool:
        return mark is not None and mark.query()

    def hold_steps(self, move: Move) -> None:
        self._engine.hold_steps(move)

    def let_go(self) -> None:
        self._staging.close()


class RankMoves:
    """Of another rank. It takes orders one after the other, so that a move comes after every step that was
    launched before it, whatever `after` says; there is no mark to wait for."""

    def __init__(
        self, ranks: Ranks, rank: int, client: TransferClient, geometry: KvGeometry, page_size_tokens: int
    ) -> None:
        self._ranks, self._rank, self._client = ranks, rank, client
        self._head_bytes = geometry.token_bytes // geometry.kv_heads
        self._page_size_tokens = page_size_tokens
        self._mapped_epoch = 0

    def open(self) -> None:
        """Has the buffer mapped now; see `Staging.open`. What goes wrong is the rank's answer to what it is
        told next."""
        self._map_staging()

    def pack(self, runs: Sequence[SlotRun], with_checksums: bool, after: Marks | None) -> Move:
        return self._move(True, runs, with_checksums)

    def unpack(self, runs: Sequence[SlotRun], with_checksums: bool, after: Marks | None) -> Move:
        return self._move(False, runs, with_checksums)

    def mark(self) -> Mark | None:
        return None

    def passed(self, mark: Mark | None) -> bool:
        return True

    def hold_steps(self, move: Move) -> None:
        self._ranks.tell_one(self._rank, HoldSteps())

    def let_go(self) -> None:
        self._ranks.tell_one(self._rank, MapStaging(0, 0, None, None))
        self._mapped_epoch = 0

    def _move(self, is_pack: bool, runs: Sequence[SlotRun], with_checksums: bool) -> Move:
        self._map_staging()
        size = self._page_size_tokens
        sent, byte_counts = [], []
        for pages, start, count, slot, heads in runs:
            covering = pages[start // size : (start + count - 1) // size + 1]
            sent.append(MoveRun(covering, start % size, count, slot, heads.start, heads.stop))
            byte_counts.append(count * len(heads) * self._head_bytes)
        answer = self._ranks.move(self._rank, MoveKv(is_pack, sent, with_checksums))
        # An answer asked as an event is, and as checksums that are on their way.
        return Move(byte_counts, answer, answer if with_checksums else None)  # type: ignore[arg-type]

    def _map_staging(self) -> None:
        """The rank maps the buffer of its transfer process, anew in each life of that."""
        attached = self._client.attached
        if self._mapped_epoch != attached.address.epoch:
            order = MapStaging(
                attached.slots, attached.slot_bytes, attached.staging_socket, attached.cuda_ipc_handle
            )
            self._ranks.tell_one(self._rank, order)
            self._mapped_epoch = attached.address.epoch
