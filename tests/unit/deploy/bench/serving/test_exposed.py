"""How long KV was waited for, from two looks at a router's histogram; other servers say nothing."""

import pytest

from deploy.bench.load.target import target_of
from deploy.bench.serving.exposed import Buckets, Exposed, exposed_buckets, exposed_ms
from router.routing.metrics import Histogram, Metrics, Snapshot, exposition
from tests.unit.deploy.bench.serving.test_busy import answering

INF = float("inf")


def test_only_what_came_between_the_two_looks_counts() -> None:
    before = Buckets([0.001, 0.002, INF], [10.0, 10.0, 10.0])
    after = Buckets([0.001, 0.002, INF], [10.0, 30.0, 30.0])
    assert exposed_ms(before, after) == Exposed(20, pytest.approx(1.5), pytest.approx(1.99))
    assert exposed_ms(after, after) is None and exposed_ms(before, None) is None
    assert exposed_ms(None, before) == Exposed(10, pytest.approx(0.5), pytest.approx(0.99))
    restarted = Buckets([0.001, 0.002, INF], [4.0, 4.0, 4.0])
    assert exposed_ms(before, restarted) == Exposed(4, pytest.approx(0.5), pytest.approx(0.99))


def test_quantiles_lie_where_the_values_do() -> None:
    histogram = Histogram("baton_x_seconds", "X", [0.001 * one for one in range(1, 101)])
    values = [0.0005 + 0.001 * one for one in range(100)]
    for value in values:
        histogram.observe(value)
    counts = [float(sum(histogram.counts[: one + 1])) for one in range(101)]
    buckets = Buckets([*histogram.bounds, INF], counts)
    assert buckets.quantile_s(0.5) == pytest.approx(0.05, abs=0.001)
    assert buckets.quantile_s(0.99) == pytest.approx(0.099, abs=0.001)
    histogram.observe(9.0)
    counts = [float(sum(histogram.counts[: one + 1])) for one in range(101)]
    assert Buckets([*histogram.bounds, INF], counts).quantile_s(1.0) == pytest.approx(0.1)


def test_buckets_are_read_from_a_routers_metrics() -> None:
    metrics = Metrics()
    for value in (0.0004, 0.0031, 0.0032):
        metrics.exposed.observe(value)
    body = exposition(metrics, Snapshot(0, 0, [], [], 0.0))
    with answering(body, path="/metrics") as url:
        found = exposed_ms(None, exposed_buckets(target_of(url, "key")))
        assert found is not None and found.count == 3 and 3.0 <= found.p50 <= 3.5
        assert exposed_buckets(target_of(url, None)) is None, "refused"


@pytest.mark.parametrize("body", [b"", b"\xff", b"# nothing\n", b"other_total 3\n"])
def test_another_server_tells_nothing(body: bytes) -> None:
    with answering(body, path="/metrics") as url:
        assert exposed_buckets(target_of(url, "key")) is None
