"""The messages between two transfer processes. Data never travels here: the mover writes it.

The receiving side connects to the sending side (it alone knows that it has pages), so grants flow along
the connection and reports of writes flow back. Every frame begins with its `PeerConnection`. The first
message each way is `PeerHello`; until both have agreed on version, geometry and slot size, everything else is
dropped and counted.
"""

from typing import Annotated

from msgspec import Meta, Struct

from kvtransfer.messages import (
    Epoch,
    HeadCount,
    KvGeometry,
    RankCount,
    RankIndex,
    Reason,
    Segments,
    SlotUses,
    TokenIndex,
    TransferId,
)


class PeerConnection(Struct, frozen=True, tag="connection", forbid_unknown_fields=True):
    """The number of the connection that this frame was sent on. The side that connects samples it.

    By it the receiver recognises a frame that arrives again, on another connection or in another incarnation
    of either side. Its transfer ids, slots and generations alone might name something that is there now.
    """

    number: Epoch


class PeerHello(Struct, frozen=True, tag="hello", forbid_unknown_fields=True):
    """The identity of the sending process, and where its staging buffer lies for the mover.

    `expected_epoch` is the incarnation that the receiver wants to reach; a sender in another incarnation
    answers `PeerRefused`. `agent_metadata` is the mover's own description of the registered buffer.
    """

    version: Annotated[str, Meta(max_length=64)]
    epoch: Epoch
    expected_epoch: Epoch | None
    mover: Annotated[str, Meta(max_length=32)]
    geometry: KvGeometry
    slots: Annotated[int, Meta(ge=1, lt=2**20)]
    slot_bytes: Annotated[int, Meta(ge=1, lt=2**40)]
    agent_name: Annotated[str, Meta(min_length=1, max_length=128)]
    agent_metadata: Annotated[bytes, Meta(max_length=1 << 20)]
    base_address: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    device_id: Annotated[int, Meta(ge=0, lt=1024)]
    rank: RankIndex = 0
    tp: RankCount = 1


class PeerRefused(Struct, frozen=True, tag="refused", forbid_unknown_fields=True):
    reason: Reason


class PeerPing(Struct, frozen=True, tag="ping", forbid_unknown_fields=True):
    """Keeps a quiet connection alive, both ways. A peer that is silent for longer than the limit is lost."""

    epoch: Epoch


class Offer(Struct, frozen=True, tag="offer", forbid_unknown_fields=True):
    """Receiver to sender: pages are reserved for these tokens; grants follow.

    `kv_heads` of them are wanted, at most `segment_tokens` of which fit a slot here; 0: all that the sender
    has, as many as fit there. `tp` is how many ranks the receiving worker has.
    """

    transfer_id: TransferId
    start_token: TokenIndex
    end_token: TokenIndex
    kv_heads: HeadCount = 0
    segment_tokens: Annotated[int, Meta(ge=0, lt=2**31)] = 0
    tp: RankCount = 1


class Grant(Struct, frozen=True, tag="grant", forbid_unknown_fields=True):
    """Receiver to sender: each of these slots may be written once, in this generation."""

    transfer_id: TransferId
    slots: SlotUses


class Ready(Struct, frozen=True, tag="ready", forbid_unknown_fields=True):
    """Sender to receiver: what is granted from now on is written without waiting for other transfers."""

    transfer_id: TransferId


class Written(Struct, frozen=True, tag="written", forbid_unknown_fields=True):
    """Sender to receiver: these segments lie in the granted slots (slot numbers are the receiver's)."""

    transfer_id: TransferId
    segments: Segments


class Committed(Struct, frozen=True, tag="committed", forbid_unknown_fields=True):
    """Receiver to sender: the transfer is complete; unused grants are void."""

    transfer_id: TransferId


class CancelTransfer(Struct, frozen=True, tag="cancel", forbid_unknown_fields=True):
    """Either way: the transfer has failed. The sender answers with `Closed` once nothing is in flight;
    until then the receiver keeps the granted slots in quarantine."""

    transfer_id: TransferId
    reason: Reason


class Closed(Struct, frozen=True, tag="closed", forbid_unknown_fields=True):
    """Sender to receiver: no write of this transfer is in flight, and none will start."""

    transfer_id: TransferId


class MoverNote(Struct, frozen=True, tag="mover", forbid_unknown_fields=True):
    """Sender to receiver: a message between two movers, where both sides take part in a write."""

    note: Annotated[bytes, Meta(max_length=1 << 20)]


PeerMessage = (
    PeerConnection
    | PeerHello
    | PeerRefused
    | PeerPing
    | Offer
    | Grant
    | Ready
    | Written
    | Committed
    | CancelTransfer
    | Closed
    | MoverNote
)
