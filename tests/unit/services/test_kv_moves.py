"""Packs and unpacks that take their time: what is handed over when, and what a bad moment does to it."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from kvtransfer.messages import (
    WITHDRAWN,
    Arrived,
    Segment,
    SendCommitted,
    SendConfirmed,
    SendSlots,
    SlotUse,
    TransferAddress,
)
from kvtransfer.spans import Spans
from services.engine.errors import ChecksumMismatch
from services.engine.run_table import SlotRun
from services.kv_pull import KvPull
from services.kv_push import KvPush
from services.kv_push_parts import PushParts
from services.messages import Prefill, Sampling, Tokens, Work
from services.outbox import Outbox
from services.roles.prefill import MAX_FLIGHTS, PrefillRole
from services.roles.role import Occupancy, Parts
from services.rules import Limits
from services.scheduler.pages import PagePool
from services.scheduler.sequence import Chunk, Sequence, prompt_sequence
from tests.unit.services.test_overlap import FakeDevice

SOURCE = TransferAddress("ipc:///source", 1)
TOKENS_PER_SLOT = 4


@dataclass(eq=False)
class FakeMove:
    runs: list[tuple[int, int, int]]
    """First token, tokens, slot."""
    after: object
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
    """Steps as `FakeDevice`; moves are done when a test says so. `held` are those that steps wait for."""

    def __init__(self, pages: int = 40) -> None:
        super().__init__(pages)
        self.moves: list[FakeMove] = []
        self.held: list[FakeMove] = []
        self.marks = 0
        self.passed_marks: set[object] = set()

    def mark(self) -> int:
        self.marks += 1
        return self.marks

    def pack(self, runs: list[SlotRun], with_checksums: bool, after: object) -> FakeMove:
        assert {run.heads for run in runs} == {range(1)}
        moved = [(run.start_token, run.token_count, run.slot) for run in runs]
        self.moves.append(FakeMove(moved, after, with_checksums))
        return self.moves[-1]

    unpack = pack

    def passed(self, mark: object) -> bool:
        return mark in self.passed_marks

    def hold_steps(self, move: FakeMove) -> None:
        self.held.append(move)

    def done(self, *numbers: int) -> None:
        for number in numbers or range(len(self.moves)):
            self.moves[number].is_done = True


@dataclass
class FakeClient:
    checksum: bool = True
    ready: bool = True
    said: list[tuple[Any, ...]] = field(default_factory=list)

    def packs_idle(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return lambda *values: self.said.append((name, *values))


def confirmed(tokens: int) -> SendConfirmed:
    return SendConfirmed(7, 0, tokens, kv_heads=1, segment_tokens=TOKENS_PER_SLOT, tp=1)


def running(tokens: int, computed: int = 0, request_id: int = 1) -> Sequence:
    sequence = prompt_sequence(Work(request_id, [1] * tokens, Sampling(max_tokens=4, seed=1)))
    sequence.pages = list(range(10))
    sequence.computed_tokens = computed
    return sequence


def pushing(sequence: Sequence, slots: int) -> tuple[KvPush, FakeMoves, FakeClient]:
    engine, client = FakeMoves(), FakeClient()
    push = KvPush(engine, client, lambda: 0.0, Spans())  # type: ignore[arg-type]
    push.open(sequence, 7, 1.0)
    assert push.confirmed(confirmed(sequence.prompt_tokens), range(1))
    push.lend(SendSlots(7, [SlotUse(slot, 1) for slot in range(slots)]))
    client.said.clear()
    return push, engine, client


def compute(push: KvPush, sequence: Sequence, count: int, mark: object) -> None:
    chunk = Chunk(sequence, sequence.computed_tokens, count, ())
    sequence.computed_tokens += count
    push.launched([chunk], mark)  # type: ignore[arg-type]


def test_a_slot_is_handed_over_when_its_pack_is_done() -> None:
    sequence = running(12)
    push, engine, client = pushing(sequence, 2)
    compute(push, sequence, 12, "step")
    assert push.pack() == 8 and push.deliver() == 0 and client.said == [] and push.in_flight
    push.lend(SendSlots(7, [SlotUse(2, 1)]))
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


def test_a_pack_waits_for_the_step_that_computed_its_tokens_and_no_later_one() -> None:
    sequence = running(16)
    push, engine, _ = pushing(sequence, 1)
    compute(push, sequence, 6, "first")
    push.pack()
    compute(push, sequence, 6, "second")
    compute(push, sequence, 4, "third")
    push.lend(SendSlots(7, [SlotUse(slot, 2) for slot in range(4)]))
    push.pack()
    assert [(move.runs, move.after) for move in engine.moves] == [
        ([(0, 4, 0)], ("first",)),
        ([(4, 4, 0), (8, 4, 1)], ("second",)),  # the first computed only a part of the former
        ([(12, 4, 2)], ("third",)),
    ]


def test_marks_of_pages_that_were_taken_away_are_not_believed() -> None:
    sequence = running(8)
    push, engine, _ = pushing(sequence, 2)
    compute(push, sequence, 8, "former")
    sequence.pages, sequence.computed_tokens = [20, 21], 4  # reset, and found as a prefix meanwhile
    push.pack()
    assert [move.after for move in engine.moves] == [None], "everything queued so far"
    compute(push, sequence, 4, "anew")
    push.pack()
    assert engine.moves[1].after == ("anew",)


@pytest.mark.parametrize("how", ["aborted", "lost"])
def test_a_transfer_that_ends_under_its_packs_keeps_pages_and_slots_until_they_are_done(how: str) -> None:
    sequence = running(8)
    push, engine, client = pushing(sequence, 1)
    compute(push, sequence, 8, "step")
    push.pack()
    push.lend(SendSlots(7, [SlotUse(1, 1)]))
    push.pack()
    if how == "aborted":
        push.close(7, abort_reason="gone")
        assert client.said == [("abort", 7, "gone")]
    else:
        push.clear()
    assert engine.held == [engine.moves[1]], "later steps wait for the last of them"
    assert not client.packs_idle() and push.in_flight
    engine.done(0)
    assert not client.packs_idle()
    engine.done(1)
    assert client.packs_idle() and push.deliver() == 0 and not push.in_flight
    assert not [said for said in client.said if said[0] == "filled"]


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
    engine.mark()
    pull.unpack(arrived(0))
    pull.unpack(arrived(4))
    assert pull.in_flight and not engine.moves
    assert pull.settle().whole == [] and client.said == [] and pull.in_flight
    pull.unpack(arrived(8))
    assert pull.settle().whole == []
    assert [(move.runs, move.after) for move in engine.moves] == [
        ([(0, 4, 0), (4, 4, 1)], [1]),
        ([(8, 4, 2)], [1]),  # steps queued when the pages were taken
    ]
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


# ---------------------------------------------------------------- the prefill role


class Prefilling:
    def __init__(self) -> None:
        self.pool, self.engine, self.client = PagePool(40, 4), FakeMoves(40), FakeClient()
        self.tokens: list[Tokens] = []
        self.parts = Parts(
            engine=self.engine,  # type: ignore[arg-type]
            pool=self.pool,
            limits=Limits(1000, 160, 4, 1000, frozenset()),
            max_chunk_tokens=8,
            outbox=Outbox(self._reported),
            clock=lambda: 0.0,
            overlap=True,
        )
        push = KvPush(self.engine, self.client, self.parts.clock, self.parts.spans)  # type: ignore[arg-type]
        self.role = PrefillRole(self.parts, PushParts([push], 1))

    def _reported(self, router: bytes, reports: list[Any]) -> bool:
        self.tokens += [one for one in reports if isinstance(one, Tokens)]
        return True

    def step(self) -> bool:
        busy = self.role.step()
        self.parts.outbox.flush()
        return busy

    def assert_at_rest(self) -> None:
        assert not self.step() and self.role.occupancy() == Occupancy()
        assert not self.role.in_flight and self.pool.counts().used == 0 and not self.parts.requests


def prefilling(prompt_tokens: int, delays: list[int]) -> Prefilling:
    served = Prefilling()
    served.engine.delays = iter(delays)
    work = Work(1, [3] * prompt_tokens, Sampling(max_tokens=9, seed=1, ignore_eos=True))
    served.role.accept(b"router", Prefill(work, 7))
    served.role.on_transfer(confirmed(prompt_tokens))
    return served


def test_chunks_are_packed_while_the_next_one_runs() -> None:
    """And no more than two steps are queued, however long the prompt."""
    served = prefilling(24, [1000, 1000, 1000])
    served.role.on_transfer(SendSlots(7, [SlotUse(slot, 1) for slot in range(6)]))
    for _ in range(4):
        assert served.step()
    assert served.engine.launches == MAX_FLIGHTS
    assert [move.runs for move in served.engine.moves] == [[(0, 4, 0), (4, 4, 1)], [(8, 4, 2), (12, 4, 3)]]
    assert not [said for said in served.client.said if said[0] == "filled"]
    served.engine.done(0)
    served.step()
    assert [one.start_token for one in served.client.said[-1][2]] == [0, 4]


def test_kv_that_has_arrived_before_the_first_token_is_known_ends_the_request_after_it() -> None:
    """Also where nothing was sent because the other side had everything, before the prompt ran at all."""
    for steps in (0, 1):
        served = prefilling(8, [3])
        for _ in range(steps):
            served.step()
        served.role.on_transfer(SendCommitted(7))
        for _ in range(5):
            served.step()
        assert [len(one.tokens) for one in served.tokens] == [1]
        served.assert_at_rest()


def test_a_prompt_that_is_cancelled_under_its_packs_leaves_nothing() -> None:
    served = prefilling(8, [2])
    served.role.on_transfer(SendSlots(7, [SlotUse(0, 1), SlotUse(1, 1)]))
    served.step()
    served.role.end(1, WITHDRAWN)
    for _ in range(3):
        assert served.step(), "a step and two packs are on the device"
    assert served.engine.held and not served.tokens
    served.engine.done()
    served.step()
    served.assert_at_rest()
