"""Who is refused, and when: the prediction against queues that are computed by hand or simulated."""

import random

import pytest
from msgspec.structs import replace

from router.errors import ApiError
from router.routing.admission import Admission, Pace
from router.routing.policy import Candidate, Placement
from tests.unit.router.routing.test_policy import worker


def feed(pace: Pace, lengths: list[int], a_s: float, b_s: float, noise: random.Random | None = None) -> None:
    """A worker that takes `a + b * tokens` seconds for each prompt, one after the other, all there at 0."""
    now_s = 0.0
    for tokens in lengths:
        cost_s = a_s + b_s * tokens
        now_s += cost_s * (1 if noise is None else noise.uniform(0.8, 1.2))
        pace.observe(tokens, 0.0, now_s)


def test_nothing_is_predicted_of_a_worker_that_has_done_nothing() -> None:
    assert Pace().seconds_for(3, 1000) is None


def test_a_step_and_its_tokens_are_told_apart() -> None:
    pace = Pace()
    feed(pace, [10, 500, 2000, 30, 900] * 4, a_s=0.02, b_s=1e-4)
    assert pace.seconds_for(1, 10) == pytest.approx(0.021)
    assert pace.seconds_for(1, 8000) == pytest.approx(0.82)
    assert pace.seconds_for(7, 3000) == pytest.approx(0.44)


def test_noise_is_evened_out() -> None:
    pace, noise = Pace(), random.Random(4)
    feed(pace, [noise.randint(10, 4000) for _ in range(200)], 0.02, 1e-4, noise)
    assert pace.seconds_for(4, 8000) == pytest.approx(0.88, rel=0.25)


def test_prompts_of_one_length_say_nothing_of_longer_ones() -> None:
    pace = Pace()
    feed(pace, [100] * 20, a_s=0.03, b_s=0.0)
    assert pace.seconds_for(10, 1000) == pytest.approx(0.3)
    assert pace.seconds_for(1, 100_000) == pytest.approx(0.03)


def test_waiting_for_work_is_no_cost() -> None:
    pace = Pace()
    for start_s in (0.0, 100.0, 500.0):
        pace.observe(1000, start_s, start_s + 0.1)
    assert pace.seconds_for(1, 1000) == pytest.approx(0.1)


def test_the_latest_counts_most() -> None:
    pace = Pace()
    feed(pace, [1000] * 50, a_s=1.0, b_s=0.0)
    for number in range(100):
        pace.observe(1000, 100.0 + number, 100.1 + number)
    assert pace.seconds_for(1, 1000) == pytest.approx(0.1, abs=0.02)


def pair(prefill: int = 0, decode: int = 0) -> Placement:
    """Prompt tokens that wait on the one, and that live on the other; a pool of 1600 tokens."""
    first: Candidate = replace(worker("p", "prefill"), queued_tokens=prefill)
    return Placement(first, replace(worker("d", "decode"), live_tokens=decode))


def warmed(ttft_slo_s: float | None = None, max_kv_load: float | None = None) -> Admission:
    """A prefill worker that takes a millisecond a token."""
    admission = Admission(ttft_slo_s, max_kv_load, retry_after_s=2)
    now_s = 0.0
    for tokens in (100, 300, 700, 200) * 5:
        now_s += tokens * 1e-3
        admission.observe("p", tokens, 0.0, now_s)
    return admission


def test_who_would_wait_too_long_is_refused_and_told_when_to_come_again() -> None:
    admission = warmed(ttft_slo_s=1.0)
    admission.check(pair(prefill=800), [100], queued_prompts=2)
    with pytest.raises(ApiError, match=r"the first token would take about 8\.1 s, over 1 s") as caught:
        admission.check(pair(prefill=8000), [100], queued_prompts=2)
    assert (caught.value.status, caught.value.code) == (429, "overloaded")
    assert caught.value.retry_after_s == 8
    with pytest.raises(ApiError) as caught:
        admission.check(pair(prefill=900), [200, 200], queued_prompts=1)
    assert caught.value.retry_after_s == 2
    with pytest.raises(ApiError) as caught:
        admission.check(pair(prefill=10**6), [1], queued_prompts=1)
    assert caught.value.retry_after_s == 60


def test_an_idle_or_unknown_worker_takes_anything() -> None:
    admission = warmed(ttft_slo_s=1.0)
    admission.check(pair(), [50_000], queued_prompts=0)
    admission.forget("p")
    admission.check(pair(prefill=50_000), [100], queued_prompts=5)


def test_a_unified_worker_is_judged_by_its_own_queue() -> None:
    admission = warmed(ttft_slo_s=1.0)
    alone = Placement(None, replace(worker("p", "unified"), queued_tokens=5000))
    with pytest.raises(ApiError):
        admission.check(alone, [1], queued_prompts=1)


def test_prompts_are_refused_by_the_pages_they_would_need() -> None:
    admission = warmed(max_kv_load=2.0)
    admission.check(pair(prefill=10**6, decode=3100), [100], queued_prompts=50)
    with pytest.raises(ApiError, match=r"would fill the KV cache 2\.1 times, over 2") as caught:
        admission.check(pair(decode=3100), [100, 101], queued_prompts=0)
    assert caught.value.retry_after_s == 2
    admission.check(pair(decode=0), [10_000], queued_prompts=0)
