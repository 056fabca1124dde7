"""The decoding roles measure their steps, and keep them in the deadline that the measured times allow."""

from typing import Any

import pytest

from services.engine.batch import Row
from services.protocol.messages import Sampling, SequenceRequest
from services.roles.decode import DecodeRole
from services.roles.decoding import step_times
from services.roles.role import Role
from services.roles.unified import UnifiedRole
from services.scheduler.step_time import REFIT_EVERY, StepCosts, StepShape
from tests.unit.services.roles.test_overlap import FakeDevice, FakeLaunched, Served

COSTS = StepCosts(4e-3, 50e-6, 0.5e-6, 40e-6, 20e-9)
TURN_S = 10e-6


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class TimedLaunched(FakeLaunched):
    def __init__(self, launched: FakeLaunched, clock: Clock, done_s: float) -> None:
        super().__init__(launched.results, -1, launched.failed)
        self.clock, self.done_s = clock, done_s

    @property
    def is_done(self) -> bool:
        return self.clock.now_s >= self.done_s


class TimedDevice(FakeDevice):
    """Steps take what `COSTS` say. With `overlap` they run one after the other beside the host, else
    `launch` returns at their end."""

    def __init__(self, pages: int, clock: Clock, overlap: bool) -> None:
        super().__init__(pages)
        self.clock, self.overlap = clock, overlap
        self.free_s = 0.0
        self.steps: list[tuple[StepShape, float]] = []

    def launch(self, rows: list[Row]) -> Any:
        shape = shape_of(rows)
        step_s = COSTS.predict_s(shape)
        self.steps.append((shape, step_s))
        self.free_s = max(self.free_s, self.clock.now_s) + step_s
        launched = super().launch(rows)
        if not self.overlap:
            self.clock.now_s = self.free_s
        return TimedLaunched(launched, self.clock, self.free_s)


def shape_of(rows: list[Row]) -> StepShape:
    decodes = [row for row in rows if len(row.tokens) == 1 and row.start > 0]
    shape = StepShape(len(decodes), sum(row.start for row in decodes))
    for row in rows:
        if row not in decodes:
            shape = shape.plus_chunk(row.start, len(row.tokens))
    return shape


def timed(kind: type[Role], overlap: bool) -> tuple[Served, Clock]:
    served, clock = Served(kind, 1000, overlap, max_batch=8), Clock()
    served.context.clock = clock
    served.context.engine = served.device = TimedDevice(1000, clock, overlap)  # type: ignore[assignment]
    if kind is DecodeRole:
        served.role.receiver.device = served.device  # type: ignore[attr-defined]
    served.role.scheduler.batch.max_chunk_tokens = 512  # type: ignore[attr-defined]
    return served, clock


def run(served: Served, clock: Clock, most: int = 1 << 30) -> None:
    """Turns of the loop, each of a little time."""
    while most and served.step():
        clock.now_s += TURN_S
        most -= 1


def long_work(request_id: int, prompt: int, output: int) -> SequenceRequest:
    return SequenceRequest(request_id, [request_id] * prompt, Sampling(output, seed=1, ignore_eos=True))


def steps_of(served: Served) -> list[tuple[StepShape, float]]:
    device: Any = served.device
    return device.steps


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("kind", [UnifiedRole, DecodeRole])
def test_every_step_is_measured_and_the_costs_are_found(kind: type[Role], overlap: bool) -> None:
    served, clock = timed(kind, overlap)
    for request_id in range(1, 6):
        served.add(long_work(request_id, 100 * request_id, 10 * request_id))
        run(served, clock, 500)
    run(served, clock)
    served.check()
    model, steps = served.context.deadline.model, steps_of(served)
    assert model.observed == len(steps) > REFIT_EVERY
    assert model.measured_s == pytest.approx(sum(step_s for _, step_s in steps), rel=0.02)
    for shape, step_s in steps:
        if shape.prompt_tokens == 0:
            assert model.costs.predict_s(shape) == pytest.approx(step_s, rel=0.03)
    published = step_times(model)
    assert published["measured_steps"] == len(steps) and published["measured_steps_s"] == model.measured_s
    assert published["step_costs"]["base_s"] == model.costs.base_s


@pytest.mark.parametrize("overlap", [False, True])
def test_prompts_are_cut_so_that_who_decodes_does_not_wait(overlap: bool) -> None:
    """By what was learned of prompts among decodes before."""
    limit_s = 20e-3
    served, clock = timed(UnifiedRole, overlap)
    served.add(long_work(1, 50, 600))
    for request_id in range(2, 9):
        served.add(long_work(request_id, 97 * request_id, 1))
        run(served, clock, 12_000 if overlap else 12)
    warm = len(steps_of(served))
    assert warm > REFIT_EVERY
    assert max(step_s for shape, step_s in steps_of(served) if shape.decodes) > limit_s
    served.context.deadline.itl_limit_s = limit_s
    served.add(long_work(20, 2000, 2))
    served.add(long_work(21, 1000, 2))
    run(served, clock)
    served.check()
    mixed = [
        (shape, step_s) for shape, step_s in steps_of(served)[warm:] if shape.decodes and shape.prompt_tokens
    ]
    assert sum(shape.prompt_tokens for shape, _ in mixed) >= 2999  # one may look like a decode
    assert all(step_s <= limit_s or shape.prompt_tokens <= 64 for shape, step_s in mixed)
    assert max(step_s for _, step_s in mixed[:-3]) > 0.5 * limit_s, "and are no smaller than they must be"


def test_steps_that_ended_unseen_one_after_the_other_are_not_measured() -> None:
    served, clock = timed(UnifiedRole, overlap=True)
    served.add(long_work(1, 10, 60))
    role: Any = served.role
    run(served, clock, 5000)
    while role._step_before is None:
        run(served, clock, 1)
    in_flight_s = [step_s for _, step_s in steps_of(served)[-2:]]
    clock.now_s += 0.5  # the loop was busy with something else
    run(served, clock)
    served.check()
    model, steps = served.context.deadline.model, steps_of(served)
    assert model.observed == len(steps) - 2
    expected_s = sum(step_s for _, step_s in steps) - sum(in_flight_s)
    assert model.measured_s == pytest.approx(expected_s, rel=0.02)


def test_a_step_that_fails_is_not_measured() -> None:
    served, clock = timed(UnifiedRole, overlap=False)
    served.device.fails = {3}
    served.add(long_work(1, 10, 20))
    run(served, clock)
    assert served.failed == {1}
    assert served.context.deadline.model.observed == 2
