"""The steps of one engine by number, and which of them the device is done with.

Steps and copies of pages run on the device in the order in which they are queued, so one number says it all:
whoever packs or unpacks beside them waits for the step that its pages need, and for no later one.
"""

from collections import deque

from services.engine.events import NOW, Event, EventPassed, Now


class StepEvents:
    """`queued` is the number of the newest step; the first is number 1."""

    def __init__(self) -> None:
        self.queued = 0
        self._passed = 0
        self._running: deque[tuple[int, Event]] = deque()

    def add(self, done: Event | None) -> None:
        """One more is queued, which is done when the event passes; None: it is done already, as all before
        it."""
        self.queued += 1
        if done is None:
            self._passed = self.queued
            self._running.clear()
        else:
            self.passed()  # no more are kept than run
            self._running.append((self.queued, done))

    def passed(self) -> int:
        """The number of the newest step that is done. Asks the device, and does not wait for it."""
        while self._running and self._running[0][1].query():
            self._passed = self._running.popleft()[0]
        return self._passed

    def after(self, step: int) -> Now | EventPassed:
        """What a copy behind step number `step` waits for. Raises `ValueError` for one not queued yet."""
        if step > self.queued:
            raise ValueError(f"step {step} is not queued yet: the newest is {self.queued}")
        if step <= self.passed():
            return NOW
        return EventPassed(next(event for number, event in self._running if number >= step))
