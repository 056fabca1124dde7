"""One outgoing transfer: its states, their transitions, and its record."""

from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from kvtransfer.errors import IllegalTransition
from kvtransfer.messages import Segment, SlotUse
from kvtransfer.protocol.layout import TokenRanges
from kvtransfer.protocol.limits import TransferLimits
from kvtransfer.protocol.outbox import Destination
from kvtransfer.protocol.peer_messages import Offer


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


TRANSITIONS: dict[SendState, frozenset[SendState]] = {
    SendState.WAITING: frozenset({SendState.CONFIRMED, SendState.ENDED}),
    SendState.OFFERED: frozenset({SendState.CONFIRMED, SendState.EARLY_COMMITTED, SendState.ENDED}),
    SendState.EARLY_COMMITTED: frozenset({SendState.ENDED}),
    SendState.CONFIRMED: frozenset({SendState.CLOSING, SendState.ENDED}),
    SendState.CLOSING: frozenset({SendState.ENDED}),
    SendState.ENDED: frozenset(),
}
UNOPENED = (SendState.OFFERED, SendState.EARLY_COMMITTED)
"""A destination has offered, and the worker has not opened the transfer yet."""


@dataclass(slots=True)
class OutgoingTransfer:
    """The record of one outgoing transfer: its token range, its grants, and its writes in flight."""

    transfer_id: int
    state: SendState
    deadline_s: float
    destination: Destination = 0
    start_token: int = 0
    end_token: int = 0
    kv_heads: int = 0
    token_bytes: int = 0
    segment_tokens: int = 0
    """The most tokens of one segment: they fit a slot on both sides."""
    tp: int = 1
    ready: bool = False
    """The worker has pages for the prompt, and keeps them."""
    grants: deque[SlotUse] = field(default_factory=deque)
    """Remote slots that may be written and are not yet."""
    grant_generations: dict[int, int] = field(default_factory=dict)
    """Newest generation of each remote slot ever granted: it distinguishes a repeated grant from a new
    one."""
    packed: TokenRanges = field(default_factory=TokenRanges)
    writes: set[int] = field(default_factory=set)

    def transition(self, state: SendState) -> None:
        if state not in TRANSITIONS[self.state]:
            raise IllegalTransition(f"send {self.transfer_id}: {self.state.value} to {state.value}")
        self.state = state

    def offered(self, offer: Offer, limits: TransferLimits) -> None:
        """Records what the destination wants; it may not want more heads than there are."""
        self.start_token, self.end_token, self.tp = offer.start_token, offer.end_token, offer.tp
        self.kv_heads = offer.kv_heads or limits.kv_heads
        self.token_bytes = limits.token_bytes_of(self.kv_heads)
        ours = limits.segment_tokens_of(self.kv_heads)
        self.segment_tokens = min(ours, offer.segment_tokens or ours)

    def wanted_slots(self) -> int:
        """How many send slots it could use at once, all its tokens being computed."""
        if self.state is not SendState.CONFIRMED or not self.ready:
            return 0
        missing_tokens = self.end_token - self.start_token - self.packed.tokens
        return min(len(self.grants), -(-missing_tokens // self.segment_tokens))

    def fault(self, segment: Segment) -> str | None:
        """Why a packed segment cannot be part of this transfer, as a drop counter's name."""
        end_token = segment.start_token + segment.token_count
        if segment.start_token < self.start_token or end_token > self.end_token:
            return "filled_out_of_range"
        if segment.token_count > self.segment_tokens:
            return "filled_wrong_length"
        if segment.byte_count != segment.token_count * self.token_bytes:
            return "filled_wrong_length"
        if self.packed.overlaps(segment.start_token, end_token):
            return "filled_overlap"
        return None if self.grants else "filled_not_granted"


@dataclass(frozen=True, slots=True)
class InFlightWrite:
    """A write that the mover has not finished: its local slots, and the segments as they will lie
    remotely."""

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
