"""The messages of a worker and a destination to the sending side, and what follows from each."""

import pytest

from kvtransfer.messages import (
    Abort,
    Aborted,
    Filled,
    Freed,
    OpenSend,
    Segment,
    SendCommitted,
    SendConfirmed,
    SendGranted,
    SendReady,
    SendSlots,
    SlotUse,
)
from kvtransfer.protocol.machine import TransferMachine
from kvtransfer.protocol.outbox import SlotCopy, Write
from kvtransfer.protocol.peer_messages import CancelTransfer, Closed, Committed, Grant, Offer, Ready, Written
from tests.unit.kvtransfer.cluster import TOKEN_BYTES, TOKENS_PER_SLOT, limits

HERE, ELSEWHERE = 77, 78
"""Epochs of two destinations."""
REMOTE_SLOTS = 10
SLOTS = 4


def deliver(machine: TransferMachine, *messages: object, destination: int = HERE, now_s: float = 0.0) -> None:
    for message in messages:
        machine.on_destination(destination, message, REMOTE_SLOTS, now_s)  # type: ignore[arg-type]
    machine.settle(now_s)


def confirmed(tokens: int = 12, grants: int = 2) -> tuple[TransferMachine, list[SlotUse]]:
    """A machine with one confirmed send, id 1, and the slots assigned for it."""
    machine = TransferMachine(limits(SLOTS))
    machine.on_command(OpenSend(1, 10.0), 0.0)
    machine.on_command(SendReady(1), 0.0)
    deliver(machine, Offer(1, 0, tokens), Grant(1, [SlotUse(i, 5) for i in range(grants)]))
    assert machine.outbox.to_destinations == [(HERE, Ready(1))]
    machine.outbox.to_destinations.clear()
    event, *rest = machine.outbox.to_worker
    assert event == SendConfirmed(1, 0, tokens, 1, TOKENS_PER_SLOT, 1)
    assert [one for one in rest if isinstance(one, SendGranted)] == [SendGranted(1, grants)] * bool(grants)
    assigned = [use for one in rest if isinstance(one, SendSlots) for use in one.slots]
    machine.outbox.to_worker.clear()
    return machine, assigned


def packed(use: SlotUse, start: int = 0, count: int = 4) -> Segment:
    return Segment(use.slot, use.generation, start, count, count * TOKEN_BYTES, 9)


def only_write(machine: TransferMachine) -> Write:
    [write] = machine.outbox.writes
    machine.outbox.writes = []
    return write


@pytest.mark.parametrize("offer_first", [True, False])
def test_offer_and_open_in_either_order(offer_first: bool) -> None:
    machine = TransferMachine(limits(SLOTS))
    if offer_first:
        deliver(machine, Offer(1, 3, 9))
        machine.on_command(OpenSend(1, 10.0), 0.0)
    else:
        machine.on_command(OpenSend(1, 10.0), 0.0)
        deliver(machine, Offer(1, 3, 9))
    assert machine.outbox.to_worker == [SendConfirmed(1, 3, 9, 1, TOKENS_PER_SLOT, 1)]
    assert machine.outbox.drops == {}


def test_a_cancel_whose_offer_was_lost_ends_the_transfer() -> None:
    """`Closed` frees the granted slots, so an offer that comes afterwards must find nothing to bind to."""
    machine = TransferMachine(limits(SLOTS))
    machine.on_command(OpenSend(1, 10.0), 0.0)
    machine.on_command(SendReady(1), 0.0)
    deliver(machine, CancelTransfer(1, "the worker is gone"))
    assert machine.outbox.to_worker == [Aborted(1, "the worker is gone")]
    assert machine.outbox.to_destinations == [(HERE, Closed(1))]
    machine.outbox.to_destinations.clear()
    deliver(machine, Offer(1, 0, 12), Grant(1, [SlotUse(0, 5)]))
    assert [type(message) for _, message in machine.outbox.to_destinations] == [CancelTransfer, Closed]
    assert machine.outbox.to_worker == [Aborted(1, "the worker is gone")]
    assert machine.sender.open_transfers == 0


def test_no_slot_is_lent_without_a_grant() -> None:
    machine, assigned = confirmed(grants=0)
    assert assigned == [] and machine.pool.free == SLOTS
    deliver(machine, Grant(1, [SlotUse(3, 1)]))
    granted, event = machine.outbox.to_worker
    assert granted == SendGranted(1, 1) and isinstance(event, SendSlots) and len(event.slots) == 1


def test_no_more_slots_are_lent_than_tokens_need() -> None:
    machine, assigned = confirmed(tokens=5, grants=4)
    assert len(assigned) == 2 and machine.pool.free == SLOTS - 2


def test_no_slot_is_lent_to_a_prompt_that_waits_for_pages() -> None:
    """It may wait for another, which waits for that slot."""
    machine = TransferMachine(limits(SLOTS))
    for transfer_id in (1, 2, 3):
        machine.on_command(OpenSend(transfer_id, 10.0), 0.0)
        grants = [SlotUse(slot, transfer_id) for slot in range(3)]
        deliver(machine, Offer(transfer_id, 0, 40), Grant(transfer_id, grants))
    assert machine.pool.free == SLOTS
    machine.on_command(SendReady(2), 0.0)
    machine.on_command(SendReady(2), 0.0)
    machine.on_command(SendReady(9), 0.0)
    machine.settle(0.0)
    assert machine.outbox.to_destinations == [(HERE, Ready(2))]
    [slots] = [event for event in machine.outbox.to_worker if isinstance(event, SendSlots)]
    assert len(slots.slots) == 3, "as many as the one that has pages can use"
    assert machine.outbox.drops == {"ready_unknown": 1}


def test_a_packed_segment_is_written_and_reported_where_it_lies() -> None:
    machine, assigned = confirmed()
    machine.on_command(Filled(1, [packed(assigned[0]), packed(assigned[1], 4)]), 0.0)
    write = only_write(machine)
    size = 4 * TOKEN_BYTES
    assert write.pieces == (SlotCopy(assigned[0].slot, 0, size), SlotCopy(assigned[1].slot, 1, size))
    assert machine.outbox.to_destinations == []  # Not before the data is there.
    machine.sender.write_done(write.write_id, 1.0)
    expected = Written(1, [Segment(0, 5, 0, 4, size, 9), Segment(1, 5, 4, 4, size, 9)])
    assert machine.outbox.to_destinations == [(HERE, expected)]
    assert machine.pool.free == SLOTS
    deliver(machine, Committed(1))
    assert machine.outbox.to_worker == [SendCommitted(1)]
    assert machine.outbox.to_destinations[1:] == [(HERE, Closed(1))]


def test_closed_waits_for_the_write_in_flight() -> None:
    machine, assigned = confirmed(grants=1)
    machine.on_command(Filled(1, [packed(assigned[0])]), 0.0)
    write = only_write(machine)
    deliver(machine, CancelTransfer(1, "gone"))
    assert machine.outbox.to_worker == [Aborted(1, "gone")]
    assert machine.outbox.to_destinations == []
    assert machine.pool.counts().quarantined == 1
    machine.sender.write_done(write.write_id, 1.0)
    assert machine.outbox.to_destinations == [(HERE, Closed(1))]
    assert machine.pool.free == SLOTS


@pytest.mark.parametrize("answer", ["freed", "filled", "death"])
def test_lent_slots_outlive_a_transfer_until_the_worker_gives_them_back(answer: str) -> None:
    """It may be packing into one right now."""
    machine, assigned = confirmed(grants=1)
    deliver(machine, CancelTransfer(1, "gone"))
    assert machine.pool.counts().granted == 1
    if answer == "freed":
        machine.on_command(Freed(assigned), 0.0)
    elif answer == "filled":
        machine.on_command(Filled(1, [packed(assigned[0])]), 0.0)
    else:
        machine.worker_gone("dead", 0.0)
    assert machine.pool.free == SLOTS
    assert machine.outbox.writes == []


def test_a_lent_slot_is_for_whatever_transfer_has_grants() -> None:
    """Two are ready, and the worker has computed the second first."""
    machine, assigned = confirmed(grants=2)
    machine.on_command(OpenSend(2, 10.0), 0.0)
    machine.on_command(SendReady(2), 0.0)
    deliver(machine, Offer(2, 0, 12), Grant(2, [SlotUse(7, 1)]))
    assigned += [use for one in machine.outbox.to_worker if isinstance(one, SendSlots) for use in one.slots]
    assert len(assigned) == 3
    machine.on_command(Filled(2, [packed(assigned[0])]), 0.0)
    assert only_write(machine).pieces == (SlotCopy(assigned[0].slot, 7, 4 * TOKEN_BYTES),)
    machine.on_command(Filled(2, [packed(assigned[1], 4)]), 0.0)
    assert machine.outbox.drops == {"filled_not_granted": 1} and machine.outbox.writes == []
    assert machine.outbox.to_worker[-1] == Aborted(2, "the worker's segment is filled_not_granted")


def test_a_lent_slot_may_be_given_back_unfilled() -> None:
    machine, assigned = confirmed(grants=1)
    machine.on_command(Freed(assigned), 0.0)
    assert machine.pool.free == SLOTS
    machine.on_command(Freed(assigned), 0.0)
    assert machine.outbox.drops == {"freed_stale": 1}
    machine.settle(0.0)  # The transfer still wants one.
    assert isinstance(machine.outbox.to_worker[-1], SendSlots)


def test_failed_write_aborts_on_both_sides() -> None:
    machine, assigned = confirmed(grants=1)
    machine.on_command(Filled(1, [packed(assigned[0])]), 0.0)
    machine.sender.write_failed(only_write(machine).write_id, "broken", 1.0)
    assert machine.outbox.to_worker == [Aborted(1, "broken")]
    assert machine.outbox.to_destinations == [(HERE, CancelTransfer(1, "broken")), (HERE, Closed(1))]
    assert machine.pool.free == SLOTS


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("filled_out_of_range", {"start_token": 9}),
        ("filled_wrong_length", {"byte_count": 1}),
        ("filled_wrong_length", {"token_count": 5, "byte_count": 5 * TOKEN_BYTES}),
        ("filled_overlap", {"start_token": 3}),
    ],
)
def test_a_segment_that_does_not_fit_fails_the_transfer(reason: str, change: dict[str, int]) -> None:
    machine, assigned = confirmed()
    good = {
        "slot": assigned[1].slot,
        "generation": assigned[1].generation,
        "start_token": 4,
        "token_count": 4,
        "byte_count": 4 * TOKEN_BYTES,
    }
    machine.on_command(Filled(1, [packed(assigned[0]), Segment(**(good | change))]), 0.0)
    assert machine.outbox.drops == {reason: 1}
    assert isinstance(machine.outbox.to_worker[0], Aborted)
    assert machine.outbox.writes == []
    assert machine.pool.free == SLOTS, "what the worker has handed over is not the worker's any more"


def test_slots_not_lent_are_not_written() -> None:
    machine, assigned = confirmed(grants=1)
    stranger = SlotUse(assigned[0].slot, assigned[0].generation + 1)
    machine.on_command(Filled(1, [packed(stranger), packed(SlotUse(3, 1))]), 0.0)
    assert machine.outbox.drops == {"filled_not_lent": 2}
    machine.on_command(Filled(2, [packed(assigned[0])]), 0.0)
    assert machine.outbox.drops == {"filled_not_lent": 2, "filled_late": 1}
    assert machine.outbox.writes == [] and machine.pool.free == SLOTS


def test_bad_grants_are_dropped_and_counted() -> None:
    machine, _ = confirmed(grants=1)
    deliver(machine, Grant(1, [SlotUse(0, 5), SlotUse(0, 4), SlotUse(REMOTE_SLOTS, 1)]))
    deliver(machine, Grant(9, [SlotUse(1, 1)]))
    deliver(machine, Grant(1, [SlotUse(1, 1)]), destination=ELSEWHERE)
    assert machine.outbox.drops == {
        "grant_stale_generation": 2,
        "grant_out_of_range": 1,
        "grant_unknown": 1,
        "grant_wrong_peer": 1,
    }
    assert machine.outbox.to_worker == []


def test_unknown_and_foreign_ends_are_answered_truly() -> None:
    machine, _ = confirmed()
    deliver(machine, CancelTransfer(50, "?"), Committed(51))
    deliver(machine, CancelTransfer(1, "not yours"), destination=ELSEWHERE)
    closed = [(HERE, Closed(50)), (HERE, Closed(51)), (ELSEWHERE, Closed(1))]
    assert machine.outbox.to_destinations == closed
    assert machine.outbox.to_worker == []


def test_an_offer_that_nobody_opens_is_not_held_for_ever() -> None:
    machine = TransferMachine(limits(SLOTS))
    deliver(machine, Offer(1, 0, 9), Grant(1, [SlotUse(0, 1)]))
    machine.tick(59.0)
    assert machine.outbox.to_destinations == []
    machine.tick(60.0)
    assert machine.outbox.to_destinations == [
        (HERE, CancelTransfer(1, "no such request here")),
        (HERE, Closed(1)),
    ]
    assert machine.next_deadline_s() is None


def test_an_offer_for_what_was_given_up_is_refused_at_once() -> None:
    machine = TransferMachine(limits(SLOTS))
    machine.on_command(OpenSend(1, 10.0), 0.0)
    machine.on_command(Abort(1, "client left"), 0.0)
    machine.on_command(Abort(2, "client left before it was opened"), 0.0)
    deliver(machine, Offer(1, 0, 9), Offer(2, 0, 9))
    cancels = [
        message for _, message in machine.outbox.to_destinations if isinstance(message, CancelTransfer)
    ]
    assert [message.transfer_id for message in cancels] == [1, 2]


def test_a_destination_that_needs_nothing_may_commit_before_the_worker_opens() -> None:
    machine = TransferMachine(limits(SLOTS))
    deliver(machine, Offer(1, 7, 7), Committed(1))
    assert machine.outbox.to_destinations == [(HERE, Closed(1))]
    machine.on_command(OpenSend(1, 10.0), 0.0)
    assert machine.outbox.to_worker == [SendConfirmed(1, 7, 7, 1, TOKENS_PER_SLOT, 1), SendCommitted(1)]
    assert machine.next_deadline_s() is None


def test_deadline_and_lost_destination_tell_the_worker() -> None:
    machine, assigned = confirmed(grants=1)
    machine.tick(10.0)
    assert machine.outbox.to_worker == [Aborted(1, "deadline")]
    machine.on_command(Freed(assigned), 10.0)
    assert machine.pool.free == SLOTS
    machine, assigned = confirmed(grants=1)
    machine.on_command(Filled(1, [packed(assigned[0])]), 0.0)
    write = only_write(machine)
    machine.sender.destination_lost(HERE, "dead", 1.0)
    assert machine.outbox.to_worker == [Aborted(1, "dead")]
    assert machine.sender.uses(HERE) and machine.pool.counts().quarantined == 1
    machine.sender.write_failed(write.write_id, "disconnected", 1.0)
    assert not machine.sender.uses(HERE) and machine.pool.free == SLOTS


def test_slots_are_shared_between_sends() -> None:
    machine = TransferMachine(limits(SLOTS))
    for transfer_id in (1, 2, 3, 4):
        machine.on_command(OpenSend(transfer_id, 10.0), 0.0)
        machine.on_command(SendReady(transfer_id), 0.0)
        machine.on_destination(HERE, Offer(transfer_id, 0, 400), REMOTE_SLOTS, 0.0)
        grants = [SlotUse(i, transfer_id) for i in range(4)]
        machine.on_destination(HERE, Grant(transfer_id, grants), REMOTE_SLOTS, 0.0)
    machine.settle(0.0)
    slots = [len(e.slots) for e in machine.outbox.to_worker if isinstance(e, SendSlots)]
    assert slots == [SLOTS], "sixteen are granted"
    granted = [e for e in machine.outbox.to_worker if isinstance(e, SendGranted)]
    assert granted == [SendGranted(transfer_id, 4) for transfer_id in (1, 2, 3, 4)]


def test_what_is_packed_at_once_goes_out_in_small_writes() -> None:
    machine = TransferMachine(limits(10))
    machine.on_command(OpenSend(1, 10.0), 0.0)
    machine.on_command(SendReady(1), 0.0)
    deliver(machine, Offer(1, 0, 20), Grant(1, [SlotUse(slot, 5) for slot in range(5)]))
    [assigned] = [e.slots for e in machine.outbox.to_worker if isinstance(e, SendSlots)]
    assert len(assigned) == 5
    machine.on_command(Filled(1, [packed(use, 4 * at) for at, use in enumerate(assigned)]), 0.0)
    machine.settle(0.0)
    writes = machine.outbox.writes
    assert [[piece.local_slot for piece in write.pieces] for write in writes] == [
        [assigned[0].slot, assigned[1].slot],
        [assigned[2].slot, assigned[3].slot],
        [assigned[4].slot],
    ]
    assert [piece.remote_slot for write in writes for piece in write.pieces] == list(range(5))
    machine.sender.write_done(writes[2].write_id, 0.0)
    assert machine.pool.free == 6, "each write's end frees its own slots"
    _, (_, written) = machine.outbox.to_destinations
    assert isinstance(written, Written) and [s.slot for s in written.segments] == [4]
