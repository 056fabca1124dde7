"""Branches that wait for workers: for one to come back, or for their back-off. Pure."""

from router.routing.routed_request import Branch

SWEEP_S = 0.05
"""How often whoever drives this looks, while anything waits."""


class RetryQueue:
    """Bounded. What a branch waits for at most is the deadline of its request, which ends its request."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._branches: dict[int, Branch] = {}

    def __len__(self) -> int:
        """Branches that still wait; some may have ended unseen."""
        return len(self._branches)

    def add(self, branch: Branch) -> bool:
        """False: the room is full. Who is in already keeps its place."""
        if len(self._branches) >= self._most:
            self._branches = {key: one for key, one in self._branches.items() if not one.over}
        if len(self._branches) >= self._most and id(branch) not in self._branches:
            return False
        self._branches[id(branch)] = branch
        return True

    def take_due(self, now_s: float) -> list[Branch]:
        """Takes out all that may be tried now, in the order of coming; forgets what is over."""
        waiting = {key: branch for key, branch in self._branches.items() if not branch.over}
        due = [branch for branch in waiting.values() if branch.not_before_s <= now_s]
        self._branches = {key: branch for key, branch in waiting.items() if branch.not_before_s > now_s}
        return due
