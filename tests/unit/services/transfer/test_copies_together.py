"""Which packs and unpacks share a launch, and that none stands behind one that waits."""

from kvtransfer.messages import Arrived, Segment, SlotUse
from services.protocol.messages import FirstToken, Sampling, SequenceRequest
from services.scheduler.decode import DecodeScheduler
from services.scheduler.pages import PagePool
from tests.unit.services.transfer.test_copies import (
    SOURCE,
    arrived,
    assign,
    assigned,
    compute,
    opened,
    receiving,
    running,
    sending,
)


def test_what_is_computed_is_packed_together_whatever_transfer_it_is_of() -> None:
    sender, engine, client = sending(first := running(12), 0)
    opened(sender, second := running(6, request_id=2), 8, 2)
    opened(sender, running(4, request_id=3), 9, 1)
    compute(first, 4, 1)
    compute(second, 6, 2)
    compute(first, 8, 3)
    engine.passed = 2
    assign(sender, 0, 1, 2, 3, 4, 5)
    assert sender.pack() == 10
    assert [copy.runs for copy in engine.copies] == [[(0, 4, 0), (0, 4, 1), (4, 2, 2)]]
    engine.passed = 3
    assert sender.pack() == 8
    assert engine.copies[1].runs == [(4, 4, 3), (8, 4, 4)]
    sender.end(8)
    assert engine.fenced == [engine.copies[0]]
    client.said.clear()
    engine.done()
    assert sender.deliver() == 3, "not what the transfer that has ended had in it"
    assert [(said[1], [(one.slot, one.start_token) for one in said[2]]) for said in client.said] == [
        (7, [(0, 0), (3, 4), (4, 8)]),
    ]
    assert sender.pack() == 0 and client.said[1:] == [("freed", assigned(2, 1))], "one is kept for the third"
    assert not sender.in_flight


def test_an_unpack_waits_for_the_steps_that_use_its_pages_and_holds_up_no_other() -> None:
    waiting, ready, also_ready = (running(8, request_id) for request_id in (7, 8, 9))
    waiting.free_after_step, ready.free_after_step = 3, 2
    receiver, engine, client = receiving(waiting)
    for transfer_id, sequence in ((8, ready), (9, also_ready)):
        receiver.open(sequence, transfer_id, SOURCE, 1.0)
    engine.passed = 2
    for transfer_id in (7, 9, 8):
        receiver.arrived(Arrived(transfer_id, [Segment(transfer_id, 1, 0, 4, 64, None)]))
    receiver.settle()
    assert [(copy.runs, copy.with_checksums) for copy in engine.copies] == [([(0, 4, 9), (0, 4, 8)], False)]
    receiver.settle()
    assert len(engine.copies) == 1 and receiver.in_flight
    receiver.arrived(arrived(4))
    engine.done(0)
    client.said.clear()
    receiver.settle()
    assert client.said == [("freed", [SlotUse(9, 1), SlotUse(8, 1)])] and len(engine.copies) == 1
    engine.passed = 3
    receiver.settle()
    assert engine.copies[1].runs == [(0, 4, 7), (4, 4, 1)]


def test_slots_that_wait_for_a_step_go_back_when_their_transfer_ends() -> None:
    waiting = running(8)
    waiting.free_after_step = 1
    receiver, engine, client = receiving(waiting)
    receiver.arrived(arrived(0))
    receiver.settle()
    assert receiver.end(7, abort_reason="gone") and engine.fenced == []
    client.said.clear()
    assert receiver.settle().whole == [] and client.said == [("freed", [SlotUse(0, 1)])]
    assert not engine.copies and not receiver.in_flight


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
