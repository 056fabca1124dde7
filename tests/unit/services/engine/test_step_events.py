"""Steps by number: which are done, and what a copy behind one of them starts after."""

from typing import Any

import pytest

from services.engine.events import NOW, EventPassed
from services.engine.step_events import StepEvents


class FakeEvent:
    has_passed = False

    def query(self) -> bool:
        return self.has_passed


def test_a_copy_waits_for_the_event_of_its_step_and_for_none_once_it_is_done() -> None:
    steps, events = StepEvents(), [FakeEvent() for _ in range(3)]
    recorded: list[Any] = [*events]
    for event in recorded:
        steps.add(event)
    assert (steps.queued, steps.passed()) == (3, 0)
    assert [steps.after(step) for step in range(4)] == [NOW, *map(EventPassed, recorded)]
    events[0].has_passed = events[1].has_passed = True
    assert steps.passed() == 2
    assert [steps.after(step) for step in range(4)] == [NOW, NOW, NOW, EventPassed(recorded[2])]
    with pytest.raises(ValueError, match="step 4 is not queued yet: the newest is 3"):
        steps.after(4)


def test_where_steps_are_done_at_once_nothing_is_waited_for() -> None:
    steps = StepEvents()
    steps.add(None)
    steps.add(None)
    assert (steps.queued, steps.passed(), steps.after(2)) == (2, 2, NOW)
