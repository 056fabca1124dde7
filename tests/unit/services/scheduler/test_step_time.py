"""The model of a step's time against steps whose true costs are known."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.step_time import ANY_NUMBER, StepCosts, StepShape, StepTimeModel, unknown_costs

TRUE = StepCosts(3.95e-3, 10.3e-6, 35.1e-9, 22e-6, 0.54e-9, 68)
WRONG = StepCosts(8e-3, 1e-6, 1e-9, 80e-6, 2e-9, 68)
"""Twice too slow here, ten times too fast there: what a warm-up on another clock might have said."""


def a_shape(rng: random.Random) -> StepShape:
    decodes = rng.choice([0, 1, 4, 16, 64, 128])
    prompt = rng.choice([0, 0, 64, 256, 512, 2048])
    return StepShape(
        decodes, decodes * rng.randint(100, 4000), prompt, rng.uniform(0.5, 8000) if prompt else 0
    )


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_costs_are_found_from_steps(noise: float) -> None:
    rng, model = random.Random(7), StepTimeModel(WRONG)
    for _ in range(600):
        shape = a_shape(rng)
        model.observe(shape, TRUE.predict_s(shape) * (1 + rng.uniform(-noise, noise)))
    for _ in range(200):
        shape = a_shape(rng)
        assert model.costs.predict_s(shape) == pytest.approx(TRUE.predict_s(shape), rel=0.02 + noise)


def test_a_host_that_stands_still_now_and_then_changes_little() -> None:
    rng, model = random.Random(3), StepTimeModel(TRUE)
    for number in range(1000):
        shape = a_shape(rng)
        model.observe(shape, TRUE.predict_s(shape) + (0.2 if number % 17 == 0 else 0.0))
    shape = StepShape(32, 32 * 1000, 512, 1000.0)
    assert model.costs.predict_s(shape) == pytest.approx(TRUE.predict_s(shape), rel=0.05)


def test_an_hour_of_small_steps_is_not_all_that_is_known() -> None:
    rng, model = random.Random(5), StepTimeModel(WRONG)
    for _ in range(400):
        shape = a_shape(rng)
        model.observe(shape, TRUE.predict_s(shape))
    for _ in range(5000):
        model.observe(StepShape(1, 700), TRUE.predict_s(StepShape(1, 700)))
    large = StepShape(128, 128 * 2000, 2048, 3000.0)
    assert model.costs.predict_s(large) == pytest.approx(TRUE.predict_s(large), rel=0.05)


def test_what_no_step_has_shown_keeps_its_value() -> None:
    model = StepTimeModel(TRUE)
    for decodes in range(1, 200):
        shape = StepShape(decodes, 0)
        model.observe(shape, 2 * TRUE.predict_s(shape))
    assert model.costs.per_prompt_token_s == TRUE.per_prompt_token_s
    assert model.costs.per_decode_s == pytest.approx(2 * TRUE.per_decode_s, rel=1e-3)


@settings(deadline=None)
@given(
    target_ms=st.floats(0.1, 200),
    decodes=st.integers(0, 256),
    context=st.integers(0, 8000),
    prompt_context=st.floats(0, 32000),
)
def test_a_steps_prompt_tokens_end_within_its_target(
    target_ms: float, decodes: int, context: int, prompt_context: float
) -> None:
    target_s, cached = target_ms / 1e3, decodes * context
    tokens = TRUE.prompt_tokens_within(target_s, decodes, cached, prompt_context)
    step = StepShape(decodes, cached, tokens, prompt_context)
    alone_s = TRUE.predict_s(StepShape(decodes, cached))
    if tokens:
        assert TRUE.predict_s(step) <= target_s * (1 + 1e-9)
    if alone_s <= target_s:
        more = step._replace(prompt_tokens=tokens + 1)
        assert TRUE.predict_s(more) >= target_s * (1 - 1e-9)
    else:
        assert tokens == 0


def test_predicted_and_measured_are_added_up() -> None:
    model = StepTimeModel(TRUE)
    shape = StepShape(4, 4000)
    model.observe(shape, 2 * TRUE.predict_s(shape))
    assert model.measured_s == pytest.approx(2 * model.predicted_s)
    assert model.absolute_error_s == pytest.approx(model.predicted_s)
    assert model.observed == 1


def test_prompts_that_come_late_and_rarely_are_learned_by_a_model_that_knew_nothing() -> None:
    """For it each of them takes much longer than it would have thought, and none is an outlier for that."""
    rng, model = random.Random(9), StepTimeModel(unknown_costs(68))
    for number in range(4000):
        decodes = rng.randint(1, 200)
        late = number > 1000 and number % 50 == 0
        shape = StepShape(
            decodes, decodes * rng.randint(100, 4000), rng.choice([256, 1024, 2048]) * late, 900.0 * late
        )
        model.observe(shape, TRUE.predict_s(shape) * rng.uniform(0.97, 1.03))
    for prompt in (256, 600, 2048):
        shape = StepShape(32, 32_000, prompt, 900.0)
        assert model.costs.predict_s(shape) == pytest.approx(TRUE.predict_s(shape), rel=0.08)


@pytest.mark.parametrize("token_s", [0.0, 5e-324, 1e-300])
def test_tokens_that_take_next_to_nothing_all_fit(token_s: float) -> None:
    for costs in (StepCosts(0, 0, 0, token_s, 0, 64), StepCosts(0, 0, 0, 0, token_s), unknown_costs(64)):
        for target_s in (0.0, 0.02):
            fits = costs.prompt_tokens_within(target_s, 3, 1000, 500.0)
            assert fits == ANY_NUMBER or (target_s == 0.0 and token_s > 0)
