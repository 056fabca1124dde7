"""Which packs and unpacks share a launch, and that none stands behind one that waits."""

from kvtransfer.messages import Arrived, Segment, SlotUse
from services.protocol.messages import FirstToken, Sampling, SequenceRequest
from services.scheduler.decode import DecodeScheduler
from services.scheduler.pages import PagePool
from tests.unit.services.transfer.test_copies import (
    SOURCE,
    arrived,
    assigned,
    compute,
    opened,
    pulling,
    pushing,
    running,
)


def test_what_is_computed_is_packed_together_whatever_transfer_it_is_of() -> None:
    push, engine, client = pushing(first := running(12), 0)
    opened(push, second := running(6, request_id=2), 8, 2)
    opened(push, running(4, request_id=3), 9, 1)
    compute(first, 4, 1)
    compute(second, 6, 2)
    compute(first, 8, 3)
    engine.passed = 2
    push.assign(assigned(0, 1, 2, 3, 4, 5))
    assert push.pack() == 10
    assert [move.runs for move in engine.moves] == [[(0, 4, 0), (0, 4, 1), (4, 2, 2)]]
    engine.passed = 3
    assert push.pack() == 8
    assert engine.moves[1].runs == [(4, 4, 3), (8, 4, 4)]
    push.close(8)
    assert engine.held == [engine.moves[0]]
    client.said.clear()
    engine.done()
    assert push.deliver() == 3, "not what the transfer that has ended had in it"
    assert [(said[1], [(one.slot, one.start_token) for one in said[2]]) for said in client.said] == [
        (7, [(0, 0), (3, 4), (4, 8)]),
    ]
    assert push.pack() == 0 and client.said[1:] == [("freed", assigned(2, 1))], "one is kept for the third"
    assert not push.in_flight


def test_an_unpack_waits_for_the_steps_that_use_its_pages_and_holds_up_no_other() -> None:
    waiting, ready, also_ready = (running(8, request_id) for request_id in (7, 8, 9))
    waiting.free_after_step, ready.free_after_step = 3, 2
    pull, engine, client = pulling(waiting)
    for transfer_id, sequence in ((8, ready), (9, also_ready)):
        pull.open(sequence, transfer_id, SOURCE, 1.0, range(1))
    engine.passed = 2
    for transfer_id in (7, 9, 8):
        pull.unpack(Arrived(transfer_id, [Segment(transfer_id, 1, 0, 4, 64, None)]))
    pull.settle()
    assert [(move.runs, move.with_checksums) for move in engine.moves] == [([(0, 4, 9), (0, 4, 8)], False)]
    pull.settle()
    assert len(engine.moves) == 1 and pull.in_flight
    pull.unpack(arrived(4))
    engine.done(0)
    client.said.clear()
    pull.settle()
    assert client.said == [("freed", [SlotUse(9, 1), SlotUse(8, 1)])] and len(engine.moves) == 1
    engine.passed = 3
    pull.settle()
    assert engine.moves[1].runs == [(0, 4, 7), (4, 4, 1)]


def test_slots_that_wait_for_a_step_go_back_when_their_transfer_ends() -> None:
    waiting = running(8)
    waiting.free_after_step = 1
    pull, engine, client = pulling(waiting)
    pull.unpack(arrived(0))
    pull.settle()
    assert pull.close(7, abort_reason="gone") and engine.held == []
    client.said.clear()
    assert pull.settle().whole == [] and client.said == [("freed", [SlotUse(0, 1)])]
    assert not engine.moves and not pull.in_flight


def test_only_steps_that_may_use_the_pages_are_waited_for() -> None:
    """The scheduler's part: pages that were nobody's for long are free at once, however many steps run."""
    pool = PagePool(6, 4)
    scheduler = DecodeScheduler(pool, 8, 64)
    sampling = Sampling(max_tokens=20, seed=1)
    first = scheduler.add(SequenceRequest(1, [1] * 8, sampling))
    scheduler.reserve()
    assert first.free_after_step == 0
    scheduler.arrived(1)
    scheduler.join(1, [FirstToken(0, 5)])
    scheduler.start()
    for pool.step in (1, 2):
        scheduler.launched(scheduler.schedule())
    second = scheduler.add(SequenceRequest(2, [2] * 8, sampling))
    scheduler.reserve()
    assert second.free_after_step == 0, "its pages were never used"
    scheduler.end(2)
    scheduler.end(1)
    third = scheduler.add(SequenceRequest(3, [3] * 24, sampling))
    scheduler.reserve()
    assert third.free_after_step == 2, "some were the first's, whose second step may run"
