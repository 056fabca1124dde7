"""The prefill role beside packs that take their time."""

from typing import Any

from kvtransfer.client import SlotsAssigned
from kvtransfer.messages import WITHDRAWN, SendCommitted, SendGranted
from services.protocol.messages import Prefill, Sampling, SequenceRequest, Tokens
from services.roles.limits import WorkerLimits
from services.roles.prefill import MAX_STEPS_IN_FLIGHT as MOST
from services.roles.prefill import PrefillRole
from services.roles.report_queue import ReportQueue
from services.roles.role import Occupancy, WorkerContext
from services.scheduler.pages import PagePool
from services.transfer.sender import KvSender
from tests.unit.services.transfer.test_copies import FakeClient, FakeCopier, assigned, confirmed


class Prefilling:
    def __init__(self) -> None:
        self.pool, self.engine, self.client = PagePool(40, 4), FakeCopier(40), FakeClient()
        self.tokens: list[Tokens] = []
        self.context = WorkerContext(
            engine=self.engine,  # type: ignore[arg-type]
            pool=self.pool,
            limits=WorkerLimits(1000, 160, 4, 1000, frozenset()),
            max_chunk_tokens=8,
            outbox=ReportQueue(self._reported),
            clock=lambda: 0.0,
            overlap=True,
        )
        ranks: Any = [(self.engine, self.client)]
        self.role = PrefillRole(self.context, KvSender(ranks, 1, self.context.clock, self.context.spans))

    def _reported(self, router: bytes, reports: list[Any]) -> bool:
        self.tokens += [one for one in reports if isinstance(one, Tokens)]
        return True

    def step(self) -> bool:
        busy = self.role.step()
        self.context.outbox.flush()
        return busy

    def assert_at_rest(self) -> None:
        assert not self.step() and self.role.occupancy() == Occupancy()
        assert not self.role.in_flight and self.pool.counts().used == 0 and not self.context.requests


def prefilling(prompt_tokens: int, delays: list[int]) -> Prefilling:
    served = Prefilling()
    served.engine.delays = iter(delays)
    work = SequenceRequest(1, [3] * prompt_tokens, Sampling(max_tokens=9, seed=1, ignore_eos=True))
    served.role.accept(b"router", Prefill(work, 7))
    served.role.on_transfer(confirmed(prompt_tokens))
    served.role.on_transfer(SendGranted(7, 6))
    return served


def test_chunks_are_packed_while_the_next_one_runs() -> None:
    """And no more than two steps are queued, however long the prompt."""
    served = prefilling(24, [1000, 1000, 1000])
    served.step()
    served.role.on_transfer(SlotsAssigned(assigned(*range(6))))
    for _ in range(3):
        assert served.step()
    assert served.engine.launches == MOST and not served.engine.copies
    served.engine.passed = 1
    for _ in range(2):
        served.step()
    assert [copy.runs for copy in served.engine.copies] == [[(0, 4, 0), (4, 4, 1)]]
    assert not [said for said in served.client.said if said[0] == "filled"]
    served.engine.done(0)
    served.step()
    assert [one.start_token for one in served.client.said[-1][2]] == [0, 4]
    served.engine.passed = 2
    served.step()
    assert served.engine.copies[-1].runs == [(8, 4, 2), (12, 4, 3)]


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
    served = prefilling(8, [4])
    served.step()
    served.role.on_transfer(SlotsAssigned(assigned(0, 1)))
    served.engine.passed = 1
    served.step()
    served.role.end(1, WITHDRAWN)
    for _ in range(3):
        assert served.step(), "a step and two packs are on the device"
    assert served.engine.fenced and not served.tokens
    served.engine.done()
    served.step()
    served.assert_at_rest()


def test_what_is_packed_is_handed_over_before_the_next_launch_but_not_at_any_price() -> None:
    served = prefilling(32, [1, 1000, 1000, 1000])
    now_s = 10.0
    served.context.clock = lambda: now_s
    served.step()
    served.role.on_transfer(SlotsAssigned(assigned(0, 1)))
    served.step()
    assert served.engine.launches == MOST
    served.engine.passed = 1
    served.step()
    assert served.role.sender.in_flight and served.engine.launches == MOST, "the packs go first"
    served.engine.done()
    served.step()
    assert [said[0] for said in served.client.said][-1] == "filled"
    assert served.engine.launches == MOST, "said, but sent only when this turn ends"
    served.step()
    assert served.engine.launches == MOST + 1

    served = prefilling(32, [1, 1000, 1000, 1000])
    served.context.clock = lambda: now_s
    served.step()
    served.role.on_transfer(SlotsAssigned(assigned(0, 1)))
    served.step()
    served.engine.passed = 1
    served.step()
    now_s += 1.0
    served.step()
    assert served.role.sender.in_flight and served.engine.launches == MOST + 1, "the device has to go on"


def test_a_first_token_does_not_wait_for_a_launch_beside_a_running_step() -> None:
    """Nor does the device wait for anything when no step runs."""
    served = Prefilling()
    served.context.clock = lambda: 10.0
    served.engine.delays = iter([1, 1000, 1000])
    for request_id, tokens in ((1, 8), (2, 24)):
        work = SequenceRequest(request_id, [3] * tokens, Sampling(max_tokens=9, seed=1, ignore_eos=True))
        served.role.accept(b"router", Prefill(work, request_id))
    launches: list[int] = []
    while not served.tokens:
        assert served.step()
        launches.append(served.engine.launches)
    assert launches == [1, MOST, MOST], "the turn that has a token to report launches nothing"
    served.step()
    assert served.engine.launches == MOST + 1
