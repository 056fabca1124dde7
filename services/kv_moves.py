"""Packs and unpacks of one rank as the leader's books see them: its own, or those of another process."""

from typing import Protocol

from kvtransfer.client import TransferClient
from kvtransfer.messages import KvGeometry
from services.engine.engine import Engine
from services.engine.moves import Mark, Move
from services.rank_messages import HoldSteps, MapStaging, MoveKv
from services.ranks import Ranks
from services.staging import Staging


class KvMoves(Protocol):
    """`slot` is a slot's number in the rank's staging buffer, `heads` are counted within the rank."""

    def pack(
        self,
        pages: list[int],
        start_token: int,
        token_count: int,
        slot: int,
        with_checksum: bool,
        after: Mark | None,
        heads: range,
    ) -> Move: ...

    def unpack(
        self,
        pages: list[int],
        start_token: int,
        token_count: int,
        slot: int,
        with_checksum: bool,
        after: Mark | None,
        heads: range,
    ) -> Move: ...

    def mark(self) -> Mark | None: ...

    def hold_steps(self, move: Move) -> None: ...

    def let_go(self) -> None:
        """The staging buffer's owner is gone: mapped, its memory would stay taken."""


class OwnMoves:
    """Of rank 0, in this process."""

    def __init__(self, engine: Engine, staging: Staging) -> None:
        self._engine, self._staging = engine, staging

    def pack(
        self,
        pages: list[int],
        start_token: int,
        token_count: int,
        slot: int,
        with_checksum: bool,
        after: Mark | None,
        heads: range,
    ) -> Move:
        view = self._staging.slot(slot)
        return self._engine.pack(pages, start_token, token_count, view, with_checksum, after, heads)

    def unpack(
        self,
        pages: list[int],
        start_token: int,
        token_count: int,
        slot: int,
        with_checksum: bool,
        after: Mark | None,
        heads: range,
    ) -> Move:
        view = self._staging.slot(slot)
        return self._engine.unpack(pages, start_token, token_count, view, with_checksum, after, heads)

    def mark(self) -> Mark | None:
        return self._engine.mark()

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

    def pack(
        self,
        pages: list[int],
        start_token: int,
        token_count: int,
        slot: int,
        with_checksum: bool,
        after: Mark | None,
        heads: range,
    ) -> Move:
        return self._move(True, pages, start_token, token_count, slot, with_checksum, heads)

    def unpack(
        self,
        pages: list[int],
        start_token: int,
        token_count: int,
        slot: int,
        with_checksum: bool,
        after: Mark | None,
        heads: range,
    ) -> Move:
        return self._move(False, pages, start_token, token_count, slot, with_checksum, heads)

    def mark(self) -> Mark | None:
        return None

    def hold_steps(self, move: Move) -> None:
        self._ranks.tell_one(self._rank, HoldSteps())

    def let_go(self) -> None:
        self._ranks.tell_one(self._rank, MapStaging(0, 0, None, None))
        self._mapped_epoch = 0

    def _move(
        self,
        is_pack: bool,
        pages: list[int],
        start_token: int,
        token_count: int,
        slot: int,
        with_checksum: bool,
        heads: range,
    ) -> Move:
        self._map_staging()
        size = self._page_size_tokens
        first, last = start_token // size, (start_token + token_count - 1) // size
        order = MoveKv(
            is_pack,
            pages[first : last + 1],
            start_token % size,
            token_count,
            slot,
            with_checksum,
            heads.start,
            heads.stop,
        )
        answer = self._ranks.move(self._rank, order)
        byte_count = token_count * len(heads) * self._head_bytes
        # An answer asked as an event is, and as a checksum that is on its way.
        return Move(byte_count, answer, answer if with_checksum else None)  # type: ignore[arg-type]

    def _map_staging(self) -> None:
        """The rank maps the buffer of its transfer process, anew in each life of that."""
        attached = self._client.attached
        if self._mapped_epoch != attached.address.epoch:
            order = MapStaging(
                attached.slots, attached.slot_bytes, attached.staging_socket, attached.cuda_ipc_handle
            )
            self._ranks.tell_one(self._rank, order)
            self._mapped_epoch = attached.address.epoch
