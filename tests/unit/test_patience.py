"""How tests wait, which no test of a feature would show."""

import ast
from pathlib import Path

import pytest

from tests import patience


@pytest.mark.parametrize(
    ("busy", "beside", "cores", "factor"),
    [(0.1, 1, 2, 1.0), (4, 2, 2, 1.0), (4, 3, 2, 1.5), (10, 3, 2, 4.0), (10, 9, 8, 1.125), (99, 2, 2, 10.0)],
)
def test_deadlines_stretch_with_the_machine(busy: float, beside: int, cores: int, factor: float) -> None:
    assert patience.factor_of(busy, beside, cores) == factor


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


WAITS = frozenset(
    {"wait", "join", "result", "settimeout", "communicate", "asyncio.wait_for", "asyncio.timeout"}
)
POLL_S = 0.5
"""What is waited for between two looks is no deadline."""


def test_no_test_has_a_deadline_of_its_own() -> None:
    tests = Path(__file__).parents[1]
    found = [
        f"{path.relative_to(tests)}:{call.lineno}"
        for path in sorted(tests.rglob("*.py"))
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and any(map(is_long, limits_of(call)))
    ]
    assert not found, "waits that no patience stretches"


def limits_of(call: ast.Call) -> list[ast.expr]:
    """What a call takes for a time limit: `timeout=`, and what a waiting method is given last."""
    limits = [keyword.value for keyword in call.keywords if keyword.arg == "timeout"]
    called = ast.unparse(call.func)
    return limits + (call.args[-1:] if {called, called.rpartition(".")[2]} & WAITS else [])


def is_long(limit: ast.expr) -> bool:
    return (
        isinstance(limit, ast.Constant)
        and isinstance(limit.value, int | float)
        and not isinstance(limit.value, bool)
        and limit.value > POLL_S
    )
