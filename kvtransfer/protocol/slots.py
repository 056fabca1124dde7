"""The slot pool of one staging buffer: the owner, the state and the generation of each slot.

One pool serves both directions. A slot is

    FREE         without an owner
    GRANTED      receiving: a remote sender may write it once. sending: assigned to the worker, to pack into
    FILLED       receiving: data arrived, the worker is to unpack it. sending: packed, being written out
    QUARANTINED  its transfer has ended, but somebody may still write it or read it

and `free + granted + filled + quarantined == slots` at all times. Each use has a new generation, so that a
late message about an earlier use is recognised.
"""

from collections import deque
from dataclasses import dataclass
from enum import Enum

from kvtransfer.errors import IllegalTransition, SlotError
from kvtransfer.messages import SlotCounts, SlotUse


class SlotState(Enum):
    FREE = "free"
    GRANTED = "granted"
    FILLED = "filled"
    QUARANTINED = "quarantined"


class Direction(Enum):
    SEND = "send"
    RECEIVE = "receive"


TRANSITIONS: dict[SlotState, frozenset[SlotState]] = {
    SlotState.FREE: frozenset({SlotState.GRANTED}),
    SlotState.GRANTED: frozenset({SlotState.FILLED, SlotState.QUARANTINED, SlotState.FREE}),
    SlotState.FILLED: frozenset({SlotState.FREE, SlotState.QUARANTINED}),
    SlotState.QUARANTINED: frozenset({SlotState.FREE}),
}


@dataclass(slots=True)
class _Slot:
    state: SlotState = SlotState.FREE
    generation: int = 0
    transfer_id: int = 0
    direction: Direction = Direction.SEND
    since_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SlotHolder:
    """The transfer that has a slot which is not free, and since when the slot is in its state."""

    state: SlotState
    generation: int
    transfer_id: int
    direction: Direction
    since_s: float


class SlotPool:
    """The pool's bookkeeping; it knows no memory and no messages. Raises SlotError / IllegalTransition on
    misuse."""

    def __init__(self, slots: int) -> None:
        if slots < 1:
            raise SlotError(f"a pool needs at least one slot, not {slots}")
        self._slots = [_Slot() for _ in range(slots)]
        # Oldest-freed first: spreads the uses, and keeps a just freed slot cold for as long as possible.
        self._free: deque[int] = deque(range(slots))
        self._counts = dict.fromkeys(SlotState, 0)
        self._counts[SlotState.FREE] = slots
        self._in_use = dict.fromkeys(Direction, 0)

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def free(self) -> int:
        return self._counts[SlotState.FREE]

    def in_use(self, direction: Direction) -> int:
        """Slots of one direction that are not free."""
        return self._in_use[direction]

    def counts(self) -> SlotCounts:
        return SlotCounts(
            free=self._counts[SlotState.FREE],
            granted=self._counts[SlotState.GRANTED],
            filled=self._counts[SlotState.FILLED],
            quarantined=self._counts[SlotState.QUARANTINED],
        )

    def holder(self, slot: int) -> SlotHolder | None:
        """None for a free slot, and for a number that is no slot (it came from outside)."""
        if not 0 <= slot < len(self._slots):
            return None
        entry = self._slots[slot]
        if entry.state is SlotState.FREE:
            return None
        return SlotHolder(entry.state, entry.generation, entry.transfer_id, entry.direction, entry.since_s)

    def take(self, transfer_id: int, direction: Direction, now_s: float) -> SlotUse:
        """A free slot becomes GRANTED, in a new generation. `transfer_id` is 0 for one that is assigned to
        the worker. Raises SlotError if none is free."""
        if not self._free:
            raise SlotError("no slot is free")
        slot = self._free.popleft()
        entry = self._slots[slot]
        entry.generation += 1
        entry.transfer_id = transfer_id
        entry.direction = direction
        self._in_use[direction] += 1
        self._transition(slot, SlotState.GRANTED, now_s)
        return SlotUse(slot, entry.generation)

    def fill(self, use: SlotUse, now_s: float) -> None:
        """GRANTED → FILLED."""
        self._check(use)
        self._transition(use.slot, SlotState.FILLED, now_s)

    def quarantine(self, use: SlotUse, now_s: float) -> None:
        """GRANTED or FILLED → QUARANTINED."""
        self._check(use)
        self._transition(use.slot, SlotState.QUARANTINED, now_s)

    def release(self, use: SlotUse, now_s: float) -> None:
        """Any state but FREE → FREE. Nothing may touch the slot's memory for this use any more."""
        self._check(use)
        self._transition(use.slot, SlotState.FREE, now_s)
        self._in_use[self._slots[use.slot].direction] -= 1
        self._free.append(use.slot)

    def uses(self, direction: Direction, state: SlotState) -> list[SlotUse]:
        """All present uses of one kind. Walks the whole pool: for rare events."""
        return [
            SlotUse(slot, entry.generation)
            for slot, entry in enumerate(self._slots)
            if entry.state is state and entry.direction is direction
        ]

    def oldest_grant_age_s(self, now_s: float) -> float:
        """Age of the longest-standing GRANTED slot, 0 if there is none."""
        return max((now_s - e.since_s for e in self._slots if e.state is SlotState.GRANTED), default=0.0)

    def _check(self, use: SlotUse) -> None:
        if not 0 <= use.slot < len(self._slots):
            raise SlotError(f"slot {use.slot} does not exist, there are {len(self._slots)}")
        if self._slots[use.slot].generation != use.generation:
            now = self._slots[use.slot].generation
            raise SlotError(f"slot {use.slot} is in generation {now}, not {use.generation}")

    def _transition(self, slot: int, state: SlotState, now_s: float) -> None:
        entry = self._slots[slot]
        if state not in TRANSITIONS[entry.state]:
            raise IllegalTransition(f"slot {slot} cannot go from {entry.state.value} to {state.value}")
        self._counts[entry.state] -= 1
        self._counts[state] += 1
        entry.state = state
        entry.since_s = now_s
