"""Which workers join and leave when a running system is to have other counts. Pure."""

from dataclasses import dataclass
from typing import Annotated, get_args

from msgspec import Meta, Struct

from deploy.launcher.children import WorkerSlot, check_counts, ranks_of
from deploy.settings.options import ServeSettings
from services.protocol.messages import Role

MAX_WORKERS = 64
"""Of one role."""
Count = Annotated[int, Meta(ge=0, le=MAX_WORKERS)]


class Scale(Struct, frozen=True, forbid_unknown_fields=True):
    """How many workers of each role there are to be; None: as many as there are."""

    prefill: Count | None = None
    decode: Count | None = None
    unified: Count | None = None


@dataclass(frozen=True, slots=True)
class ScalePlan:
    """`leaves` are in the order of leaving."""

    stays: list[WorkerSlot]
    joins: list[WorkerSlot]
    leaves: list[WorkerSlot]


def plan_scale(settings: ServeSettings, present: list[WorkerSlot], wanted: Scale, gpus: int) -> ScalePlan:
    """The highest numbers of a role leave first. A new worker takes the GPUs with the fewest ranks on them.

    Raises UserError if what is wanted could not serve, or a worker needs more GPUs than there are.
    """
    plan = ScalePlan([], [], [])
    counts: dict[Role, int] = {}
    new: list[tuple[Role, int]] = []
    for role in get_args(Role):
        mine = sorted((slot for slot in present if slot.role == role), key=lambda slot: slot.number)
        given: int | None = getattr(wanted, role)
        count = counts[role] = len(mine) if given is None else given
        plan.stays.extend(mine[:count])
        plan.leaves.extend(reversed(mine[count:]))
        new += [(role, number) for number in range(len(mine), count)]
    check_counts(counts["prefill"], counts["decode"], counts["unified"])
    load = [0] * gpus
    for slot in plan.stays:
        _occupy(load, slot)
    for role, number in new:
        tp = ranks_of(settings, role, gpus)
        starts = range(0, max(1, gpus - tp + 1), tp)
        first = min(starts, key=lambda start: (sum(load[start : start + tp]), start))
        slot = WorkerSlot(role, number, first, tp)
        _occupy(load, slot)
        plan.joins.append(slot)
    return plan


def _occupy(load: list[int], slot: WorkerSlot) -> None:
    for index in slot.device_indices if load else ():
        load[index] += 1


def counted(slots: list[WorkerSlot]) -> str:
    """Counts of workers in words, like `2 prefill, 1 decode`."""
    counts = {role: sum(slot.role == role for slot in slots) for role in get_args(Role)}
    return ", ".join(f"{count} {role}" for role, count in counts.items() if count)
