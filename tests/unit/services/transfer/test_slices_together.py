"""Both sides of transfers between workers of several ranks, over the shipped state machines, in random order:
every token of every head arrives once and where it belongs, and everything is given back."""

import struct
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest

from kvtransfer.client import SlotsAssigned
from kvtransfer.messages import (
    Abort,
    Aborted,
    Commit,
    Filled,
    Freed,
    KvGeometry,
    OpenReceive,
    OpenSend,
    SendCommitted,
    SendConfirmed,
    SendReady,
    SendSlots,
    TransferAddress,
)
from kvtransfer.open_transfers import OpenTransfers
from kvtransfer.protocol.layout import head_range, rank_slot_bytes
from kvtransfer.protocol.limits import TransferLimits
from kvtransfer.protocol.machine import TransferMachine
from kvtransfer.spans import Spans
from services.engine.kv.copies import Copy
from services.engine.kv.run_table import SlotRun
from services.protocol.messages import Sampling, SequenceRequest
from services.protocol.messages import WorkerTransferAddress as WorkerAddress
from services.scheduler.sequence import prompt_sequence
from services.transfer.receiver import KvReceiver
from services.transfer.sender import KvSender

KV_HEADS = 4
GEOMETRY = KvGeometry("model", 1, KV_HEADS, 1, "float16")
HEAD_BYTES = GEOMETRY.token_bytes // KV_HEADS
SLOTS = 4
SLOT_BYTES = 1024
CELL = struct.Struct("<HBB")
assert CELL.size == HEAD_BYTES


class Rank:
    """One rank: its transfer process's state machine, its staging buffer, and the heads in its pages."""

    def __init__(self, epoch: int, rank: int, tp: int) -> None:
        self.address, self.rank = TransferAddress(f"ipc:///{epoch}", epoch), rank
        self.heads = head_range(KV_HEADS, rank, tp)
        self.slot_bytes = rank_slot_bytes(SLOT_BYTES, tp)
        limits = TransferLimits.of(GEOMETRY, SLOTS, self.slot_bytes, 0.5, 60.0, tp)
        self.machine = TransferMachine(limits)
        self.buffer = bytearray(SLOTS * self.slot_bytes)
        self.book = OpenTransfers()
        self.arrived: list[tuple[int, int, int]] = []
        """Request, token, head."""
        self.ready, self.checksum = True, False

    # ------------------------------------------------------------ as a client

    def open_send(self, transfer_id: int, deadline_s: float) -> None:
        self.book.open_send(transfer_id)
        self._say(OpenSend(transfer_id, deadline_s))

    def send_ready(self, transfer_id: int) -> None:
        self._say(SendReady(transfer_id))

    def open_receive(
        self, transfer_id: int, source: Any, start: int, end: int, left_s: float, n: int
    ) -> None:
        self.book.open_receive(transfer_id)
        self._say(OpenReceive(transfer_id, source, start, end, left_s, n))

    def filled(self, transfer_id: int, segments: list[Any]) -> None:
        self._say(Filled(transfer_id, segments))

    def freed(self, slots: list[Any]) -> None:
        self._say(Freed(slots))

    def commit(self, transfer_id: int) -> None:
        self.book.committed(transfer_id)
        self._say(Commit(transfer_id))

    def abort(self, transfer_id: int, reason: str) -> None:
        self._say(Abort(transfer_id, reason))
        self.book.end(transfer_id)

    def events(self) -> list[Any]:
        heard, self.machine.outbox.to_worker = self.machine.outbox.to_worker, []
        kept: list[Any] = []
        for event in heard:
            if isinstance(event, SendSlots):
                if self.book.assigned(event.slots):
                    kept.append(SlotsAssigned(event.slots, self.rank))
            elif self.book.follow(event):  # type: ignore[arg-type]
                kept.append(event)
        if self.book.freed:
            self._say(Freed(list(self.book.freed)))
            self.book.freed.clear()
        return kept

    def _say(self, command: Any) -> None:
        self.machine.on_command(command, 0.0)
        self.machine.settle(0.0)

    # ------------------------------------------------------------ as the rank's copier

    def pack(self, runs: Sequence[SlotRun], with_checksums: bool) -> Copy:
        byte_counts = []
        for pages, start, count, slot, heads in runs:
            data = b"".join(
                CELL.pack(token, self.heads[head], pages[0])
                for head in heads
                for token in range(start, start + count)
            )
            assert len(data) <= self.slot_bytes
            self.buffer[slot * self.slot_bytes : slot * self.slot_bytes + len(data)] = data
            byte_counts.append(len(data))
        return Copy(byte_counts)

    def unpack(self, runs: Sequence[SlotRun], with_checksums: bool) -> Copy:
        for pages, start, count, slot, heads in runs:
            at = slot * self.slot_bytes
            for head in heads:
                for token in range(start, start + count):
                    assert CELL.unpack_from(self.buffer, at) == (token, self.heads[head], pages[0])
                    self.arrived.append((pages[0], token, self.heads[head]))
                    at += CELL.size
        return Copy([run.token_count for run in runs])

    def passed_step(self) -> int:
        return 0

    def fence(self, copy: Copy) -> None: ...


class Pair:
    def __init__(self, source_tp: int, destination_tp: int, seed: int) -> None:
        self.rng = Random(seed)
        self.sources = [Rank(100 + rank, rank, source_tp) for rank in range(source_tp)]
        self.destinations = [Rank(200 + rank, rank, destination_tp) for rank in range(destination_tp)]
        self.sender = KvSender(self._ranks(self.sources), KV_HEADS, lambda: 0.0, Spans())
        self.receiver = KvReceiver(self._ranks(self.destinations), KV_HEADS, lambda: 0.0, Spans())
        self.by_epoch = {rank.address.epoch: rank for rank in (*self.sources, *self.destinations)}
        self.committed: list[int] = []
        self.whole: list[int] = []

    @staticmethod
    def _ranks(ranks: list[Rank]) -> Any:
        """Each is its own copier and client."""
        return zip(ranks, ranks, strict=True)

    def begin(self, number: int, tokens: int, cached: int) -> None:
        sequence = prompt_sequence(SequenceRequest(number, [1] * tokens, Sampling(max_tokens=1, seed=1)))
        sequence.pages, sequence.computed_tokens, sequence.done_tokens = [number], tokens, tokens
        there = prompt_sequence(sequence.work)
        there.pages, there.cached_tokens = [number], cached
        first, *others = (rank.address for rank in self.sources)
        source = WorkerAddress(first.endpoint, first.epoch, tuple(others))

        def open_receive_side() -> None:
            if self.receiver.open(there, 1000 + number, source, 9.0):
                self.whole.append(1000 + number)

        opens = [open_receive_side, lambda: self.sender.open(sequence, 1000 + number, 9.0)]
        self.rng.shuffle(opens)
        for open_one in opens:
            open_one()

    def step(self) -> None:
        """One rank takes in what is there for it, or what it has asked for is done."""
        rank = self.rng.choice([*self.sources, *self.destinations])
        if self.rng.random() < 0.5:
            self._carry_out(rank)
            return
        for event in rank.events():
            if isinstance(event, Aborted) and rank in self.destinations:
                self.receiver.aborted(event)
            elif rank in self.destinations:
                self.receiver.arrived(event)
            else:
                joined = self.sender.on_event(event)
                if isinstance(joined, SendConfirmed):
                    self.sender.ready(joined.transfer_id)
                elif isinstance(joined, SendCommitted):
                    self.committed.append(joined.transfer_id)
        self.sender.pack()
        self.sender.deliver()
        self.whole += [one.transfer_id for one in self.receiver.settle().whole]

    def _carry_out(self, rank: Rank) -> None:
        out, epoch = rank.machine.outbox, rank.address.epoch
        for address in out.connects:
            rank.machine.receiver.source_ready(address, 0.0)
        out.connects = []
        for write in out.writes:
            target = self.by_epoch[write.destination]
            for piece in write.pieces:
                start, at = piece.local_slot * rank.slot_bytes, piece.remote_slot * target.slot_bytes
                assert piece.byte_count <= target.slot_bytes
                data = rank.buffer[start : start + piece.byte_count]
                target.buffer[at : at + piece.byte_count] = data
            rank.machine.sender.write_done(write.write_id, 0.0)
        out.writes = []
        for address, message in out.to_sources:
            self.by_epoch[address.epoch].machine.on_destination(epoch, message, SLOTS, 0.0)
        for destination, message in out.to_destinations:
            self.by_epoch[destination].machine.on_source(rank.address, message, 0.0)
        out.to_sources, out.to_destinations = [], []
        for one in self.by_epoch.values():
            one.machine.settle(0.0)

    def at_rest(self) -> bool:
        ranks = self.by_epoch.values()
        return (
            not len(self.sender)
            and not len(self.receiver)
            and all(one.machine.pool.free == SLOTS and one.machine.next_deadline_s() is None for one in ranks)
        )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tp", [(1, 1), (1, 2), (2, 1), (1, 4), (4, 1), (2, 4), (4, 2), (2, 2)])
def test_every_head_of_every_token_arrives_once(tp: tuple[int, int], seed: int) -> None:
    pair = Pair(*tp, seed)
    wanted = []
    for number in range(1, 9):
        tokens = pair.rng.randrange(1, 300)
        cached = pair.rng.choice((0, tokens // 2, tokens))
        pair.begin(number, tokens, cached)
        wanted += [(number, token, head) for token in range(cached, tokens) for head in range(KV_HEADS)]
    for _ in range(20_000):
        pair.step()
        if pair.at_rest():
            break
    assert pair.at_rest()
    assert sorted(one for rank in pair.destinations for one in rank.arrived) == sorted(wanted)
    assert sorted(pair.committed) == sorted(pair.whole) == [1000 + number for number in range(1, 9)]


@pytest.mark.parametrize("tp", [(1, 4), (4, 2)])
def test_a_request_that_is_given_up_leaves_nothing(tp: tuple[int, int]) -> None:
    """On both sides, as a router says it, one first, at any time."""
    for seed in range(30):
        pair = Pair(*tp, seed)
        for number in range(1, 5):
            pair.begin(number, 200, 0)
        steps = [pair.rng.randrange(120) for _ in range(2)]
        sides = [pair.sender.end, pair.receiver.end]
        pair.rng.shuffle(sides)
        for count, end in zip(steps, sides, strict=True):
            for _ in range(count):
                pair.step()
            for number in range(1, 5):
                end(1000 + number, abort_reason="withdrawn")
        for _ in range(5_000):
            pair.step()
            if pair.at_rest():
                break
        assert pair.at_rest(), f"seed {seed}"
