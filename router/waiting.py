"""Legs that wait for workers: for one to come back, or for their back-off. Pure."""

from collections import deque

from router.migration import Leg

SWEEP_S = 0.05
"""How often whoever drives this looks, while anything waits."""


class WaitingRoom:
    """Bounded. What a leg waits for at most is the deadline of its request, which ends its journey."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._legs: deque[Leg] = deque()

    def __len__(self) -> int:
        """Legs that still wait; some may have ended unseen."""
        return len(self._legs)

    def add(self, leg: Leg) -> bool:
        """False: the room is full."""
        if len(self._legs) >= self._most:
            self._legs = deque(one for one in self._legs if not one.over)
        if len(self._legs) >= self._most:
            return False
        self._legs.append(leg)
        return True

    def take_due(self, now_s: float) -> list[Leg]:
        """Takes out all that may be tried now, in the order of coming; forgets what is over."""
        due = [leg for leg in self._legs if not leg.over and leg.not_before_s <= now_s]
        taken = set(map(id, due))
        self._legs = deque(leg for leg in self._legs if not leg.over and id(leg) not in taken)
        return due
