"""The ledger's arithmetic, its three refusals, and that every change it proposes really fits."""

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.memory.change import smallest_changes
from services.memory.inputs import Change, PlanInput, Shortfall, shortfall
from services.memory.plan import DoesNotFit, Measured, plan_memory

MIB, GIB = 1 << 20, 1 << 30

FITS = PlanInput(
    device="cpu",
    device_bytes=2 * GIB,
    mem_fraction=0.5,
    weights_bytes=100 * MIB,
    page_bytes=160 * 1024,
    page_size_tokens=16,
    max_model_len=2048,
    max_chunk_tokens=512,
    max_batch=64,
    activation_bytes=40 * MIB,
    worker_context_bytes=300 * MIB,
    graphs_bytes=0,
    staging_slots=16,
    staging_slot_bytes=MIB,
    transfer_context_bytes=60 * MIB,
)


def test_pool_is_the_budget_minus_weights_in_whole_pages() -> None:
    plan = plan_memory(FITS)
    assert plan.pages == (1 * GIB - 100 * MIB) // (160 * 1024)
    assert plan.pool_tokens == plan.pages * 16
    assert plan.inputs.weights_bytes + plan.pool_bytes <= 1 * GIB
    assert 1 * GIB - plan.inputs.weights_bytes - plan.pool_bytes < 160 * 1024
    assert plan.worker_cap_bytes == 100 * MIB + plan.pool_bytes + 40 * MIB


def test_entries_are_the_designs_lines() -> None:
    plan = plan_memory(replace(FITS, graphs_bytes=5 * MIB))
    lines = [(entry.process, entry.name, entry.inside, entry.planned_bytes) for entry in plan.entries()]
    assert lines == [
        ("worker", "weights", True, 100 * MIB),
        ("worker", "kv pool", True, plan.pool_bytes),
        ("worker", "activations", False, 40 * MIB),
        ("worker", "cuda graphs", False, 5 * MIB),
        ("worker", "worker context", False, 300 * MIB),
        ("transfer", "staging buffer", False, 16 * MIB),
        ("transfer", "transfer context", False, 60 * MIB),
    ]
    assert sum(entry.planned_bytes for entry in plan.entries()) == plan.total_bytes <= 2 * GIB


def test_a_worker_without_transfer_process_has_no_such_lines() -> None:
    plan = plan_memory(replace(FITS, staging_slots=0, staging_slot_bytes=0, transfer_context_bytes=0))
    assert {entry.process for entry in plan.entries()} == {"worker"}


def test_measured_goes_beside_planned() -> None:
    ledger = plan_memory(FITS).ledger(Measured(weights_bytes=99 * MIB, staging_bytes=16 * MIB))
    measured = {entry.name: entry.measured_bytes for entry in ledger.entries}
    assert measured["weights"] == 99 * MIB
    assert measured["staging buffer"] == 16 * MIB
    assert measured["kv pool"] is None


@pytest.mark.parametrize(
    ("change", "why", "line", "flag"),
    [
        ({"weights_bytes": 1100 * MIB}, Shortfall.WEIGHTS, "weights", "--mem-fraction"),
        ({"weights_bytes": 1020 * MIB}, Shortfall.POOL, "kv pool", "--mem-fraction"),
        ({"mem_fraction": 0.9}, Shortfall.OUTSIDE, "worker context", "--mem-fraction"),
        ({"staging_slot_bytes": 128 * MIB}, Shortfall.OUTSIDE, "staging buffer", "--staging-slots"),
        ({"weights_bytes": 3 * GIB}, Shortfall.WEIGHTS, "weights", "--device-memory"),
    ],
)
def test_refusals_name_the_line_and_show_the_table(
    change: dict[str, int], why: Shortfall, line: str, flag: str
) -> None:
    with pytest.raises(DoesNotFit) as caught:
        plan_memory(replace(FITS, **change))  # type: ignore[arg-type]
    error = caught.value
    assert (error.shortfall, error.line) == (why, line)
    text = str(error)
    assert "does not fit" in text.splitlines()[0]
    assert any(str(each).startswith(flag) for each in error.changes)
    assert str(error.changes[0]) in text.splitlines()[0]
    for name in ("weights", "kv pool", "activations", "worker context", "staging buffer", "transfer context"):
        assert name in text


def test_a_context_too_long_may_be_shortened() -> None:
    tight = replace(FITS, max_model_len=1_000_000)
    pages = tight.pages
    assert Change(max_model_len=pages * 16) in smallest_changes(tight)


@pytest.mark.parametrize(
    ("field", "value"),
    [("mem_fraction", 0.0), ("mem_fraction", 1.0), ("page_bytes", 0), ("weights_bytes", -1)],
)
def test_senseless_inputs_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        replace(FITS, **{field: value})  # type: ignore[arg-type]


inputs = st.builds(
    PlanInput,
    device=st.just("cpu"),
    device_bytes=st.integers(64 * MIB, 200 * GIB),
    mem_fraction=st.integers(1, 99).map(lambda percent: percent / 100),
    weights_bytes=st.integers(0, 100 * GIB),
    page_bytes=st.integers(1, 64 * MIB),
    page_size_tokens=st.sampled_from([1, 8, 16, 64]),
    max_model_len=st.integers(1, 131_072),
    max_chunk_tokens=st.just(512),
    max_batch=st.just(64),
    activation_bytes=st.integers(0, 4 * GIB),
    worker_context_bytes=st.integers(0, GIB),
    graphs_bytes=st.integers(0, GIB),
    staging_slots=st.integers(0, 64),
    staging_slot_bytes=st.integers(0, 64 * MIB),
    transfer_context_bytes=st.integers(0, GIB),
)


def keeps_the_rules(candidate: PlanInput) -> bool:
    """The three rules again, in exact fractions and written differently."""
    budget = Fraction(candidate.mem_fraction) * candidate.device_bytes
    pool = (int(budget) - candidate.weights_bytes) // candidate.page_bytes
    outside = candidate.device_bytes - candidate.outside_bytes
    holds_one = pool >= 0 and pool * candidate.page_size_tokens >= candidate.max_model_len
    return holds_one and int(budget) <= outside


@settings(max_examples=300, deadline=None)
@given(inputs)
def test_plans_exactly_what_keeps_the_rules(candidate: PlanInput) -> None:
    assert (shortfall(candidate) is None) == keeps_the_rules(candidate)


@settings(max_examples=300, deadline=None)
@given(inputs)
def test_every_proposed_change_fits_and_none_smaller_does(candidate: PlanInput) -> None:
    if shortfall(candidate) is None:
        return
    changes = smallest_changes(candidate)
    for change in changes:
        assert keeps_the_rules(change.applied(candidate)), change
        for smaller in nearer(candidate, change):
            assert not keeps_the_rules(smaller.applied(candidate)), (change, smaller)
    devices = [change for change in changes if change.device_bytes is not None]
    assert len(devices) == 1, "a large enough device always helps"


def nearer(candidate: PlanInput, change: Change) -> list[Change]:
    """One step back towards what is set now, in the flag's own grain."""
    if change.device_bytes is not None:
        back = change.device_bytes - MIB
        return [Change(device_bytes=back)] if back > candidate.device_bytes else []
    if change.mem_fraction is not None and change.max_model_len is not None:
        return [replace(change, max_model_len=change.max_model_len + 1)]
    if change.staging_slots is not None:
        return [Change(staging_slots=change.staging_slots + 1)]
    if change.max_model_len is not None:
        return [Change(max_model_len=change.max_model_len + 1)]
    assert change.mem_fraction is not None
    decimals = len(f"{change.mem_fraction:g}".partition(".")[2])
    step = 10.0 ** -max(2, decimals)
    towards = step if change.mem_fraction < candidate.mem_fraction else -step
    back_fraction = round(change.mem_fraction + towards, 4)
    return [Change(mem_fraction=back_fraction)] if 0 < back_fraction < 1 else []
