"""The pool keeps every slot accounted for, and knows one use of a slot from another."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.errors import IllegalTransition, SlotError
from kvtransfer.messages import SlotUse
from kvtransfer.protocol.slots import Direction, SlotPool, SlotState


@given(st.integers(1, 8), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 7)), max_size=80))
def test_conservation_under_random_operations(slots: int, operations: list[tuple[int, int]]) -> None:
    pool = SlotPool(slots)
    model: dict[SlotUse, SlotState] = {}
    for operation, pick in operations:
        uses = list(model)
        use = uses[pick % len(uses)] if uses else None
        if operation == 0:
            if len(model) == slots:
                with pytest.raises(SlotError):
                    pool.take(1, Direction.SEND, 0.0)
            else:
                model[pool.take(1, Direction.RECEIVE if pick % 2 else Direction.SEND, 0.0)] = (
                    SlotState.GRANTED
                )
        elif use is None:
            continue
        elif operation == 1 and model[use] is SlotState.GRANTED:
            pool.fill(use, 0.0)
            model[use] = SlotState.FILLED
        elif operation == 2 and model[use] is not SlotState.QUARANTINED:
            pool.quarantine(use, 0.0)
            model[use] = SlotState.QUARANTINED
        elif operation == 3:
            pool.release(use, 0.0)
            del model[use]
        elif operation == 4 and model[use] is not SlotState.GRANTED:
            with pytest.raises(IllegalTransition):
                pool.fill(use, 0.0)
        counts = pool.counts()
        states = list(model.values())
        assert counts.granted == states.count(SlotState.GRANTED)
        assert counts.filled == states.count(SlotState.FILLED)
        assert counts.quarantined == states.count(SlotState.QUARANTINED)
        assert counts.free == slots - len(model) == pool.free
        assert pool.in_use(Direction.SEND) + pool.in_use(Direction.RECEIVE) == len(model)
        assert len({held.slot for held in model}) == len(model)


def test_a_former_use_is_refused() -> None:
    pool = SlotPool(1)
    former = pool.take(1, Direction.SEND, 0.0)
    pool.release(former, 0.0)
    present = pool.take(2, Direction.RECEIVE, 0.0)
    assert present.slot == former.slot and present.generation == former.generation + 1
    with pytest.raises(SlotError, match="generation"):
        pool.release(former, 0.0)
    holder = pool.holder(0)
    assert holder is not None and holder.transfer_id == 2 and holder.direction is Direction.RECEIVE


def test_numbers_from_outside_are_no_slots() -> None:
    pool = SlotPool(2)
    assert pool.holder(2) is None and pool.holder(-1) is None and pool.holder(0) is None
    with pytest.raises(SlotError, match="does not exist"):
        pool.release(SlotUse(2, 1), 0.0)


def test_oldest_grant_age() -> None:
    pool = SlotPool(3)
    assert pool.oldest_grant_age_s(5.0) == 0.0
    first = pool.take(1, Direction.SEND, 1.0)
    pool.take(1, Direction.SEND, 3.0)
    assert pool.oldest_grant_age_s(5.0) == 4.0
    pool.fill(first, 5.0)
    assert pool.oldest_grant_age_s(5.0) == 2.0
