"""Transfers of some of a rank's heads, and between slots of different sizes."""

import pytest

from kvtransfer.errors import TransferConfigError
from kvtransfer.messages import (
    Aborted,
    Arrived,
    Filled,
    KvGeometry,
    OpenReceive,
    OpenSend,
    Segment,
    SendConfirmed,
    SendGranted,
    SendReady,
    SendSlots,
    SlotUse,
    TransferAddress,
)
from kvtransfer.protocol.layout import head_range, rank_slot_bytes, shared_heads, tokens_per_slot
from kvtransfer.protocol.limits import TransferLimits
from kvtransfer.protocol.machine import TransferMachine
from kvtransfer.protocol.peer_messages import CancelTransfer, Grant, Offer, Written

GEOMETRY = KvGeometry("model", 1, 8, 2, "float16")
HEAD_BYTES = 8
SOURCE = TransferAddress("ipc:///source", 5)
HERE = 77


def machine(tp: int, slot_tokens: int) -> TransferMachine:
    """Of one of `tp` ranks, whose slots hold so many tokens of all its heads."""
    slot_bytes = slot_tokens * GEOMETRY.token_bytes // tp
    return TransferMachine(TransferLimits.of(GEOMETRY, 8, slot_bytes, 0.5, 60.0, tp))


def segment(use: SlotUse, tokens: int, heads: int) -> Segment:
    return Segment(use.slot, use.generation, 0, tokens, tokens * heads * HEAD_BYTES)


def test_every_head_is_in_one_rank_and_shared_by_pairs() -> None:
    for tp in (1, 2, 4, 8):
        assert [head for rank in range(tp) for head in head_range(8, rank, tp)] == list(range(8))
    assert shared_heads(head_range(8, 1, 2), head_range(8, 2, 4)) == range(4, 6)
    assert not shared_heads(head_range(8, 0, 2), head_range(8, 2, 4))
    assert rank_slot_bytes(16 << 20, 8) == 2 << 20
    assert rank_slot_bytes(1000, 3) == 256
    assert tokens_per_slot(GEOMETRY, 640, 2) == 2 * tokens_per_slot(GEOMETRY, 640)
    with pytest.raises(TransferConfigError, match="3 ranks cannot divide 8 KV heads"):
        tokens_per_slot(GEOMETRY, 1 << 20, 3)


def test_a_receiver_counts_the_bytes_of_the_heads_it_asked_for() -> None:
    receiving = machine(tp=1, slot_tokens=4)
    receiving.on_command(OpenReceive(1, SOURCE, 0, 8, 10.0, kv_heads=2), 0.0)
    receiving.receiver.source_ready(SOURCE, 0.0)
    receiving.settle(0.0)
    (_, offer), (_, grant) = receiving.outbox.to_sources
    assert offer == Offer(1, 0, 8, kv_heads=2, segment_tokens=16, tp=1)
    assert isinstance(grant, Grant) and len(grant.slots) == 1, "one slot holds 16 tokens of 2 heads"
    receiving.on_source(SOURCE, Written(1, [segment(grant.slots[0], 8, heads=8)]), 0.0)
    assert receiving.outbox.drops["written_wrong_length"] == 1
    receiving.on_source(SOURCE, Written(1, [segment(grant.slots[0], 8, heads=2)]), 0.0)
    [arrived] = receiving.outbox.to_worker
    assert isinstance(arrived, Arrived) and arrived.segments[0].token_count == 8


def test_more_heads_than_there_are_are_refused_on_both_sides() -> None:
    both = machine(tp=2, slot_tokens=4)
    both.on_command(OpenReceive(1, SOURCE, 0, 8, 10.0, kv_heads=5), 0.0)
    assert both.outbox.to_worker == [Aborted(1, "there are 4 heads here")]
    both.on_destination(HERE, Offer(2, 0, 8, kv_heads=5), 8, 0.0)
    (_, refused), _ = both.outbox.to_destinations
    assert isinstance(refused, CancelTransfer) and "of 5 heads" in refused.reason


@pytest.mark.parametrize(("theirs", "together"), [(3, 3), (100, 8)])
def test_a_segment_fits_the_smaller_slot(theirs: int, together: int) -> None:
    """Our slots hold 8 tokens of half of our heads, theirs as many as their offer has."""
    sending = machine(tp=1, slot_tokens=4)
    sending.on_command(OpenSend(1, 10.0), 0.0)
    sending.on_command(SendReady(1), 0.0)
    sending.on_destination(HERE, Offer(1, 0, 20, kv_heads=4, segment_tokens=theirs, tp=2), 8, 0.0)
    sending.on_destination(HERE, Grant(1, [SlotUse(slot, 1) for slot in range(8)]), 8, 0.0)
    sending.settle(0.0)
    confirmed, granted, slots = sending.outbox.to_worker
    assert confirmed == SendConfirmed(1, 0, 20, 4, together, 2) and granted == SendGranted(1, 8)
    assert isinstance(slots, SendSlots)
    sending.on_command(Filled(1, [segment(slots.slots[0], together, heads=4)]), 0.0)
    [write] = sending.outbox.writes
    assert write.byte_count == together * 4 * HEAD_BYTES
    sending.on_command(Filled(1, [segment(slots.slots[1], together + 1, heads=4)]), 0.0)
    assert sending.outbox.drops["filled_wrong_length"] == 1
