"""One incoming transfer: its states, their transitions, and its record."""

from dataclasses import dataclass, field
from enum import Enum

from kvtransfer.errors import IllegalTransition
from kvtransfer.messages import Segment, SlotUse, TransferAddress
from kvtransfer.protocol.layout import TokenRanges


class ReceiveState(Enum):
    CONNECTING = "connecting"
    COMMIT_PENDING = "commit_pending"
    """The worker needed nothing and has committed before the source was connected."""
    OPEN = "open"
    COMMITTED = "committed"
    CANCELLED = "cancelled"
    ENDED = "ended"


TRANSITIONS: dict[ReceiveState, frozenset[ReceiveState]] = {
    ReceiveState.CONNECTING: frozenset(
        {ReceiveState.OPEN, ReceiveState.COMMIT_PENDING, ReceiveState.ENDED},
    ),
    ReceiveState.COMMIT_PENDING: frozenset({ReceiveState.COMMITTED, ReceiveState.ENDED}),
    ReceiveState.OPEN: frozenset({ReceiveState.COMMITTED, ReceiveState.CANCELLED}),
    ReceiveState.COMMITTED: frozenset({ReceiveState.ENDED}),
    ReceiveState.CANCELLED: frozenset({ReceiveState.ENDED}),
    ReceiveState.ENDED: frozenset(),
}
CLOSING = (ReceiveState.COMMITTED, ReceiveState.CANCELLED)


@dataclass(slots=True)
class IncomingSegments:
    """The record of one incoming transfer: its token range, what has arrived, and its granted slots."""

    transfer_id: int
    source: TransferAddress
    start_token: int
    end_token: int
    deadline_s: float
    kv_heads: int
    token_bytes: int
    segment_tokens: int
    """The most tokens of one segment, as far as this side's slots go."""
    state: ReceiveState = ReceiveState.CONNECTING
    arrived: TokenRanges = field(default_factory=TokenRanges)
    ready: bool = False
    """The source will write what is granted without waiting for other transfers."""
    granted: dict[int, SlotUse] = field(default_factory=dict)
    """By slot number; while CLOSING, these are the quarantined ones."""
    reason: str = ""
    resend_at_s: float = 0.0
    closing_since_s: float = 0.0

    def transition(self, state: ReceiveState) -> None:
        if state not in TRANSITIONS[self.state]:
            raise IllegalTransition(f"receive {self.transfer_id}: {self.state.value} to {state.value}")
        self.state = state

    def needs_slots(self) -> int:
        """How many slots it lacks beyond those granted; more once it shows that the source's slots are
        smaller."""
        missing_tokens = self.end_token - self.start_token - self.arrived.tokens
        return -(-missing_tokens // self.segment_tokens) - len(self.granted)

    def fault(self, segment: Segment) -> str | None:
        """Why a reported segment cannot be accepted, as a drop counter's name."""
        use = self.granted.get(segment.slot)
        end_token = segment.start_token + segment.token_count
        if use is None:
            return "written_not_granted"
        if use.generation != segment.generation:
            return "written_stale_generation"
        if segment.start_token < self.start_token or end_token > self.end_token:
            return "written_out_of_range"
        if segment.token_count > self.segment_tokens:
            return "written_wrong_length"
        if segment.byte_count != segment.token_count * self.token_bytes:
            return "written_wrong_length"
        if self.arrived.overlaps(segment.start_token, end_token):
            return "written_overlap"
        return None
