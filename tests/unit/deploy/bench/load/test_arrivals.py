"""When requests arrive: the mean rate, the shape of the gaps, the seed."""

import numpy as np
import pytest

from deploy.bench.load.arrivals import Kind, arrival_times, stretched

MANY = 40_000


@pytest.mark.parametrize(
    ("kind", "burstiness", "variance"),
    [("poisson", 0.25, 1.0), ("gamma", 1.0, 1.0), ("gamma", 0.25, 4.0), ("gamma", 10.0, 0.1)],
)
def test_gaps_have_the_variance_that_burstiness_says(kind: Kind, burstiness: float, variance: float) -> None:
    gaps_s = np.diff(arrival_times(kind, 8.0, MANY, burstiness, seed=3))
    assert gaps_s.min() >= 0
    assert gaps_s.mean() == pytest.approx(1 / 8, rel=1e-9)
    assert gaps_s.var() * 64 == pytest.approx(variance, rel=0.1)


def test_poisson_counts_have_their_mean_as_variance() -> None:
    times_s = arrival_times("poisson", 5.0, MANY, 1.0, seed=4)
    counts = np.histogram(times_s, bins=np.arange(0.0, times_s[-1] - 2.0, 2.0))[0]
    assert counts.mean() == pytest.approx(10, rel=0.02)
    assert counts.var() == pytest.approx(10, rel=0.1)


def test_bursty_counts_vary_more_than_their_mean() -> None:
    times_s = arrival_times("gamma", 5.0, MANY, 0.1, seed=4)
    counts = np.histogram(times_s, bins=np.arange(0.0, times_s[-1] - 2.0, 2.0))[0]
    assert counts.var() > 3 * counts.mean()


def test_the_seed_decides_and_the_rate_only_stretches() -> None:
    one = arrival_times("gamma", 2.0, 100, 0.5, seed=1)
    assert one[0] == 0
    assert np.array_equal(one, arrival_times("gamma", 2.0, 100, 0.5, seed=1))
    assert not np.allclose(one, arrival_times("gamma", 2.0, 100, 0.5, seed=2))
    assert np.allclose(one, 4 * arrival_times("gamma", 8.0, 100, 0.5, seed=1))


def test_one_arrival() -> None:
    assert arrival_times("poisson", 2.0, 1, 1.0, seed=0).tolist() == [0.0]


def test_recorded_times_are_stretched_as_a_whole() -> None:
    recorded_s = np.array([100.0, 100.0, 103.0, 106.0])
    assert stretched(recorded_s, 4.0).tolist() == pytest.approx([0.0, 0.0, 0.375, 0.75])
    for alike in ([5.0], [5.0, 5.0]):
        with pytest.raises(ValueError, match="arrive at the same time"):
            stretched(np.array(alike), 4.0)
