"""One outgoing transfer: its states, their legal moves, and what is kept about it."""

from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from kvtransfer.errors import IllegalMove
from kvtransfer.layout import TokenRanges
from kvtransfer.limits import Limits
from kvtransfer.messages import Segment, SlotUse
from kvtransfer.outbox import Destination


class SendState(Enum):
    WAITING = "waiting"
    """The worker has opened it; no offer yet."""
    OFFERED = "offered"
    """A destination has offered; the worker has not opened it yet."""
    EARLY_COMMITTED = "early_committed"
    """A destination needed nothing and has committed before the worker opened it."""
    CONFIRMED = "confirmed"
    CLOSING = "closing"
    ENDED = "ended"


LEGAL_MOVES: dict[SendState, frozenset[SendState]] = {
    SendState.WAITING: frozenset({SendState.CONFIRMED, SendState.ENDED}),
    SendState.OFFERED: frozenset({SendState.CONFIRMED, SendState.EARLY_COMMITTED, SendState.ENDED}),
    SendState.EARLY_COMMITTED: frozenset({SendState.ENDED}),
    SendState.CONFIRMED: frozenset({SendState.CLOSING, SendState.ENDED}),
    SendState.CLOSING: frozenset({SendState.ENDED}),
    SendState.ENDED: frozenset(),
}
HELD_OFFERS = (SendState.OFFERED, SendState.EARLY_COMMITTED)


@dataclass(slots=True)
class Send:
    transfer_id: int
    state: SendState
    deadline_s: float
    destination: Destination = 0
    start_token: int = 0
    end_token: int = 0
    grants: deque[SlotUse] = field(default_factory=deque)
    """Remote slots that may be written and are not yet."""
    grant_generations: dict[int, int] = field(default_factory=dict)
    """Newest generation of each remote slot ever granted: a repeated grant is told from a new one."""
    lent: dict[int, SlotUse] = field(default_factory=dict)
    packed: TokenRanges = field(default_factory=TokenRanges)
    writes: set[int] = field(default_factory=set)

    def move(self, state: SendState) -> None:
        if state not in LEGAL_MOVES[self.state]:
            raise IllegalMove(f"send {self.transfer_id}: {self.state.value} to {state.value}")
        self.state = state

    def wants_slots(self, tokens_per_slot: int) -> bool:
        missing_tokens = self.end_token - self.start_token - self.packed.tokens
        return len(self.lent) < min(len(self.grants), -(-missing_tokens // tokens_per_slot))

    def fault(self, segment: Segment, limits: Limits) -> str | None:
        """Why a packed segment cannot be part of this transfer, as a drop counter's name."""
        end_token = segment.start_token + segment.token_count
        if segment.start_token < self.start_token or end_token > self.end_token:
            return "filled_out_of_range"
        if segment.token_count > limits.tokens_per_slot:
            return "filled_wrong_length"
        if segment.byte_count != segment.token_count * limits.token_bytes:
            return "filled_wrong_length"
        if self.packed.overlaps(segment.start_token, end_token):
            return "filled_overlap"
        return None


@dataclass(frozen=True, slots=True)
class InFlight:
    transfer_id: int
    local: tuple[SlotUse, ...]
    remote: tuple[Segment, ...]
    filled_s: float


def placed(segment: Segment, grant: SlotUse) -> Segment:
    """The same tokens, as they lie at the destination."""
    return Segment(
        grant.slot,
        grant.generation,
        segment.start_token,
        segment.token_count,
        segment.byte_count,
        segment.checksum,
    )
