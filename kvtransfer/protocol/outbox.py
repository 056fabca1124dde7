"""The actions that the transfer state machines ask for: plain values, which the process around them carries
out."""

from collections import Counter
from dataclasses import dataclass, field

from kvtransfer.messages import Event, TransferAddress
from kvtransfer.protocol.peer_messages import PeerMessage
from kvtransfer.spans import Spans

Destination = int
"""A receiving peer, named by its epoch: sampled at random at its start, so it names one incarnation for
ever."""


@dataclass(frozen=True, slots=True)
class SlotCopy:
    """The copy of the first `byte_count` bytes of a local slot into a peer's slot."""

    local_slot: int
    remote_slot: int
    byte_count: int


@dataclass(frozen=True, slots=True)
class Write:
    """A write that the process posts to the mover at once. It reports the end under `write_id`."""

    write_id: int
    destination: Destination
    transfer_id: int
    pieces: tuple[SlotCopy, ...]

    @property
    def byte_count(self) -> int:
        return sum(piece.byte_count for piece in self.pieces)


@dataclass(slots=True)
class Outbox:
    """The queues of actions. The machines fill them, in order; the process empties them. `drops` counts by
    reason, for ever."""

    to_worker: list[Event] = field(default_factory=list)
    to_sources: list[tuple[TransferAddress, PeerMessage]] = field(default_factory=list)
    to_destinations: list[tuple[Destination, PeerMessage]] = field(default_factory=list)
    connects: list[TransferAddress] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    drops: Counter[str] = field(default_factory=Counter)
    spans: Spans = field(default_factory=Spans)
    """The trace of transfers; the process does not empty it."""

    @property
    def empty(self) -> bool:
        return not (self.to_worker or self.to_sources or self.to_destinations or self.connects or self.writes)
