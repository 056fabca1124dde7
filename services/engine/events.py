"""Places in a device's stream: events, and what a copy beside the steps starts after.

What a pack or unpack waits for is a `StartAfter`. The device waits, never the host:

    NOW                  nothing: what it needs is done already
    StepsUpTo(step)      the step of that number, and all before it
    ALL_QUEUED_STEPS     every step that was queued before it
    EventPassed(event)   an event
"""

from dataclasses import dataclass
from typing import Final, Protocol

import torch


class Event(Protocol):
    """Passes when all is done that was queued before it."""

    def query(self) -> bool:
        """Whether it has passed."""

    def synchronize(self) -> None:
        """Wait for it."""

    def wait(self, stream: torch.cuda.Stream) -> None:
        """What is queued on `stream` from now on starts after it. The host does not wait."""


@dataclass(frozen=True, slots=True)
class Now:
    """See the module's docstring, as for those below."""


@dataclass(frozen=True, slots=True)
class AllQueuedSteps: ...


@dataclass(frozen=True, slots=True)
class StepsUpTo:
    step: int


@dataclass(frozen=True, slots=True)
class EventPassed:
    event: Event


StartAfter = Now | AllQueuedSteps | StepsUpTo | EventPassed
NOW: Final = Now()
ALL_QUEUED_STEPS: Final = AllQueuedSteps()
