"""How tests wait, which no test of a feature would show."""

import pytest

from tests import patience


@pytest.mark.parametrize(
    ("busy", "cores", "factor"),
    [(0.1, 2, 1.0), (4, 2, 1.0), (10, 2, 4.0), (10, 8, 1.0), (1000, 2, patience.MOST)],
)
def test_deadlines_stretch_with_the_machine(busy: float, cores: int, factor: float) -> None:
    assert patience.factor_of(busy, cores) == factor


def test_deadlines_stretch_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for named, factor in (("3", 3.0), ("0.1", 1.0), ("30", 30.0)):
        monkeypatch.setenv(patience.VARIABLE, named)
        assert patience.factor.__wrapped__() == factor
    assert patience.running() >= 1


@pytest.fixture
def limit(request: pytest.FixtureRequest) -> float:
    marker = request.node.get_closest_marker("timeout")
    assert marker is not None
    return float(marker.args[0])


@pytest.mark.timeout(77)
def test_own_limits_stretch_too(limit: float) -> None:
    assert limit == 77 * patience.factor()


def test_the_common_limit_stretches_too(limit: float) -> None:
    assert limit == 180 * patience.factor()
