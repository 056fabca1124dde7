"""Which workers belong to the cluster, as lists of workers come and change. Pure.

    (listed) ──> MEMBER <──> MISSED ──> LEAVING ──> (released, and forgotten)
                    ↑____________________│  (listed again)

A list may be read while somebody writes it, and then it is short. So a worker counts from the first list that
names it, and leaves with the second in a row that does not.
"""

import enum
from collections.abc import Collection, Iterable


class MemberState(enum.Enum):
    MEMBER = "member"
    MISSED = "missed"  # not in the latest list; it gets work until the next one says so, too
    LEAVING = "leaving"  # it gets no new work; what it has goes on to its end


_LISTED = dict.fromkeys(MemberState, MemberState.MEMBER)
_NOT_LISTED: dict[MemberState, MemberState] = {
    MemberState.MEMBER: MemberState.MISSED,
    MemberState.MISSED: MemberState.LEAVING,
    MemberState.LEAVING: MemberState.LEAVING,
}


class Membership:
    def __init__(self, endpoints: Iterable[str] = ()) -> None:
        self._states = dict.fromkeys(endpoints, MemberState.MEMBER)
        self.leaving: frozenset[str] = frozenset()

    def state(self, endpoint: str) -> MemberState | None:
        """None: the worker is unknown, or forgotten."""
        return self._states.get(endpoint)

    def update(self, listed: Collection[str]) -> list[str]:
        """Takes the list as it is now. Returns the new workers, once each, in the order of the list."""
        for endpoint, state in self._states.items():
            transitions = _LISTED if endpoint in listed else _NOT_LISTED
            self._states[endpoint] = transitions[state]
        new = [endpoint for endpoint in dict.fromkeys(listed) if endpoint not in self._states]
        self._states |= dict.fromkeys(new, MemberState.MEMBER)
        self._refresh_leaving()
        return new

    def release(self, busy: Collection[str]) -> list[str]:
        """Forgets the leaving workers on which nothing runs, and returns them."""
        free = sorted(self.leaving.difference(busy))
        for endpoint in free:
            self.forget(endpoint)
        return free

    def forget(self, endpoint: str) -> None:
        self._states.pop(endpoint, None)
        self._refresh_leaving()

    def _refresh_leaving(self) -> None:
        leaving = (one for one, state in self._states.items() if state is MemberState.LEAVING)
        self.leaving = frozenset(leaving)
