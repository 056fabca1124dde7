"""Back-off, giving up, and the order of stopping, as plain arithmetic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.launcher.supervision import (
    CONFIGURATION_ERROR,
    ChildKind,
    GiveUp,
    Restart,
    RestartPolicy,
    drain_of,
    shutdown_stages,
)


def delays(policy: RestartPolicy, lives: int, lived_s: float, jitter: float) -> list[float]:
    decisions = [policy.on_exit(1, lived_s, jitter) for _ in range(lives)]
    assert all(isinstance(decision, Restart) for decision in decisions)
    return [decision.delay_s for decision in decisions if isinstance(decision, Restart)]


def seasoned() -> RestartPolicy:
    """A child that has lasted once."""
    policy = RestartPolicy()
    policy.on_exit(1, policy.healthy_s, 0.0)
    policy.failures = 0
    return policy


def test_delays_double_up_to_the_cap() -> None:
    assert delays(seasoned(), 9, 1.0, 1.0) == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 200))
def test_jitter_takes_away_at_most_half(jitter: float, lives: int) -> None:
    full = delays(seasoned(), lives, 1.0, 1.0)
    jittered = delays(seasoned(), lives, 1.0, jitter)
    for with_jitter, without in zip(jittered, full, strict=True):
        assert without / 2 <= with_jitter <= without


def test_a_long_life_starts_anew() -> None:
    policy = seasoned()
    assert delays(policy, 4, 1.0, 1.0)[-1] == 4.0
    assert delays(policy, 1, policy.healthy_s, 1.0) == [0.5]


def test_a_refused_configuration_ends_it_in_the_first_life_only() -> None:
    assert isinstance(RestartPolicy().on_exit(CONFIGURATION_ERROR, 0.1, 0.0), GiveUp)
    later = RestartPolicy()
    assert isinstance(later.on_exit(1, 0.1, 0.0), Restart)
    assert isinstance(later.on_exit(CONFIGURATION_ERROR, 0.1, 0.0), Restart)


def test_gives_up_on_a_child_that_never_lasts() -> None:
    policy = RestartPolicy()
    assert len(delays(policy, policy.first_attempts - 1, 1.0, 0.5)) == 4
    decision = policy.on_exit(-9, 1.0, 0.5)
    assert isinstance(decision, GiveUp)
    assert "5 times in a row" in decision.reason


@pytest.mark.parametrize("drain_timeout_s", [0.0, 1.0, 30.0, 600.0])
def test_router_then_workers_then_transfers_within_the_timeout(drain_timeout_s: float) -> None:
    stages = shutdown_stages(drain_timeout_s)
    assert [stage.kind for stage in stages] == [ChildKind.ROUTER, ChildKind.WORKER, ChildKind.TRANSFER]
    assert sum(stage.grace_s for stage in stages) <= drain_timeout_s + 6.0
    for stage in stages:
        assert stage.grace_s >= 2.0
        assert drain_of(stage.kind, drain_timeout_s) < stage.grace_s
        assert drain_of(stage.kind, drain_timeout_s) <= drain_timeout_s
