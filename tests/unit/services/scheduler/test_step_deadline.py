"""The deadline of a step: what it lets in, that prompts go on all the same, and that it is off at 0."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.protocol.messages import FirstToken
from services.scheduler.batch import RunningBatch
from services.scheduler.pages import PagePool
from services.scheduler.sequence import StepPlan, choice_sequence, prompt_sequence
from services.scheduler.step_deadline import (
    GPU_FREE_PROMPT_TOKENS,
    LEAST_PROMPT_TOKENS,
    StepDeadline,
    step_deadline,
)
from services.scheduler.step_time import REFIT_EVERY, StepCosts, StepShape, StepTimeModel, unknown_costs
from services.scheduler.unified import UnifiedScheduler
from tests.unit.services.scheduler.harness import work

COSTS = StepCosts(3.95e-3, 10.3e-6, 35.1e-9, 22e-6, 0.54e-9, 64)
PAGE = 16


def running(
    decodes: list[int], prompts: list[tuple[int, int]], most: int, deadline: StepDeadline | None
) -> RunningBatch:
    """A batch in which choices decode whose contexts are so long, and prompts have (computed, pending)."""
    batch = RunningBatch(PagePool(20_000, PAGE), 512, most, deadline=deadline)
    for request_id, context in enumerate(decodes, 1):
        sequence = choice_sequence(work(request_id, [1] * context, 10_000), FirstToken(0, 1))
        batch.number(sequence)
        assert batch.admit(sequence)
        batch.computing.remove(sequence)
        batch.decoding.append(sequence)
        sequence.computed_tokens = context
    for request_id, (computed, pending) in enumerate(prompts, 1000):
        sequence = prompt_sequence(work(request_id, [request_id] * (computed + pending)))
        batch.number(sequence)
        assert batch.admit(sequence)
        sequence.computed_tokens = computed
    return batch


def known(plan: StepPlan) -> list[tuple[int, int, int]]:
    decodes = [(one.work.request_id, one.computed_tokens, 1) for one in plan.decodes]
    return decodes + [(one.sequence.work.request_id, one.start, one.count) for one in plan.chunks]


batches = {
    "decodes": st.lists(st.integers(1, 3000), max_size=40),
    "prompts": st.lists(st.tuples(st.integers(0, 6000), st.integers(1, 5000)), max_size=6),
    "most": st.sampled_from([16, 64, 512, 2048, 8192]),
}
costs = st.builds(
    StepCosts,
    st.floats(0, 20e-3),
    st.floats(0, 100e-6),
    st.floats(0, 1e-6),
    st.floats(0, 100e-6),
    st.floats(0, 10e-9),
    st.integers(0, 300),
)


@settings(max_examples=300, deadline=None)
@given(**batches, costs=costs, limit_ms=st.floats(0.01, 200))
def test_a_step_ends_in_time(
    decodes: list[int], prompts: list[tuple[int, int]], most: int, costs: StepCosts, limit_ms: float
) -> None:
    """But for the tokens that a prompt gets at any rate."""
    deadline = StepDeadline(limit_ms / 1e3, StepTimeModel(costs))
    batch = running(decodes, prompts, most, deadline)
    plan = batch.plan_step()
    assert len(plan.decodes) == len(decodes), "decodes are never left out"
    assert plan.tokens == len(decodes) + sum(one.count for one in plan.chunks) <= max(most, len(decodes))
    assert all(one.count > 0 for one in plan.chunks)
    shape = plan.shape()
    if not decodes:
        assert known(plan) == known(running(decodes, prompts, most, None).plan_step())
    elif shape.prompt_tokens > LEAST_PROMPT_TOKENS:
        assert costs.predict_s(shape) <= deadline.target_s * (1 + 1e-9)
    if prompts and len(decodes) < most:
        first = min(LEAST_PROMPT_TOKENS, prompts[0][1], most - len(decodes))
        assert shape.prompt_tokens >= first, "the oldest prompt goes on"


@settings(max_examples=100, deadline=None)
@given(**batches, costs=costs)
def test_without_a_limit_plans_are_those_without_a_deadline(
    decodes: list[int], prompts: list[tuple[int, int]], most: int, costs: StepCosts
) -> None:
    off = running(decodes, prompts, most, StepDeadline(0.0, StepTimeModel(costs)))
    assert known(off.plan_step()) == known(running(decodes, prompts, most, None).plan_step())


def test_a_step_is_filled() -> None:
    """What is left of the time does not do for another tenth of the prompt."""
    deadline = StepDeadline(25e-3, StepTimeModel(COSTS))
    plan = running([1000] * 32, [(2000, 5000)], 2048, deadline).plan_step()
    shape = plan.shape()
    assert LEAST_PROMPT_TOKENS < shape.prompt_tokens < 2048
    more = shape.plus_chunk(2000 + shape.prompt_tokens, shape.prompt_tokens // 10)
    assert COSTS.predict_s(shape) <= deadline.target_s < COSTS.predict_s(more)


def test_longer_contexts_get_smaller_chunks() -> None:
    deadline = StepDeadline(25e-3, StepTimeModel(COSTS))
    steps = [running([1000] * 32, [(start, 5000)], 2048, deadline).plan_step() for start in (0, 8000, 30_000)]
    counts = [step.chunks[0].count for step in steps]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == 3


def test_short_prompts_share_a_step_until_its_time_is_full() -> None:
    deadline = StepDeadline(25e-3, StepTimeModel(COSTS))
    plan = running([1000] * 8, [(0, 200)] * 20, 2048, deadline).plan_step()
    assert 1 < len(plan.chunks) < 11
    assert COSTS.predict_s(plan.shape()) <= deadline.target_s


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), costs)
def test_every_prompt_ends_within_a_bounded_number_of_steps(seed: int, costs: StepCosts) -> None:
    """Whatever steps cost: a step gives the oldest prompt 64 tokens, or all that it has left."""
    random = Random(seed)
    deadline = StepDeadline(random.choice([1e-3, 25e-3]), StepTimeModel(costs))
    pool = PagePool(4000, PAGE)
    scheduler = UnifiedScheduler(pool, 64, 256, deadline=deadline)
    prompts = [random.randint(1, 1500) for _ in range(random.randint(1, 8))]
    for request_id, tokens in enumerate([20, *prompts], 1):
        scheduler.add(work(request_id, [request_id] * tokens, 5000))
    most = sum(-(-tokens // LEAST_PROMPT_TOKENS) for tokens in prompts) + 1
    begun: set[int] = set()
    for _ in range(most):
        plan = scheduler.schedule()
        assert set(plan.decodes) == set(scheduler.batch.decoding), "decodes are never left out"
        scheduler.launched(plan)
        for sequence in plan.decodes:
            sequence.settle(1)
        for chunk in plan.chunks:
            if chunk.samples:
                begun.add(chunk.sequence.work.request_id)
                scheduler.fork(chunk.sequence, [FirstToken(0, 1)])
    assert len(begun) == len(prompts) + 1


def test_there_is_no_deadline_before_the_first_fit() -> None:
    deadline = step_deadline(25.0, "cuda")
    assert deadline.itl_limit_s == 0.025 and deadline.model.costs == unknown_costs(GPU_FREE_PROMPT_TOKENS)

    def prompt_tokens() -> int:
        return running([1000] * 32, [(0, 5000)], 2048, deadline).plan_step().shape().prompt_tokens

    random = Random(1)
    shapes = [StepShape(random.randint(1, 64), random.randint(1000, 90_000)) for _ in range(REFIT_EVERY - 8)]
    shapes += [
        StepShape(4, 4000, count, 1000.0 * number) for number, count in enumerate((128, 512, 1024, 2016) * 2)
    ]
    for number, shape in enumerate(shapes, 1):
        assert prompt_tokens() == 2048 - 32
        deadline.model.observe(shape, COSTS.predict_s(shape))
        assert (prompt_tokens() == 2048 - 32) == (number < REFIT_EVERY)
    assert deadline.model.costs.predict_s(StepShape(32, 32_000, 600, 300.0)) == pytest.approx(
        COSTS.predict_s(StepShape(32, 32_000, 600, 300.0)), rel=0.02
    )


def test_sequences_are_counted_in_a_plans_shape() -> None:
    plan = running([10, 20], [(100, 50), (0, 30)], 512, None).plan_step()
    assert plan.shape() == StepShape(2, 30, 80, pytest.approx((50 * 125 + 30 * 15) / 80))
