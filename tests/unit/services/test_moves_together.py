"""Which packs and unpacks share a launch: those that wait for nothing, whatever transfer they are of."""

from kvtransfer.messages import Arrived, Segment, SendConfirmed, SendSlots, SlotUse
from tests.unit.services.test_kv_moves import (
    SOURCE,
    TOKENS_PER_SLOT,
    arrived,
    compute,
    pulling,
    pushing,
    running,
)


def test_what_is_computed_is_packed_at_once_whatever_step_computed_it() -> None:
    """Of two transfers, ahead of what is running; what has no mark waits for everything, and comes last."""
    push, engine, client = pushing(first := running(12), 3)
    push.open(second := running(6, request_id=2), 8, 1.0)
    assert push.confirmed(SendConfirmed(8, 0, 6, kv_heads=1, segment_tokens=TOKENS_PER_SLOT, tp=1), range(1))
    push.open(found := running(4, computed=4, request_id=3), 9, 1.0)
    assert push.confirmed(SendConfirmed(9, 0, 4, kv_heads=1, segment_tokens=TOKENS_PER_SLOT, tp=1), range(1))
    push.lend(SendSlots(9, [SlotUse(9, 1)]))
    push.lend(SendSlots(8, [SlotUse(5, 1), SlotUse(6, 1)]))
    compute(push, first, 4, "one")
    compute(push, second, 6, "two")
    compute(push, first, 8, "three")
    engine.passed_marks = {"one", "two"}
    assert push.pack() == 22 and found.computed_tokens == 4
    assert [(move.runs, move.after) for move in engine.moves] == [
        ([(0, 4, 0), (0, 4, 5), (4, 2, 6)], ()),
        ([(4, 4, 1), (8, 4, 2)], ("three",)),
        ([(0, 4, 9)], None),
    ]
    push.close(8)
    assert engine.held == [engine.moves[0]]
    client.said.clear()
    engine.done()
    assert push.deliver() == 4, "not what the transfer that has ended had in it"
    assert [(said[1], [(one.slot, one.start_token) for one in said[2]]) for said in client.said] == [
        (7, [(0, 0), (1, 4), (2, 8)]),
        (9, [(9, 0)]),
    ]
    assert client.packs_idle() and not push.in_flight


def test_what_arrives_together_is_unpacked_together_but_waits_for_its_own_pages() -> None:
    pull, engine, client = pulling(running(8))
    for transfer_id in (8, 9):
        pull.open(running(4, request_id=transfer_id), transfer_id, SOURCE, 1.0, range(1))
    for transfer_id in (9, 7, 8):
        pull.unpack(Arrived(transfer_id, [Segment(transfer_id, 1, 0, 4, 64, None)]))
    engine.passed_marks = {1, 3}
    pull.settle()
    assert [(move.runs, move.after, move.with_checksums) for move in engine.moves] == [
        ([(0, 4, 9), (0, 4, 7)], (), False),
        ([(0, 4, 8)], [2], False),
    ]
    pull.unpack(arrived(4))
    assert pull.close(7, abort_reason="gone")
    assert engine.held == [engine.moves[0]]
    client.said.clear()
    engine.done()
    assert [one.transfer_id for one in pull.settle().whole] == [9, 8]
    slots = [SlotUse(1, 1), *(SlotUse(slot, 1) for slot in (9, 7, 8))]
    assert client.said == [("commit", 9), ("commit", 8), ("freed", slots)], "one was never unpacked"
    assert len(engine.moves) == 2 and not pull.in_flight
