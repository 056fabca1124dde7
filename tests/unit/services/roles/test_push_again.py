"""A prefill worker whose transfers fail: the request stays, and its KV goes where the router says."""

from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from kvtransfer.client import TransferLost
from kvtransfer.messages import WITHDRAWN, Aborted, SendCommitted, SendConfirmed
from services.engine.batch import RowResult, SampledToken
from services.protocol.messages import (
    Cancel,
    Failed,
    KvLeaseExpiring,
    KvTransferFailed,
    Prefill,
    PrefillDone,
    Report,
    RepushKv,
    Sampling,
    SequenceRequest,
    Tokens,
)
from services.roles.limits import WorkerLimits
from services.roles.prefill import LEASE_S, PrefillRole
from services.roles.report_queue import ReportQueue
from services.roles.role import WorkerContext
from services.scheduler.pages import PagePool
from services.scheduler.sequence import Sequence, State

LIMITS = WorkerLimits(100, 64, 4, 8, frozenset())
ROUTER = b"r"


@dataclass
class FakeSender:
    """In the place of `KvSender`: which transfers are open, and which were given up, with what reason."""

    open_ids: dict[int, Sequence] = field(default_factory=dict)
    given_up: list[tuple[int, str]] = field(default_factory=list)
    ready_ids: list[int] = field(default_factory=list)

    def open(self, sequence: Sequence, transfer_id: int, deadline_s: float) -> None:
        assert deadline_s > 0
        self.open_ids[transfer_id] = sequence

    def ready(self, transfer_id: int) -> None:
        self.ready_ids.append(transfer_id)

    def on_event(self, event: Any) -> Any:
        if isinstance(event, SendCommitted | Aborted):
            self.open_ids.pop(event.transfer_id, None)
        return event

    def end(self, transfer_id: int, abort_reason: str | None = None) -> None:
        if self.open_ids.pop(transfer_id, None) is not None and abort_reason is not None:
            self.given_up.append((transfer_id, abort_reason))

    def rank_lost(self, lost_rank: int) -> None:
        self.open_ids.clear()


class Scene:
    def __init__(self) -> None:
        self.said: list[Report] = []
        self.now_s = 0.0
        self.outbox = ReportQueue(self._send)
        context = WorkerContext(
            engine=cast(Any, None),
            pool=PagePool(8, 4, prefix_cache=False),
            limits=LIMITS,
            max_chunk_tokens=32,
            outbox=self.outbox,
            clock=lambda: self.now_s,
            overlap=False,
        )
        self.sender = FakeSender()
        self.role = PrefillRole(context, cast(Any, self.sender))
        self.role.accept(ROUTER, Prefill(SequenceRequest(1, [5] * 9, Sampling(max_tokens=4, seed=1)), 50))

    def _send(self, peer: bytes, reports: list[Report]) -> bool:
        assert peer == ROUTER
        self.said += reports
        return True

    def heard(self) -> list[Report]:
        self.outbox.flush()
        said, self.said = self.said, []
        return said

    def first_token(self) -> None:
        """The prompt runs, and its first token is reported."""
        plan = self.role.scheduler.schedule()
        self.role.scheduler.launched(plan)
        self.role._report(plan.chunks[0], RowResult([SampledToken(7)]))

    def compute(self) -> Sequence:
        """The prompt runs, and its first token is out."""
        scheduler = self.role.scheduler
        plan = scheduler.schedule()
        scheduler.launched(plan)
        sequence = scheduler.get(1)
        assert sequence is not None and sequence.state is State.HOLDING
        sequence.choices = []
        return sequence


@pytest.mark.parametrize("how", ["aborted", "lost"])
def test_kv_that_was_not_delivered_is_held_and_pushed_again(how: str) -> None:
    scene = Scene()
    scene.role.on_transfer(SendConfirmed(50, 0, 9, 1, 4, 1))
    sequence = scene.compute()
    pages = list(sequence.pages)
    scene.role.on_transfer(Aborted(50, "lost") if how == "aborted" else TransferLost(7))
    reports = scene.heard()
    assert [type(one) for one in reports] == [KvTransferFailed]
    assert reports[0].transfer_id == 50  # type: ignore[union-attr]
    assert sequence.state is State.HOLDING and sequence.pages == pages
    assert not scene.sender.open_ids
    scene.role.on_transfer(SendCommitted(50))
    assert sequence.state is State.HOLDING, "a former transfer has no say"
    scene.role.accept(ROUTER, RepushKv(1, 51))
    assert scene.sender.open_ids == {51: sequence}
    assert not scene.role.scheduler.schedule(), "nothing is computed again"
    scene.role.on_transfer(SendCommitted(51))
    assert sequence.state is State.ENDED and not scene.role.context.requests and not scene.heard()


def test_slots_are_asked_for_once_there_are_pages() -> None:
    scene = Scene()
    scene.role.accept(ROUTER, Prefill(SequenceRequest(2, [6] * 30, Sampling(max_tokens=4, seed=1)), 60))
    scene.role.on_transfer(SendConfirmed(60, 0, 30, 1, 4, 1))
    scene.role.on_transfer(SendConfirmed(50, 0, 9, 1, 4, 1))
    scene.role._notify_ready()
    assert scene.sender.ready_ids == []
    plan = scene.role.scheduler.schedule()
    scene.role.scheduler.launched(plan)
    scene.role._notify_ready()
    assert scene.sender.ready_ids == [50], "the other one waits for pages that are in use"
    scene.role.on_transfer(Aborted(50, "lost"))
    scene.role.accept(ROUTER, RepushKv(1, 51))
    scene.role.on_transfer(SendConfirmed(51, 0, 9, 1, 4, 1))
    scene.role._notify_ready()
    assert scene.sender.ready_ids == [50, 51]


def test_what_is_held_for_long_is_asked_after() -> None:
    scene = Scene()
    scene.role.sweep()
    assert not scene.heard()
    scene.first_token()
    scene.now_s = LEASE_S - 0.1
    scene.role.sweep()
    assert [type(one) for one in scene.heard()] == [PrefillDone, Tokens]
    for _ in range(2):
        scene.now_s += LEASE_S
        scene.role.sweep()
        scene.role.sweep()
        assert scene.heard() == [KvLeaseExpiring(1)]
    scene.role.accept(ROUTER, Cancel(1))
    scene.now_s += LEASE_S
    scene.role.sweep()
    assert not scene.heard() and not scene.role.context.requests


def test_a_push_that_still_goes_on_is_given_up_for_the_next() -> None:
    scene = Scene()
    scene.role.accept(ROUTER, RepushKv(1, 51))
    assert scene.sender.given_up == [(50, WITHDRAWN)] and list(scene.sender.open_ids) == [51]
    scene.role.on_transfer(Aborted(50, "late"))
    assert not scene.heard() and list(scene.sender.open_ids) == [51]
    scene.role.accept(ROUTER, RepushKv(1, 51))
    assert scene.role.context.counters["dropped_duplicate_request"] == 1


def test_what_is_not_here_any_more_is_said_at_once() -> None:
    scene = Scene()
    scene.role.accept(ROUTER, Cancel(1))
    scene.role.accept(ROUTER, RepushKv(1, 51))
    (report,) = scene.heard()
    assert isinstance(report, Failed) and report.retryable and report.code == "transfer"
    assert not scene.sender.open_ids


def test_held_kv_gives_way_to_a_confirmed_prompt_and_is_computed_again() -> None:
    scene = Scene()
    sequence = scene.compute()
    scene.role.on_transfer(Aborted(50, "lost"))
    scene.role.accept(ROUTER, Prefill(SequenceRequest(2, [6] * 24, Sampling(max_tokens=4, seed=1)), 60))
    scene.role.on_transfer(SendConfirmed(60, 0, 24, 1, 4, 1))
    plan = scene.role.scheduler.schedule()
    assert [chunk.sequence.work.request_id for chunk in plan.chunks] == [2]
    assert sequence.state is State.WAITING
    scene.role.scheduler.launched(plan)
    plan.chunks[0].sequence.choices = []  # its first tokens are out
    scene.role.on_transfer(SendCommitted(60))
    assert not scene.role.scheduler.schedule(), "not before somebody takes it"
    scene.role.accept(ROUTER, RepushKv(1, 51))
    scene.role.on_transfer(SendConfirmed(51, 0, 9, 1, 4, 1))
    plan = scene.role.scheduler.schedule()
    assert [(chunk.sequence, chunk.samples) for chunk in plan.chunks] == [(sequence, ())]


def test_held_kv_is_given_back_at_the_deadline() -> None:
    scene = Scene()
    sequence = scene.compute()
    scene.role.on_transfer(TransferLost(7))
    scene.heard()
    scene.now_s = 601.0
    scene.role.sweep()
    (report,) = scene.heard()
    assert isinstance(report, Failed) and report.code == "deadline"
    assert sequence.state is State.ENDED and scene.role.context.pool.counts().used == 0
