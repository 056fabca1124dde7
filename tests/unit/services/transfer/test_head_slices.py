"""Transfers between workers of several ranks: which parts there are, and how they are joined."""

from typing import Any

import pytest

from kvtransfer.client import SlotsAssigned, TransferLost
from kvtransfer.messages import (
    Aborted,
    Arrived,
    Segment,
    SendCommitted,
    SendConfirmed,
    SendGranted,
    SlotUse,
)
from kvtransfer.protocol.layout import head_range
from kvtransfer.spans import Spans
from services.protocol.messages import Sampling, SequenceRequest, WorkerTransferAddress
from services.scheduler.sequence import Sequence, prompt_sequence
from services.transfer.head_slices import parts_of
from services.transfer.pull import KvPull
from services.transfer.pull_parts import PullParts
from services.transfer.push import KvPush
from services.transfer.push_parts import PushParts
from tests.unit.services.fake_transfer import FakeClient, FakeMoves

KV_HEADS = 4
TOKENS = 10
SEGMENT_TOKENS = 4


@pytest.mark.parametrize("source_tp", [1, 2, 4])
@pytest.mark.parametrize("destination_tp", [1, 2, 4])
def test_every_head_travels_once(source_tp: int, destination_tp: int) -> None:
    parts = parts_of(99, KV_HEADS, source_tp, destination_tp)
    pairs = []
    for part in parts:
        source = head_range(KV_HEADS, part.source_rank, source_tp)
        destination = head_range(KV_HEADS, part.destination_rank, destination_tp)
        sent = [source[at] for at in part.source_heads]
        assert sent == [destination[at] for at in part.destination_heads]
        pairs += sent
    assert sorted(pairs) == list(range(KV_HEADS))
    assert len({part.part_id for part in parts}) == len(parts) == max(source_tp, destination_tp)
    assert parts[0].part_id == 99
    other = {part.part_id for part in parts_of(100, KV_HEADS, source_tp, destination_tp)}
    assert not other & {part.part_id for part in parts}


def sequence_of() -> Sequence:
    sequence = prompt_sequence(SequenceRequest(1, list(range(TOKENS)), Sampling(max_tokens=1, seed=1)))
    sequence.pages, sequence.computed_tokens, sequence.done_tokens = [0, 1, 2], TOKENS, TOKENS
    return sequence


class Pushing:
    """A prefill worker of `tp` ranks with one open transfer, number 50."""

    def __init__(self, tp: int) -> None:
        self.clients = [FakeClient() for _ in range(tp)]
        self.moves = [FakeMoves() for _ in range(tp)]
        lanes = [
            KvPush(*lane, lambda: 0.0, Spans())  # type: ignore[arg-type]
            for lane in zip(self.moves, self.clients, strict=True)
        ]
        self.push = PushParts(lanes, KV_HEADS)
        self.push.open(sequence_of(), 50, 9.0)

    def confirm(self, part_id: int, heads: int, tp: int, start: int = 0) -> Any:
        return self.push.join(SendConfirmed(part_id, start, TOKENS, heads, SEGMENT_TOKENS, tp))


def test_a_push_opens_the_other_parts_when_it_knows_them() -> None:
    pushing = Pushing(tp=1)
    [client] = pushing.clients
    assert client.opened == [50]
    first, second = parts_of(50, KV_HEADS, 1, 2)
    assert pushing.confirm(50, heads=2, tp=2) is None, "half of the heads is not confirmed yet"
    assert client.opened == [50, second.part_id]
    joined = pushing.confirm(second.part_id, heads=2, tp=2)
    assert isinstance(joined, SendConfirmed) and joined.transfer_id == 50
    for part in (first, second):
        slots = [SlotUse(at + part.destination_rank * 3, 1) for at in range(3)]
        assert pushing.push.join(SendGranted(part.part_id, 3)) is None
        assert pushing.push.join(SlotsAssigned(slots)) is None
    assert pushing.push.pack() == 2 * TOKENS
    assert pushing.push.deliver() == 6
    assert {move.heads for move in pushing.moves[0].made} == {range(2), range(2, 4)}
    assert [move.token_count for move in pushing.moves[0].made] == [4, 4, 2] * 2
    assert pushing.push.join(SendCommitted(50)) is None
    assert pushing.push.join(SendCommitted(second.part_id)) == SendCommitted(50)
    assert len(pushing.push) == 0 and not client.aborted


def test_a_push_fails_as_a_whole() -> None:
    pushing = Pushing(tp=2)
    parts = parts_of(50, KV_HEADS, 2, 2)
    assert pushing.confirm(50, heads=2, tp=2) is None
    assert pushing.push.join(Aborted(parts[1].part_id, "deadline")) == Aborted(50, "deadline")
    assert [client.aborted for client in pushing.clients] == [[50], []], "that of rank 1 has ended by itself"
    assert len(pushing.push) == 0
    assert pushing.push.join(SendCommitted(50)) is None, "late news change nothing"


@pytest.mark.parametrize(
    ("heads", "tp", "start"), [(2, 2, 3), (4, 2, 0), (2, 3, 0)], ids=["tokens", "heads", "ranks"]
)
def test_a_destination_that_wants_something_else_is_given_up(heads: int, tp: int, start: int) -> None:
    pushing = Pushing(tp=1)
    if start:
        assert pushing.confirm(50, heads=2, tp=2) is None
        ended = pushing.confirm(parts_of(50, KV_HEADS, 1, 2)[1].part_id, heads, tp, start)
    else:
        ended = pushing.confirm(50, heads, tp)
    assert isinstance(ended, Aborted) and ended.transfer_id == 50
    assert set(pushing.clients[0].aborted) == set(pushing.clients[0].opened)


def test_the_loss_of_one_ranks_process_ends_all_parts() -> None:
    pushing = Pushing(tp=2)
    pushing.confirm(50, heads=2, tp=2)
    assert pushing.push.join(TransferLost(7, rank=1)) == TransferLost(7, rank=1)
    pushing.push.clear(1)
    assert pushing.clients[0].aborted == [50]
    assert pushing.clients[1].aborted == [], "nobody is there to be told"
    assert len(pushing.push) == 0


class Pulling:
    """A decode worker of `tp` ranks that has asked two ranks for transfer 50."""

    def __init__(self, tp: int, cached_tokens: int = 0) -> None:
        self.clients = [FakeClient() for _ in range(tp)]
        self.moves = [FakeMoves() for _ in range(tp)]
        lanes = [
            KvPull(*lane, lambda: 0.0, Spans())  # type: ignore[arg-type]
            for lane in zip(self.moves, self.clients, strict=True)
        ]
        self.pull = PullParts(lanes, KV_HEADS)
        sequence = sequence_of()
        sequence.cached_tokens = cached_tokens
        source = WorkerTransferAddress("ipc:///a", 1, (WorkerTransferAddress("ipc:///b", 2).ranks[0],))
        self.incoming = self.pull.open(sequence, 50, source, 9.0)
        self.parts = parts_of(50, KV_HEADS, 2, tp)

    def arrive(self, part_id: int, checksum: int | None = None) -> None:
        self.pull.unpack(Arrived(part_id, [Segment(1, 1, 0, TOKENS, 64, checksum)]))


@pytest.mark.parametrize("tp", [1, 2])
def test_a_pull_is_whole_when_all_its_parts_are(tp: int) -> None:
    pulling = Pulling(tp)
    asked = [one for client in pulling.clients for one in client.asked]
    assert asked == [(part.part_id, f"ipc:///{'ab'[part.source_rank]}", 2) for part in pulling.parts]
    first, second = pulling.parts
    pulling.arrive(first.part_id)
    assert pulling.pull.settle().whole == []
    pulling.arrive(second.part_id)
    [whole] = pulling.pull.settle().whole
    assert (whole.transfer_id, whole.missing_tokens) == (50, 0) and whole is pulling.incoming
    heads = [move.heads for moves in pulling.moves for move in moves.made]
    assert heads == ([range(2), range(2, 4)] if tp == 1 else [range(2), range(2)])
    assert sorted(part for client in pulling.clients for part in client.committed) == sorted(
        part.part_id for part in pulling.parts
    )
    assert len(pulling.pull) == 0


def test_a_broken_part_breaks_the_pull() -> None:
    pulling = Pulling(2)
    first, second = pulling.parts
    pulling.arrive(first.part_id)
    pulling.arrive(second.part_id, checksum=5)
    [(transfer_id, reason)] = pulling.pull.settle().broken
    assert transfer_id == 50 and "checksum" in reason
    assert pulling.pull.close(50, abort_reason="checksum")
    assert pulling.clients[1].aborted == [second.part_id]
    assert not pulling.pull.close(50)


def test_the_end_of_one_part_ends_the_pull() -> None:
    pulling = Pulling(2)
    first, second = pulling.parts
    assert pulling.pull.aborted(Aborted(first.part_id, "source lost")) == 50
    assert pulling.clients[1].aborted == [second.part_id]
    assert pulling.pull.aborted(Aborted(second.part_id, "source lost")) is None


def test_nothing_missing_is_committed_in_every_part() -> None:
    pulling = Pulling(2, cached_tokens=TOKENS)
    assert pulling.incoming.missing_tokens == 0 and len(pulling.pull) == 0
    assert [len(client.committed) for client in pulling.clients] == [1, 1]
