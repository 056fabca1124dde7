"""Packs and unpacks that take their time: what is handed over when, and what a bad moment does to it."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from kvtransfer.client import SlotsAssigned
from kvtransfer.messages import (
    Arrived,
    Segment,
    SendConfirmed,
    SendGranted,
    SlotUse,
)
from kvtransfer.spans import Spans
from services.engine.errors import ChecksumMismatch
from services.engine.kv.run_table import SlotRun
from services.protocol.messages import Sampling, SequenceRequest, WorkerTransferAddress
from services.scheduler.pages import PagePool
from services.scheduler.prefill import PrefillScheduler
from services.scheduler.sequence import Sequence, prompt_sequence
from services.transfer.receiver import KvReceiver
from services.transfer.sender import KvSender
from tests.unit.services.roles.test_overlap import FakeDevice

SOURCE = WorkerTransferAddress("ipc:///source", 1)
TOKENS_PER_SLOT = 4


@dataclass(eq=False)
class FakeCopy:
    runs: list[tuple[int, int, int]]
    """First token, tokens, slot."""
    with_checksums: bool
    is_done: bool = False

    @property
    def byte_counts(self) -> list[int]:
        return [64 + slot for _, _, slot in self.runs]

    def checksum(self, run: int) -> int | None:
        assert self.is_done, "judged before it was done"
        return 5 + self.runs[run][2]

    def judge(self, run: int, expected: int | None) -> None:
        if expected is not None and self.checksum(run) != expected:
            raise ChecksumMismatch("differs")


class FakeCopier(FakeDevice):
    """Steps as `FakeDevice`, done when a test says so (`passed`), as copies are. `fenced` are those that
    steps wait for."""

    def __init__(self, pages: int = 40) -> None:
        super().__init__(pages)
        self.copies: list[FakeCopy] = []
        self.fenced: list[FakeCopy] = []
        self.passed = 0

    def pack(self, runs: list[SlotRun], with_checksums: bool) -> FakeCopy:
        assert {run.heads for run in runs} == {range(1)}
        copied = [(run.start_token, run.token_count, run.slot) for run in runs]
        self.copies.append(FakeCopy(copied, with_checksums))
        return self.copies[-1]

    unpack = pack

    def passed_step(self) -> int:
        return self.passed

    def fence(self, copy: FakeCopy) -> None:
        self.fenced.append(copy)

    def done(self, *numbers: int) -> None:
        for number in numbers or range(len(self.copies)):
            self.copies[number].is_done = True


@dataclass
class FakeClient:
    checksum: bool = True
    ready: bool = True
    said: list[tuple[Any, ...]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return lambda *values: self.said.append((name, *values))


def confirmed(tokens: int) -> SendConfirmed:
    return SendConfirmed(7, 0, tokens, kv_heads=1, segment_tokens=TOKENS_PER_SLOT, tp=1)


def running(tokens: int, request_id: int = 1) -> Sequence:
    sequence = prompt_sequence(SequenceRequest(request_id, [1] * tokens, Sampling(max_tokens=4, seed=1)))
    sequence.pages, sequence.arrival = list(range(10)), request_id
    return sequence


def opened(sender: KvSender, sequence: Sequence, transfer_id: int, grants: int) -> None:
    """A transfer that the destination has confirmed, of a prompt that has pages."""
    sender.open(sequence, transfer_id, 1.0)
    tokens = sequence.prompt_tokens
    event = SendConfirmed(transfer_id, 0, tokens, kv_heads=1, segment_tokens=TOKENS_PER_SLOT, tp=1)
    assert sender.on_event(event) == event
    sender.ready(transfer_id)
    assert sender.on_event(SendGranted(transfer_id, grants)) is None


def assigned(*slots: int, generation: int = 1) -> list[SlotUse]:
    return [SlotUse(slot, generation) for slot in slots]


def assign(sender: KvSender, *slots: int) -> None:
    assert sender.on_event(SlotsAssigned(assigned(*slots))) is None


def sending(sequence: Sequence, slots: int, grants: int = 8) -> tuple[KvSender, FakeCopier, FakeClient]:
    engine, client = FakeCopier(), FakeClient()
    sender = KvSender([(engine, client)], 1, lambda: 0.0, Spans())  # type: ignore[arg-type]
    opened(sender, sequence, 7, grants)
    assign(sender, *range(slots))
    client.said.clear()
    return sender, engine, client


def compute(sequence: Sequence, count: int, step: int) -> None:
    """Step number `step` computes so many tokens more."""
    sequence.computed_tokens += count
    sequence.chunk_steps.append((sequence.computed_tokens, step))


def test_a_slot_is_handed_over_when_its_pack_is_done() -> None:
    sequence = running(12)
    sender, engine, client = sending(sequence, 2)
    compute(sequence, 12, 1)
    engine.passed = 1
    assert sender.pack() == 8 and sender.deliver() == 0 and client.said == [] and sender.in_flight
    assign(sender, 2)
    assert sender.pack() == 4
    engine.done(1)
    assert sender.deliver() == 0, "the packs end in their order"
    engine.done(0)
    assert sender.deliver() == 3 and not sender.in_flight
    ((_, transfer_id, segments),) = client.said
    assert transfer_id == 7
    assert segments == [
        Segment(0, 1, 0, 4, 64, 5),
        Segment(1, 1, 4, 4, 65, 6),
        Segment(2, 1, 8, 4, 66, 7),
    ]


def test_tokens_are_packed_as_their_step_is_done_and_take_no_slot_before() -> None:
    sequence = running(16)
    sender, engine, client = sending(sequence, 4)
    for step, count in enumerate((6, 6, 4), 1):
        compute(sequence, count, step)
    assert sender.pack() == 0 and not sender.in_flight
    packed = []
    for engine.passed in (1, 2, 3):
        sender.pack()
        packed.append(engine.copies[-1].runs)
    assert packed[:2] == [[(0, 4, 0), (4, 2, 1)], [(6, 4, 2), (10, 2, 3)]]
    assert packed[2] == packed[1], "no slot was left for the third"
    assign(sender, 4)
    assert sender.pack() == 4 and engine.copies[-1].runs == [(12, 4, 4)]
    assert not client.said


def test_a_slot_goes_to_the_oldest_request_with_computed_tokens_and_a_grant() -> None:
    """Whatever the slots were assigned for: an older one whose step is still running takes none."""
    oldest, middle, youngest = running(16, 1), running(8, 2), running(8, 3)
    sender, engine, _ = sending(oldest, 0)
    opened(sender, youngest, 9, 8)
    opened(sender, middle, 8, 1)
    compute(middle, 8, 1)
    compute(youngest, 8, 2)
    compute(oldest, 16, 3)
    engine.passed = 2
    assign(sender, 0, 1)
    assert sender.pack() == 8
    assert engine.copies[-1].runs == [(0, 4, 0), (0, 4, 1)]
    assert [one.next_token for one in sender._slices.values()] == [0, 4, 4]
    engine.passed = 3
    assign(sender, 2, 3, 4, 5, 6, 7)
    assert sender.pack() == 20
    assert [run[0] for run in engine.copies[-1].runs] == [0, 4, 8, 12, 4], "four of the oldest's first"


def test_slots_that_nobody_can_use_go_back() -> None:
    first, second = running(8, 1), running(8, 2)
    sender, engine, client = sending(first, 3)
    assert sender.pack() == 0
    assert client.said == [("freed", assigned(2))], "two are for what is being computed"
    opened(sender, second, 8, 1)
    assign(sender, 4)
    client.said.clear()
    sender.end(7)
    assert sender.pack() == 0 and client.said == [("freed", assigned(4, 1))]
    compute(second, 8, 1)
    engine.passed = 1
    assert sender.pack() == 4 and engine.copies[-1].runs == [(0, 4, 0)]


def test_steps_of_pages_that_were_taken_away_are_forgotten() -> None:
    """The scheduler's part: a prompt that is computed anew, from a prefix that another one computes."""
    pool = PagePool(40, 4)
    scheduler = PrefillScheduler(pool, 4, 8)
    work = SequenceRequest(1, [3] * 12, Sampling(max_tokens=4, seed=1))
    sequence = scheduler.add(work)
    for pool.step in (1, 2):
        scheduler.launched(scheduler.schedule())
    assert [sequence.tokens_done(step) for step in (0, 1, 2)] == [0, 8, 12]
    other = scheduler.add(SequenceRequest(2, [3] * 12, Sampling(max_tokens=4, seed=1)))
    pool.step = 5
    scheduler.launched(scheduler.schedule())
    assert other.cached_tokens == 8 and other.tokens_done(0) == 0, "the prefix is step 1's"
    assert [other.tokens_done(step) for step in (1, 4, 5)] == [8, 8, 12]
    scheduler.holding.pop(1)
    scheduler.batch.reset(sequence)
    assert sequence.tokens_done(9) == 0


@pytest.mark.parametrize("how", ["aborted", "lost"])
def test_a_transfer_that_ends_under_its_packs_keeps_pages_and_slots_until_they_are_done(how: str) -> None:
    sequence = running(8)
    sender, engine, client = sending(sequence, 1)
    compute(sequence, 8, 1)
    engine.passed = 1
    sender.pack()
    assign(sender, 1)
    sender.pack()
    if how == "aborted":
        sender.end(7, abort_reason="gone")
        assert client.said == [("abort", 7, "gone")]
    else:
        sender.rank_lost(0)
    assert engine.fenced == [engine.copies[1]], "later steps wait for the last of them"
    assert sender.pack() == 0 and sender.deliver() == 0 and sender.in_flight
    engine.done()
    client.said.clear()
    assert sender.deliver() == 0 and not sender.in_flight
    sender.pack()
    expected = [("freed", assigned(1, 0))] if how == "aborted" else []
    assert client.said == expected, "slots of a process that is gone are nobody's"


def receiving(sequence: Sequence) -> tuple[KvReceiver, FakeCopier, FakeClient]:
    engine, client = FakeCopier(), FakeClient()
    receiver = KvReceiver([(engine, client)], 1, lambda: 0.0, Spans())  # type: ignore[arg-type]
    assert not receiver.open(sequence, 7, SOURCE, 1.0)
    client.said.clear()
    return receiver, engine, client


def arrived(*starts: int, off_by: int = 0) -> Arrived:
    segments = [Segment(start // 4, 1, start, 4, 64, 5 + start // 4 + off_by) for start in starts]
    return Arrived(7, segments)


def test_a_transfer_is_committed_when_its_unpacks_are_done_and_judged() -> None:
    sequence = running(12)
    receiver, engine, client = receiving(sequence)
    receiver.arrived(arrived(0))
    receiver.arrived(arrived(4))
    assert receiver.in_flight and not engine.copies
    assert receiver.settle().whole == [] and client.said == [] and receiver.in_flight
    receiver.arrived(arrived(8))
    assert receiver.settle().whole == []
    assert [copy.runs for copy in engine.copies] == [[(0, 4, 0), (4, 4, 1)], [(8, 4, 2)]]
    engine.done(0)
    assert receiver.settle().whole == []
    assert client.said == [("freed", [SlotUse(0, 1), SlotUse(1, 1)])]
    engine.done()
    (whole,) = receiver.settle().whole
    assert whole.sequence is sequence and not receiver.in_flight and len(receiver) == 0
    assert client.said[1:] == [("commit", 7), ("freed", [SlotUse(2, 1)])]


def test_a_wrong_checksum_is_never_committed() -> None:
    receiver, engine, client = receiving(running(8))
    receiver.arrived(arrived(0))
    receiver.arrived(arrived(4, off_by=1))
    receiver.settle()
    assert engine.copies[0].with_checksums
    engine.done()
    settled = receiver.settle()
    assert settled.whole == [] and settled.broken == [(7, "tokens [4, 8): differs")]
    assert client.said == [("freed", [SlotUse(0, 1), SlotUse(1, 1)])]


def test_a_transfer_that_ends_under_its_unpacks_gives_slots_back_when_they_are_done() -> None:
    receiver, engine, client = receiving(running(8))
    receiver.arrived(arrived(0))
    receiver.settle()
    assert receiver.end(7, abort_reason="gone")
    assert engine.fenced == [engine.copies[0]], "its pages may be another's in the next step"
    receiver.arrived(arrived(4))  # had crossed the abort
    assert client.said == [("abort", 7, "gone"), ("freed", [SlotUse(1, 1)])]
    assert receiver.settle().whole == [] and receiver.in_flight
    engine.done()
    assert receiver.settle().whole == [] and client.said[2:] == [("freed", [SlotUse(0, 1)])]


def test_a_lost_transfer_process_is_given_nothing_back() -> None:
    receiver, engine, client = receiving(running(8))
    receiver.arrived(arrived(0))
    receiver.settle()
    receiver.arrived(arrived(4))
    assert receiver.rank_lost(0) == [7]
    engine.done()
    assert engine.fenced == [engine.copies[0]] and not receiver.in_flight
    receiver.settle()
    assert client.said == []
