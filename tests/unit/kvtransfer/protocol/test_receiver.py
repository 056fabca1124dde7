"""The messages of a source, and what follows from each."""

import pytest

from kvtransfer.messages import (
    Aborted,
    Arrived,
    Commit,
    Freed,
    OpenReceive,
    Segment,
    SlotUse,
    TransferAddress,
)
from kvtransfer.protocol.machine import TransferMachine
from kvtransfer.protocol.peer_messages import (
    CancelTransfer,
    Closed,
    Committed,
    Grant,
    Offer,
    PeerPing,
    Ready,
    Written,
)
from tests.unit.kvtransfer.cluster import TOKEN_BYTES, TOKENS_PER_SLOT, limits

SOURCE = TransferAddress("ipc:///source", 5)
OTHER = TransferAddress("ipc:///source", 6)
SLOTS = 8


def opened(tokens: int = 12, deadline_s: float = 10.0) -> tuple[TransferMachine, list[SlotUse]]:
    """A machine with one offered transfer, id 1, and its first grants."""
    machine = TransferMachine(limits(SLOTS))
    machine.on_command(OpenReceive(1, SOURCE, 0, tokens, deadline_s), 0.0)
    assert machine.outbox.connects == [SOURCE]
    machine.receiver.source_ready(SOURCE, 0.0)
    machine.settle(0.0)
    (_, offer), (_, grant) = machine.outbox.to_sources
    assert offer == Offer(1, 0, tokens, 1, TOKENS_PER_SLOT) and isinstance(grant, Grant)
    machine.outbox.to_sources.clear()
    return machine, list(grant.slots)


def written(use: SlotUse, start: int = 0, count: int = 4) -> Segment:
    return Segment(use.slot, use.generation, start, count, count * TOKEN_BYTES)


def arrivals(machine: TransferMachine) -> list[Segment]:
    events = machine.outbox.to_worker
    return [segment for event in events if isinstance(event, Arrived) for segment in event.segments]


def test_before_data_a_transfer_holds_little_afterwards_its_share() -> None:
    machine, grants = opened(tokens=400)
    assert len(grants) == 2
    machine.on_source(SOURCE, Written(1, [written(grants[0])]), 0.0)
    machine.settle(0.0)
    [(_, grant)] = machine.outbox.to_sources
    assert isinstance(grant, Grant)
    assert 1 + len(grant.slots) == SLOTS // 2


def test_one_that_surely_moves_holds_its_share_of_what_is_free_before_data() -> None:
    """Alone, a prompt is packed and moved in one go; beside others it leaves them their part."""
    machine, grants = opened(tokens=400)
    machine.on_source(SOURCE, Ready(1), 0.0)
    machine.settle(0.0)
    [(_, grant)] = machine.outbox.to_sources
    assert isinstance(grant, Grant)
    assert len(grants) + len(grant.slots) == SLOTS // 2
    machine = TransferMachine(limits(40))
    for transfer_id in (1, 2, 3, 4):
        machine.on_command(OpenReceive(transfer_id, SOURCE, 0, 400, 10.0), 0.0)
    machine.receiver.source_ready(SOURCE, 0.0)
    for transfer_id in (1, 2, 3, 4):
        machine.on_source(SOURCE, Ready(transfer_id), 0.0)
    machine.settle(0.0)
    granted = [len(m.slots) for _, m in machine.outbox.to_sources if isinstance(m, Grant)]
    assert len(granted) == 4 and max(granted) - min(granted) <= 1 and 3 <= max(granted) <= 5, granted


def test_never_more_grants_than_tokens_need() -> None:
    machine, grants = opened(tokens=TOKENS_PER_SLOT + 1)
    assert len(grants) == 2
    machine.on_source(SOURCE, Written(1, [written(grants[0])]), 0.0)
    machine.settle(0.0)
    assert machine.outbox.to_sources == []


def test_what_may_wait_for_pages_does_not_get_all_slots() -> None:
    machine = TransferMachine(limits(SLOTS))
    for transfer_id in range(1, 12):
        machine.on_command(OpenReceive(transfer_id, SOURCE, 0, 400, 10.0), 0.0)
    machine.receiver.source_ready(SOURCE, 0.0)
    machine.settle(0.0)
    assert SLOTS - machine.pool.free == (SLOTS - 1) // 2
    machine.outbox.to_sources.clear()
    machine.on_source(OTHER, Ready(11), 0.0)
    machine.settle(0.0)
    assert machine.outbox.to_sources == []
    machine.on_source(SOURCE, Ready(11), 0.0)
    machine.settle(0.0)
    [(_, grant)] = machine.outbox.to_sources
    assert isinstance(grant, Grant) and grant.transfer_id == 11
    assert machine.outbox.drops == {"ready_wrong_peer": 1}


def test_many_open_transfers_share_the_pool() -> None:
    machine = TransferMachine(limits(SLOTS))
    for transfer_id in range(1, 8):
        machine.on_command(OpenReceive(transfer_id, SOURCE, 0, 400, 10.0), 0.0)
    machine.receiver.source_ready(SOURCE, 0.0)
    for transfer_id in range(1, 8):
        machine.on_source(SOURCE, Ready(transfer_id), 0.0)
    machine.settle(0.0)
    grants = {m.transfer_id: len(m.slots) for _, m in machine.outbox.to_sources if isinstance(m, Grant)}
    assert grants == dict.fromkeys(range(1, 8), 1)  # And one slot is left to send with.
    assert machine.pool.free == 1


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("written_not_granted", {"slot": SLOTS + 3}),
        ("written_not_granted", {"slot": 7}),
        ("written_stale_generation", {"generation": 99}),
        ("written_out_of_range", {"start_token": 9}),
        ("written_out_of_range", {"start_token": 12}),
        ("written_wrong_length", {"byte_count": 4 * TOKEN_BYTES - 1}),
        ("written_wrong_length", {"token_count": 5, "byte_count": 5 * TOKEN_BYTES}),
    ],
)
def test_bad_reports_are_dropped_and_counted(reason: str, change: dict[str, int]) -> None:
    machine, grants = opened()
    good = {
        "slot": grants[0].slot,
        "generation": grants[0].generation,
        "start_token": 0,
        "token_count": 4,
        "byte_count": 4 * TOKEN_BYTES,
    }
    machine.on_source(SOURCE, Written(1, [Segment(**(good | change)), written(grants[1], 4)]), 0.0)
    assert machine.outbox.drops == {reason: 1}
    assert arrivals(machine) == [written(grants[1], 4)]  # The good one beside it is taken.


def test_duplicates_overlaps_and_late_reports_are_dropped() -> None:
    machine, grants = opened()
    report = Written(1, [written(grants[0])])
    machine.on_source(SOURCE, report, 0.0)
    machine.on_source(SOURCE, report, 0.0)
    machine.on_source(SOURCE, Written(1, [written(grants[1], 3)]), 0.0)
    assert machine.outbox.drops == {"written_not_granted": 1, "written_overlap": 1}
    machine.on_source(SOURCE, CancelTransfer(1, "enough"), 0.0)
    machine.on_source(SOURCE, Written(1, [written(grants[1], 4)]), 0.0)
    assert machine.outbox.drops["written_late"] == 1
    machine.on_source(SOURCE, Closed(1), 0.0)
    machine.on_source(SOURCE, Written(1, [written(grants[1], 4)]), 0.0)
    assert machine.outbox.drops["written_unknown"] == 1
    assert arrivals(machine) == [written(grants[0])]


def test_another_peer_and_another_life_have_no_say() -> None:
    machine, grants = opened()
    machine.on_source(OTHER, Written(1, [written(grants[0])]), 0.0)
    machine.on_source(OTHER, CancelTransfer(1, "mischief"), 0.0)
    machine.on_source(OTHER, Closed(1), 0.0)
    machine.on_source(SOURCE, PeerPing(5), 0.0)
    assert machine.outbox.to_worker == []
    assert machine.outbox.drops == {
        "written_wrong_peer": 1,
        "cancel_wrong_peer": 1,
        "closed_wrong_peer": 1,
        "wrong_way": 1,
    }


def test_grants_are_quarantined_until_the_source_says_closed() -> None:
    machine, grants = opened(deadline_s=10.0)
    machine.tick(9.9)
    assert machine.outbox.to_worker == []
    machine.tick(10.0)
    assert machine.outbox.to_worker == [Aborted(1, "deadline")]
    assert machine.outbox.to_sources == [(SOURCE, CancelTransfer(1, "deadline"))]
    assert machine.pool.counts().quarantined == len(grants)
    machine.tick(11.0)  # No answer: sent again.
    assert len(machine.outbox.to_sources) == 2
    machine.on_source(SOURCE, Closed(1), 11.0)
    assert machine.pool.free == SLOTS and machine.next_deadline_s() is None


def test_a_lost_source_keeps_its_grants_in_quarantine_until_its_life_is_over() -> None:
    machine, grants = opened()
    machine.receiver.source_lost(SOURCE, "silent", 1.0)
    assert machine.outbox.to_worker == [Aborted(1, "silent")]
    assert machine.pool.counts().quarantined == len(grants)
    assert machine.receiver.uses(SOURCE)
    machine.receiver.source_gone(SOURCE, "dead", 2.0)
    assert machine.pool.free == SLOTS and not machine.receiver.uses(SOURCE)


def test_a_source_that_comes_back_is_asked_again() -> None:
    machine, _ = opened()
    machine.receiver.source_lost(SOURCE, "silent", 1.0)
    machine.receiver.source_ready(SOURCE, 2.0)
    assert machine.outbox.to_sources == [(SOURCE, CancelTransfer(1, "silent"))]
    machine.on_source(SOURCE, Closed(1), 2.0)
    assert machine.pool.free == SLOTS


def test_quarantine_does_not_outlast_every_limit() -> None:
    machine, grants = opened()
    machine.receiver.source_lost(SOURCE, "silent", 0.0)
    machine.tick(119.0)
    assert machine.pool.counts().quarantined == len(grants)
    machine.tick(120.0)
    assert machine.pool.free == SLOTS
    assert machine.outbox.drops["quarantine_expired"] == len(grants)


def test_arrived_slots_stay_filled_until_freed_even_after_an_abort() -> None:
    machine, grants = opened()
    machine.on_source(SOURCE, Written(1, [written(grants[0])]), 0.0)
    machine.on_source(SOURCE, CancelTransfer(1, "gone"), 0.0)
    machine.on_source(SOURCE, Closed(1), 0.0)
    assert machine.pool.counts().filled == 1
    machine.on_command(Freed([grants[0]]), 0.0)
    assert machine.pool.free == SLOTS
    machine.on_command(Freed([grants[0], SlotUse(SLOTS + 1, 1)]), 0.0)
    assert machine.outbox.drops["freed_stale"] == 2


def test_commit_needs_every_token() -> None:
    machine, grants = opened()
    machine.on_source(SOURCE, Written(1, [written(grants[0])]), 0.0)
    machine.on_command(Commit(1), 0.0)
    assert machine.outbox.drops["commit_incomplete"] == 1
    assert any(isinstance(event, Aborted) for event in machine.outbox.to_worker)


def test_an_empty_transfer_may_be_committed_before_the_source_is_there() -> None:
    machine = TransferMachine(limits(SLOTS))
    machine.on_command(OpenReceive(1, SOURCE, 7, 7, 10.0), 0.0)
    machine.on_command(Commit(1), 0.0)
    machine.receiver.source_ready(SOURCE, 0.0)
    assert machine.outbox.to_sources == [(SOURCE, Offer(1, 7, 7, 1, TOKENS_PER_SLOT)), (SOURCE, Committed(1))]
    machine.on_source(SOURCE, Closed(1), 0.0)
    assert machine.next_deadline_s() is None and machine.outbox.to_worker == []


def test_opening_twice_or_backwards() -> None:
    machine, _ = opened()
    machine.on_command(OpenReceive(1, SOURCE, 0, 5, 10.0), 0.0)
    machine.on_command(OpenReceive(2, SOURCE, 5, 0, 10.0), 0.0)
    assert machine.outbox.drops == {"receive_open_twice": 1, "receive_bad_range": 1}
    assert machine.outbox.to_worker == [Aborted(2, "end_token lies before start_token")]
