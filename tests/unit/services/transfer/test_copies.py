"""Packs and unpacks that take their time: what is handed over when, and what a bad moment does to it."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from kvtransfer.messages import (
    Arrived,
    Segment,
    SendConfirmed,
    SendGranted,
    SlotUse,
    TransferAddress,
)
from kvtransfer.spans import Spans
from services.engine.errors import ChecksumMismatch
from services.engine.kv.run_table import SlotRun
from services.protocol.messages import Sampling, SequenceRequest
from services.scheduler.pages import PagePool
from services.scheduler.prefill import PrefillScheduler
from services.scheduler.sequence import Sequence, prompt_sequence
from services.transfer.pull import KvPull
from services.transfer.push import KvPush
from tests.unit.services.roles.test_overlap import FakeDevice

SOURCE = TransferAddress("ipc:///source", 1)
TOKENS_PER_SLOT = 4


@dataclass(eq=False)
class FakeMove:
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


class FakeMoves(FakeDevice):
    """Steps as `FakeDevice`, done when a test says so (`passed`), as moves are. `held` are those that steps
    wait for."""

    def __init__(self, pages: int = 40) -> None:
        super().__init__(pages)
        self.moves: list[FakeMove] = []
        self.held: list[FakeMove] = []
        self.passed = 0

    def pack(self, runs: list[SlotRun], with_checksums: bool) -> FakeMove:
        assert {run.heads for run in runs} == {range(1)}
        moved = [(run.start_token, run.token_count, run.slot) for run in runs]
        self.moves.append(FakeMove(moved, with_checksums))
        return self.moves[-1]

    unpack = pack

    def passed_step(self) -> int:
        return self.passed

    def fence(self, move: FakeMove) -> None:
        self.held.append(move)

    def done(self, *numbers: int) -> None:
        for number in numbers or range(len(self.moves)):
            self.moves[number].is_done = True


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


def opened(push: KvPush, sequence: Sequence, transfer_id: int, grants: int) -> None:
    """A transfer that the destination has confirmed, of a prompt that has pages."""
    push.open(sequence, transfer_id, 1.0)
    tokens = sequence.prompt_tokens
    event = SendConfirmed(transfer_id, 0, tokens, kv_heads=1, segment_tokens=TOKENS_PER_SLOT, tp=1)
    assert push.confirmed(event, range(1))
    push.ready(transfer_id)
    push.granted(SendGranted(transfer_id, grants))


def assigned(*slots: int, generation: int = 1) -> list[SlotUse]:
    return [SlotUse(slot, generation) for slot in slots]


def pushing(sequence: Sequence, slots: int, grants: int = 8) -> tuple[KvPush, FakeMoves, FakeClient]:
    engine, client = FakeMoves(), FakeClient()
    push = KvPush(engine, client, lambda: 0.0, Spans())  # type: ignore[arg-type]
    opened(push, sequence, 7, grants)
    push.assign(assigned(*range(slots)))
    client.said.clear()
    return push, engine, client


def compute(sequence: Sequence, count: int, step: int) -> None:
    """Step number `step` computes so many tokens more."""
    sequence.computed_tokens += count
    sequence.chunk_steps.append((sequence.computed_tokens, step))


def test_a_slot_is_handed_over_when_its_pack_is_done() -> None:
    sequence = running(12)
    push, engine, client = pushing(sequence, 2)
    compute(sequence, 12, 1)
    engine.passed = 1
    assert push.pack() == 8 and push.deliver() == 0 and client.said == [] and push.in_flight
    push.assign(assigned(2))
    assert push.pack() == 4
    engine.done(1)
    assert push.deliver() == 0, "the packs end in their order"
    engine.done(0)
    assert push.deliver() == 3 and not push.in_flight
    ((_, transfer_id, segments),) = client.said
    assert transfer_id == 7
    assert segments == [
        Segment(0, 1, 0, 4, 64, 5),
        Segment(1, 1, 4, 4, 65, 6),
        Segment(2, 1, 8, 4, 66, 7),
    ]


def test_tokens_are_packed_as_their_step_is_done_and_take_no_slot_before() -> None:
    sequence = running(16)
    push, engine, client = pushing(sequence, 4)
    for step, count in enumerate((6, 6, 4), 1):
        compute(sequence, count, step)
    assert push.pack() == 0 and not push.in_flight
    packed = []
    for engine.passed in (1, 2, 3):
        push.pack()
        packed.append(engine.moves[-1].runs)
    assert packed[:2] == [[(0, 4, 0), (4, 2, 1)], [(6, 4, 2), (10, 2, 3)]]
    assert packed[2] == packed[1], "no slot was left for the third"
    push.assign(assigned(4))
    assert push.pack() == 4 and engine.moves[-1].runs == [(12, 4, 4)]
    assert not client.said


def test_a_slot_goes_to_the_oldest_request_with_computed_tokens_and_a_grant() -> None:
    """Whatever the slots were assigned for: an older one whose step is still running takes none."""
    oldest, middle, youngest = running(16, 1), running(8, 2), running(8, 3)
    push, engine, _ = pushing(oldest, 0)
    opened(push, youngest, 9, 8)
    opened(push, middle, 8, 1)
    compute(middle, 8, 1)
    compute(youngest, 8, 2)
    compute(oldest, 16, 3)
    engine.passed = 2
    push.assign(assigned(0, 1))
    assert push.pack() == 8
    assert engine.moves[-1].runs == [(0, 4, 0), (0, 4, 1)]
    assert [one.next_token for one in push._outgoing.values()] == [0, 4, 4]
    engine.passed = 3
    push.assign(assigned(2, 3, 4, 5, 6, 7))
    assert push.pack() == 20
    assert [run[0] for run in engine.moves[-1].runs] == [0, 4, 8, 12, 4], "four of the oldest's first"


def test_slots_that_nobody_can_use_go_back() -> None:
    first, second = running(8, 1), running(8, 2)
    push, engine, client = pushing(first, 3)
    assert push.pack() == 0
    assert client.said == [("freed", assigned(2))], "two are for what is being computed"
    opened(push, second, 8, 1)
    push.assign(assigned(4))
    client.said.clear()
    push.close(7)
    assert push.pack() == 0 and client.said == [("freed", assigned(4, 1))]
    compute(second, 8, 1)
    engine.passed = 1
    assert push.pack() == 4 and engine.moves[-1].runs == [(0, 4, 0)]


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
    push, engine, client = pushing(sequence, 1)
    compute(sequence, 8, 1)
    engine.passed = 1
    push.pack()
    push.assign(assigned(1))
    push.pack()
    if how == "aborted":
        push.close(7, abort_reason="gone")
        assert client.said == [("abort", 7, "gone")]
    else:
        push.clear()
    assert engine.held == [engine.moves[1]], "later steps wait for the last of them"
    assert push.pack() == 0 and push.deliver() == 0 and push.in_flight
    engine.done()
    client.said.clear()
    assert push.deliver() == 0 and not push.in_flight
    push.pack()
    expected = [("freed", assigned(1, 0))] if how == "aborted" else []
    assert client.said == expected, "slots of a process that is gone are nobody's"


def pulling(sequence: Sequence) -> tuple[KvPull, FakeMoves, FakeClient]:
    engine, client = FakeMoves(), FakeClient()
    pull = KvPull(engine, client, lambda: 0.0, Spans())  # type: ignore[arg-type]
    pull.open(sequence, 7, SOURCE, 1.0, range(1))
    client.said.clear()
    return pull, engine, client


def arrived(*starts: int, off_by: int = 0) -> Arrived:
    segments = [Segment(start // 4, 1, start, 4, 64, 5 + start // 4 + off_by) for start in starts]
    return Arrived(7, segments)


def test_a_transfer_is_committed_when_its_unpacks_are_done_and_judged() -> None:
    sequence = running(12)
    pull, engine, client = pulling(sequence)
    pull.unpack(arrived(0))
    pull.unpack(arrived(4))
    assert pull.in_flight and not engine.moves
    assert pull.settle().whole == [] and client.said == [] and pull.in_flight
    pull.unpack(arrived(8))
    assert pull.settle().whole == []
    assert [move.runs for move in engine.moves] == [[(0, 4, 0), (4, 4, 1)], [(8, 4, 2)]]
    engine.done(0)
    assert pull.settle().whole == []
    assert client.said == [("freed", [SlotUse(0, 1), SlotUse(1, 1)])]
    engine.done()
    (whole,) = pull.settle().whole
    assert whole.sequence is sequence and not pull.in_flight and len(pull) == 0
    assert client.said[1:] == [("commit", 7), ("freed", [SlotUse(2, 1)])]


def test_a_wrong_checksum_is_never_committed() -> None:
    pull, engine, client = pulling(running(8))
    pull.unpack(arrived(0))
    pull.unpack(arrived(4, off_by=1))
    pull.settle()
    assert engine.moves[0].with_checksums
    engine.done()
    settled = pull.settle()
    assert settled.whole == [] and settled.broken == [(7, "tokens [4, 8): differs")]
    assert client.said == [("freed", [SlotUse(0, 1), SlotUse(1, 1)])]


def test_a_transfer_that_ends_under_its_unpacks_gives_slots_back_when_they_are_done() -> None:
    pull, engine, client = pulling(running(8))
    pull.unpack(arrived(0))
    pull.settle()
    assert pull.close(7, abort_reason="gone")
    assert engine.held == [engine.moves[0]], "its pages may be another's in the next step"
    pull.unpack(arrived(4))  # had crossed the abort
    assert client.said == [("abort", 7, "gone"), ("freed", [SlotUse(1, 1)])]
    assert pull.settle().whole == [] and pull.in_flight
    engine.done()
    assert pull.settle().whole == [] and client.said[2:] == [("freed", [SlotUse(0, 1)])]


def test_a_lost_transfer_process_is_given_nothing_back() -> None:
    pull, engine, client = pulling(running(8))
    pull.unpack(arrived(0))
    pull.settle()
    pull.unpack(arrived(4))
    pull.clear()
    engine.done()
    assert engine.held == [engine.moves[0]] and not pull.in_flight
    pull.settle()
    assert client.said == []
