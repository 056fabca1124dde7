"""Legs that wait for workers: for one to come back, or for their back-off. Pure."""

from router.routing.routed_request import Leg

SWEEP_S = 0.05
"""How often whoever drives this looks, while anything waits."""


class WaitingRoom:
    """Bounded. What a leg waits for at most is the deadline of its request, which ends its journey."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._legs: dict[int, Leg] = {}

    def __len__(self) -> int:
        """Legs that still wait; some may have ended unseen."""
        return len(self._legs)

    def add(self, leg: Leg) -> bool:
        """False: the room is full. Who is in already keeps its place."""
        if len(self._legs) >= self._most:
            self._legs = {key: one for key, one in self._legs.items() if not one.over}
        if len(self._legs) >= self._most and id(leg) not in self._legs:
            return False
        self._legs[id(leg)] = leg
        return True

    def take_due(self, now_s: float) -> list[Leg]:
        """Takes out all that may be tried now, in the order of coming; forgets what is over."""
        waiting = {key: leg for key, leg in self._legs.items() if not leg.over}
        due = [leg for leg in waiting.values() if leg.not_before_s <= now_s]
        self._legs = {key: leg for key, leg in waiting.items() if leg.not_before_s > now_s}
        return due
