"""Who joins and who leaves when other counts are wanted."""

import random
from pathlib import Path
from typing import Any, get_args

import pytest

from deploy.errors import UserError
from deploy.launcher.children import WorkerSlot, worker_slots
from deploy.launcher.scale_plan import Scale, counted, plan_scale
from deploy.settings.options import ServeSettings
from services.protocol.messages import Role


def serve(**changes: Any) -> ServeSettings:
    return ServeSettings(model_dir=Path("/srv/m"), **changes)


def names(slots: list[WorkerSlot]) -> list[str]:
    return [slot.name for slot in slots]


def test_the_highest_numbers_leave_and_the_next_ones_join() -> None:
    settings = serve(prefill=3, decode=1)
    plan = plan_scale(settings, worker_slots(settings, 0), Scale(prefill=1, decode=3), 0)
    assert names(plan.leaves) == ["prefill-2", "prefill-1"]
    assert names(plan.joins) == ["decode-1", "decode-2"]
    assert names(plan.stays) == ["prefill-0", "decode-0"]
    assert counted([*plan.stays, *plan.joins]) == "1 prefill, 3 decode"


def test_what_is_not_named_stays_as_it_is() -> None:
    settings = serve(prefill=2, decode=2)
    plan = plan_scale(settings, worker_slots(settings, 0), Scale(decode=2), 0)
    assert (plan.joins, plan.leaves) == ([], [])
    plan = plan_scale(settings, worker_slots(settings, 0), Scale(0, 0, 1), 0)
    assert names(plan.joins) == ["unified-0"]
    assert len(plan.leaves) == 4


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (Scale(prefill=0), "--prefill: must be at least 1 when there are decode workers"),
        (Scale(decode=0), "--decode: must be at least 1 when there are prefill workers"),
        (Scale(0, 0), "at least one worker is needed"),
        (Scale(prefill=2), "a prefill worker of 4 ranks needs 4 GPUs, and there are 2"),
    ],
)
def test_what_could_not_serve_is_refused(wanted: Scale, says: str) -> None:
    present = worker_slots(serve(), 2)
    with pytest.raises(UserError, match=says):
        plan_scale(serve(prefill_tp=4), present, wanted, 2)


def test_a_new_worker_takes_the_gpus_with_the_fewest_ranks() -> None:
    settings = serve(decode_tp=2)
    present = [WorkerSlot("prefill", 0, 0), WorkerSlot("decode", 0, 2, 2)]
    plan = plan_scale(settings, present, Scale(prefill=3, decode=2), 6)
    assert [(slot.name, slot.device_indices) for slot in plan.joins] == [
        ("prefill-1", [1]),
        ("prefill-2", [4]),
        ("decode-1", [4, 5]),
    ]


def test_counts_names_and_gpus_are_right_whatever_is_wanted() -> None:
    rng = random.Random(2)
    for _ in range(300):
        gpus = rng.choice((0, 1, 4, 8))
        settings = serve(tp=rng.choice((1, 2)) if gpus > 1 else 1)
        present = worker_slots(serve(tp=settings.tp, prefill=rng.randrange(1, 5), decode=2), gpus)
        wanted = Scale(rng.randrange(1, 5), rng.randrange(1, 5), rng.randrange(3))
        plan = plan_scale(settings, present, wanted, gpus)
        after = [*plan.stays, *plan.joins]
        assert len(set(names(after))) == len(after)
        assert {*names(plan.stays), *names(plan.leaves)} == set(names(present))
        assert all(slot in present for slot in plan.stays)
        for role in get_args(Role):
            mine = sorted(slot.number for slot in after if slot.role == role)
            assert mine == list(range(getattr(wanted, role)))
        if gpus:
            assert all(0 <= index < gpus for slot in after for index in slot.device_indices)
