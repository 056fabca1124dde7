"""From arrivals to figures: what counts as what, percentiles beside numpy's, limits, failures."""

import numpy as np
import pytest

from deploy.bench.serving.statistics import SloLimits, figures_of, is_good, spread
from tests.unit.deploy.bench.load.outcomes import load_of, outcome

NONE = SloLimits()


def test_one_request_by_hand() -> None:
    one = outcome(100.0, [(0.2, 1), (0.3, 1), (0.35, 2)])
    assert one.failure is None
    assert one.first_token_s == pytest.approx(0.2)
    assert one.second_token_s == pytest.approx(0.3)
    assert one.gaps_s == pytest.approx([0.1, 0.05]), "tokens that came together are one gap"
    assert one.per_token_s == pytest.approx(0.15 / 3)
    assert one.whole_s == pytest.approx(0.36)
    assert one.lag_s == pytest.approx(0.001)
    assert one.tokens_between(100.25, 100.35) == pytest.approx(1)
    assert one.tokens_between(100.0, 101.0) == pytest.approx(4)


def test_the_servers_count_of_tokens_wins() -> None:
    one = outcome(0.0, [(0.2, 1), (0.4, 1)], output_tokens=5, usage=5)
    assert one.failure is None
    assert one.tokens == 5
    assert one.per_token_s == pytest.approx(0.2 / 4)
    assert one.tokens_between(0.3, 1.0) == pytest.approx(2.5), "each chunk has its share"


def test_two_tokens_at_once_and_one_only() -> None:
    assert outcome(0.0, [(0.2, 2), (0.3, 2)]).second_token_s == pytest.approx(0.2)
    alone = outcome(0.0, [(0.2, 1)], output_tokens=1)
    assert alone.failure is None
    assert alone.second_token_s is None
    assert alone.per_token_s is None
    assert alone.gaps_s == []


def test_an_answer_without_all_its_tokens_is_a_failure() -> None:
    assert outcome(0.0, [(0.1, 3)]).failure == "too few tokens"
    assert outcome(0.0, [(0.1, 4)], usage=3).failure == "too few tokens"
    assert outcome(0.0, []).failure == "no text"
    late = outcome(0.0, [(0.1, 4)])
    late.end(9.0, "timeout")
    assert late.failure is None, "only the first end counts"
    assert late.ended_s < 1


def test_percentiles_are_numpys() -> None:
    random = np.random.default_rng(1)
    for count in (1, 2, 7, 1000):
        values = random.lognormal(3, 1, count).tolist()
        found = spread(values)
        assert found is not None
        wanted = np.percentile(values, [50, 90, 99])
        assert [found.p50, found.p90, found.p99] == pytest.approx(wanted.tolist())
        assert (found.count, found.mean, found.max) == (count, pytest.approx(np.mean(values)), max(values))
    assert spread([]) is None


def test_figures_of_a_rate_leave_out_what_warms_up_and_what_failed() -> None:
    outcomes = [
        outcome(0.0, [(5.0, 1), (7.5, 3)], measured=False),
        outcome(2.0, [(0.1, 1), (0.2, 3)]),
        outcome(4.0, [(0.3, 1), (0.4, 3)]),
        outcome(6.0, [], failure="http 429 overloaded"),
        outcome(8.0, [(1.0, 1), (9.0, 3)]),
        outcome(9.0, [(0.1, 2)], failure="timeout"),
    ]
    found = figures_of(outcomes, load_of(outcomes, 10.0), 0.4, SloLimits(ttft_ms=500.0), 2, 0.25)
    assert (found.rate, found.offered_rate, found.requests, found.completed) == (0.4, 0.5, 5, 3)
    assert found.failures == {"http 429 overloaded": 1, "timeout": 1}
    assert found.ttft_ms is not None
    assert found.ttft_ms.count == 3
    assert found.ttft_ms.max == pytest.approx(1000)
    assert found.itl_ms is not None
    assert found.itl_ms.p50 == pytest.approx(100)
    assert (found.good, found.goodput, found.goodput_per_gpu) == (2, pytest.approx(0.2), pytest.approx(0.1))
    # From 2 s to 12 s: two whole answers, a first token at 9 s, two tokens of the one that failed, and
    # what the request that warmed up still got.
    assert found.output_tokens_per_s == pytest.approx((4 + 4 + 1 + 2 + 4) / 10)
    assert found.tokens_per_chunk == 1
    assert found.chunks_per_arrival == 2
    assert found.client.cpu_share == 0.25
    own = figures_of(outcomes, load_of(outcomes, 10.0), None, NONE, 1, 0.0)
    assert own.rate == 0.5
    assert own.good == 3, "without limits, whatever was completed"


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        (SloLimits(ttft_ms=201), True),
        (SloLimits(ttft_ms=199), False),
        (SloLimits(tpot_ms=51), True),
        (SloLimits(tpot_ms=49), False),
        (SloLimits(itl_ms=101), True),
        (SloLimits(itl_ms=98), False),
        (SloLimits(ttft_ms=201, tpot_ms=51, itl_ms=98), False),
    ],
)
def test_limits(limits: SloLimits, good: bool) -> None:
    one = outcome(0.0, [(0.2, 1), (0.3, 1), (0.35, 2)])
    assert is_good(one, limits) is good
    one.failure = "timeout"
    assert not is_good(one, limits)


def test_the_gap_limit_is_for_99_of_100_gaps() -> None:
    def stream(long_gaps: int) -> list[tuple[float, int]]:
        gaps_s = [0.01] * (400 - long_gaps) + [1.0] * long_gaps
        return [(0.1 + at_s, 1) for at_s in np.cumsum([0.0, *gaps_s])]

    assert is_good(outcome(0.0, stream(3)), SloLimits(itl_ms=20))
    assert not is_good(outcome(0.0, stream(6)), SloLimits(itl_ms=20))


def test_limits_in_words() -> None:
    assert SloLimits(ttft_ms=200, itl_ms=30).text() == "TTFT <= 200 ms, ITL <= 30 ms"
    assert not NONE.given
