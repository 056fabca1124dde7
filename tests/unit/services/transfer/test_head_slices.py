"""Transfers between workers of several ranks: which slices there are, and how they make one transfer."""

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
from services.transfer.head_slices import slices_of
from services.transfer.receiver import KvReceiver
from services.transfer.sender import KvSender
from tests.unit.services.fake_transfer import FakeClient, FakeCopier

KV_HEADS = 4
TOKENS = 10
SEGMENT_TOKENS = 4


@pytest.mark.parametrize("source_tp", [1, 2, 4])
@pytest.mark.parametrize("destination_tp", [1, 2, 4])
def test_every_head_travels_once(source_tp: int, destination_tp: int) -> None:
    slices = slices_of(99, KV_HEADS, source_tp, destination_tp)
    pairs = []
    for one in slices:
        source = head_range(KV_HEADS, one.source_rank, source_tp)
        destination = head_range(KV_HEADS, one.destination_rank, destination_tp)
        sent = [source[at] for at in one.source_heads]
        assert sent == [destination[at] for at in one.destination_heads]
        pairs += sent
    assert sorted(pairs) == list(range(KV_HEADS))
    assert len({one.slice_id for one in slices}) == len(slices) == max(source_tp, destination_tp)
    assert slices[0].slice_id == 99
    other = {one.slice_id for one in slices_of(100, KV_HEADS, source_tp, destination_tp)}
    assert not other & {one.slice_id for one in slices}


def sequence_of() -> Sequence:
    sequence = prompt_sequence(SequenceRequest(1, list(range(TOKENS)), Sampling(max_tokens=1, seed=1)))
    sequence.pages, sequence.computed_tokens, sequence.done_tokens = [0, 1, 2], TOKENS, TOKENS
    return sequence


class Sending:
    """A prefill worker of `tp` ranks with one open transfer, number 50."""

    def __init__(self, tp: int) -> None:
        self.clients = [FakeClient() for _ in range(tp)]
        self.copiers = [FakeCopier() for _ in range(tp)]
        ranks = zip(self.copiers, self.clients, strict=True)
        self.sender = KvSender(ranks, KV_HEADS, lambda: 0.0, Spans())  # type: ignore[arg-type]
        self.sender.open(sequence_of(), 50, 9.0)

    def confirm(self, slice_id: int, heads: int, tp: int, start: int = 0) -> Any:
        return self.sender.on_event(SendConfirmed(slice_id, start, TOKENS, heads, SEGMENT_TOKENS, tp))


def test_a_sender_opens_the_other_slices_when_it_knows_them() -> None:
    sending = Sending(tp=1)
    [client] = sending.clients
    assert client.opened == [50]
    first, second = slices_of(50, KV_HEADS, 1, 2)
    assert sending.confirm(50, heads=2, tp=2) is None, "half of the heads is not confirmed yet"
    assert client.opened == [50, second.slice_id]
    joined = sending.confirm(second.slice_id, heads=2, tp=2)
    assert isinstance(joined, SendConfirmed) and joined.transfer_id == 50
    for one in (first, second):
        slots = [SlotUse(at + one.destination_rank * 3, 1) for at in range(3)]
        assert sending.sender.on_event(SendGranted(one.slice_id, 3)) is None
        assert sending.sender.on_event(SlotsAssigned(slots)) is None
    assert sending.sender.pack() == 2 * TOKENS
    assert sending.sender.deliver() == 6
    assert {copy.heads for copy in sending.copiers[0].made} == {range(2), range(2, 4)}
    assert [copy.token_count for copy in sending.copiers[0].made] == [4, 4, 2] * 2
    assert sending.sender.on_event(SendCommitted(50)) is None
    assert sending.sender.on_event(SendCommitted(second.slice_id)) == SendCommitted(50)
    assert len(sending.sender) == 0 and not client.aborted


def test_a_transfer_fails_as_a_whole() -> None:
    sending = Sending(tp=2)
    slices = slices_of(50, KV_HEADS, 2, 2)
    assert sending.confirm(50, heads=2, tp=2) is None
    assert sending.sender.on_event(Aborted(slices[1].slice_id, "deadline")) == Aborted(50, "deadline")
    assert [client.aborted for client in sending.clients] == [[50], []], "that of rank 1 has ended by itself"
    assert len(sending.sender) == 0
    assert sending.sender.on_event(SendCommitted(50)) is None, "late news change nothing"


@pytest.mark.parametrize(
    ("heads", "tp", "start"), [(2, 2, 3), (4, 2, 0), (2, 3, 0)], ids=["tokens", "heads", "ranks"]
)
def test_a_destination_that_wants_something_else_is_given_up(heads: int, tp: int, start: int) -> None:
    sending = Sending(tp=1)
    if start:
        assert sending.confirm(50, heads=2, tp=2) is None
        ended = sending.confirm(slices_of(50, KV_HEADS, 1, 2)[1].slice_id, heads, tp, start)
    else:
        ended = sending.confirm(50, heads, tp)
    assert isinstance(ended, Aborted) and ended.transfer_id == 50
    assert set(sending.clients[0].aborted) == set(sending.clients[0].opened)


def test_the_loss_of_one_ranks_process_ends_all_slices() -> None:
    sending = Sending(tp=2)
    sending.confirm(50, heads=2, tp=2)
    assert sending.sender.on_event(TransferLost(7, rank=1)) == TransferLost(7, rank=1)
    sending.sender.rank_lost(1)
    assert sending.clients[0].aborted == [50]
    assert sending.clients[1].aborted == [], "nobody is there to be asked"
    assert len(sending.sender) == 0


class Receiving:
    """A decode worker of `tp` ranks that has asked two ranks for transfer 50."""

    def __init__(self, tp: int, cached_tokens: int = 0) -> None:
        self.clients = [FakeClient() for _ in range(tp)]
        self.copiers = [FakeCopier() for _ in range(tp)]
        ranks = zip(self.copiers, self.clients, strict=True)
        self.receiver = KvReceiver(ranks, KV_HEADS, lambda: 0.0, Spans())  # type: ignore[arg-type]
        sequence = sequence_of()
        sequence.cached_tokens = cached_tokens
        source = WorkerTransferAddress("ipc:///a", 1, (WorkerTransferAddress("ipc:///b", 2).ranks[0],))
        self.has_all = self.receiver.open(sequence, 50, source, 9.0)
        self.slices = slices_of(50, KV_HEADS, 2, tp)

    def arrive(self, slice_id: int, checksum: int | None = None) -> None:
        self.receiver.arrived(Arrived(slice_id, [Segment(1, 1, 0, TOKENS, 64, checksum)]))


@pytest.mark.parametrize("tp", [1, 2])
def test_a_transfer_is_whole_when_all_its_slices_are(tp: int) -> None:
    receiving = Receiving(tp)
    asked = [one for client in receiving.clients for one in client.asked]
    assert asked == [(one.slice_id, f"ipc:///{'ab'[one.source_rank]}", 2) for one in receiving.slices]
    first, second = receiving.slices
    receiving.arrive(first.slice_id)
    assert receiving.receiver.settle().whole == []
    receiving.arrive(second.slice_id)
    [whole] = receiving.receiver.settle().whole
    assert whole.transfer_id == 50 and not whole.slices and not receiving.has_all
    heads = [copy.heads for copier in receiving.copiers for copy in copier.made]
    assert heads == ([range(2), range(2, 4)] if tp == 1 else [range(2), range(2)])
    assert sorted(one for client in receiving.clients for one in client.committed) == sorted(
        one.slice_id for one in receiving.slices
    )
    assert len(receiving.receiver) == 0


def test_a_broken_slice_breaks_the_transfer() -> None:
    receiving = Receiving(2)
    first, second = receiving.slices
    receiving.arrive(first.slice_id)
    receiving.arrive(second.slice_id, checksum=5)
    [(transfer_id, reason)] = receiving.receiver.settle().broken
    assert transfer_id == 50 and "checksum" in reason
    assert receiving.receiver.end(50, abort_reason="checksum")
    assert receiving.clients[1].aborted == [second.slice_id]
    assert not receiving.receiver.end(50)


def test_the_end_of_one_slice_ends_the_transfer() -> None:
    receiving = Receiving(2)
    first, second = receiving.slices
    assert receiving.receiver.aborted(Aborted(first.slice_id, "source lost")) == 50
    assert receiving.clients[1].aborted == [second.slice_id]
    assert receiving.receiver.aborted(Aborted(second.slice_id, "source lost")) is None


def test_nothing_missing_is_committed_in_every_slice() -> None:
    receiving = Receiving(2, cached_tokens=TOKENS)
    assert receiving.has_all and len(receiving.receiver) == 0
    assert [len(client.committed) for client in receiving.clients] == [1, 1]


def test_slots_that_were_taken_in_before_their_transfer_ended_are_freed() -> None:
    """The clients are read one after the other, so an arrival of one slice may stand behind another's end.
    For the same turn only: the client itself frees what it reads later."""
    receiving = Receiving(2)
    first, second = receiving.slices
    assert receiving.receiver.aborted(Aborted(first.slice_id, "source lost")) == 50
    receiving.arrive(second.slice_id)
    assert [client.given_back for client in receiving.clients] == [[], [SlotUse(1, 1)]]
    assert receiving.receiver.settle().whole == [] and not receiving.receiver.in_flight
    receiving.arrive(second.slice_id)
    assert receiving.clients[1].given_back == [SlotUse(1, 1)], "its client has freed that one"
