"""Attempts that wait for workers: for one to come back, or for their back-off. Pure."""

from router.routing.attempt import Attempt

SWEEP_S = 0.05
"""Between two looks of the dispatcher, while anything waits."""


class RetryQueue:
    """Bounded. An attempt waits at most until the deadline of its request, which ends its request."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._attempts: dict[Attempt, None] = {}

    def __len__(self) -> int:
        """Attempts that still wait; some may have ended unseen."""
        return len(self._attempts)

    def has_room(self, attempt: Attempt) -> bool:
        """Whether it may be added. An attempt that is in already keeps its place."""
        if len(self._attempts) >= self._capacity:
            self._attempts = dict.fromkeys(self._waiting())
        return attempt in self._attempts or len(self._attempts) < self._capacity

    def add(self, attempt: Attempt) -> None:
        self._attempts[attempt] = None

    def take_due(self, now_s: float) -> list[Attempt]:
        """Takes out all that may be tried now, in the order of coming; forgets those that wait no more."""
        due: list[Attempt] = []
        later: dict[Attempt, None] = {}
        for attempt in self._waiting():
            if attempt.wait is not None and attempt.wait.not_before_s > now_s:
                later[attempt] = None
            else:
                due.append(attempt)
        self._attempts = later
        return due

    def _waiting(self) -> list[Attempt]:
        return [attempt for attempt in self._attempts if attempt.wait is not None]
