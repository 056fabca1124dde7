"""The interface of movers, which move bytes between two staging buffers. The vocabulary is that of NIXL
(NVIDIA Inference Xfer Library): register → describe → prepare → post → check → release.

One thread calls a mover. Every call returns within a short, bounded time; the caller does the waiting, and
polls handles until its own deadline. Nothing a peer does may raise anything but MoverError; MoverBroken means
that the device itself has failed.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Protocol, runtime_checkable

from kvtransfer.buffer.region import Region

Handle = int


@dataclass(frozen=True, slots=True)
class PieceOfWrite:
    """A part of a write: `byte_count` bytes from `local_offset` of the own region to `remote_offset` of the
    peer's."""

    local_offset: int
    remote_offset: int
    byte_count: int


class Progress(Enum):
    """How far a write is."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"


class Mover(Protocol):
    """One transfer process's end of a transport; see the module. `name` is what two peers compare;
    `agent_name` is unique in every incarnation.

    `quick`: a slot is written in far less time than a sleep takes, so its end is worth polling for.
    """

    name: str
    quick: bool
    agent_name: str

    def register(self, region: Region) -> None:
        """Makes the buffer reachable. Once, before anything else. Raises MoverError."""

    def metadata(self) -> bytes:
        """The registered region's description, for peers' `add_peer`; at most 1 MiB."""

    def add_peer(self, peer: str, metadata: bytes, region: Region) -> None:
        """Learns to reach a peer's region. Again for a known name: no effect. Raises MoverError."""

    def remove_peer(self, peer: str) -> None:
        """Disconnects; its handles must have been released. Unknown names are ignored."""

    def post(self, peer: str, pieces: list[PieceOfWrite]) -> Handle:
        """Starts one write of all pieces. Raises MoverError, PeerLostError if the peer is gone."""

    def poll(self, handle: Handle) -> Progress:
        """DONE: every byte is at the peer. FAILED: nothing of it is in flight any more."""

    def release(self, handle: Handle) -> None:
        """Forgets a handle. One that is PENDING is cancelled as far as the transport can: its data may
        still be on the way, so its peer has to be removed before its slots are used again."""

    def close(self) -> None:
        """Releases handles, removes peers, deregisters, in this order. Idempotent."""


@runtime_checkable
class TwoSidedMover(Protocol):
    """What a `Mover` has besides, where the receiver takes part in every write. Its notes travel over the
    peers' channel, in order with all else; a source's messages are deferred until the batches announced
    before them have landed. Its handles end when a pair that was cut has really stopped."""

    @property
    def busy(self) -> bool:
        """Whether `step` has to be called again soon."""

    def step(self) -> None:
        """Advances everything, without waiting."""

    def notes(self) -> list[tuple[str, bytes]]:
        """The notes to send, each with its destination's agent, once; at most 1 MiB each."""

    def faults(self) -> list[tuple[str, str]]:
        """The peers that have to be lost, and why; repeated until they are."""

    def cut(self, peer: str) -> None:
        """Begins to stop a lost destination, which may be added anew at once."""

    def accept_source(self, peer: str) -> None:
        """Adds a source that has greeted. Again for a known name: no effect."""

    def leave_source(self, peer: str) -> None:
        """Begins to stop a lost source. Unknown names are ignored."""

    def on_note(self, peer: str, note: bytes) -> None:
        """Handles a source's note. Raises MoverError: the source has to be lost."""

    def announced(self, peer: str) -> int:
        """How many batches a source has ever announced."""

    def landed(self, peer: str) -> int:
        """How many of them have ended: arrived, or failed with nothing of them in flight."""


def two_sided(mover: Mover) -> TwoSidedMover | None:
    return mover if isinstance(mover, TwoSidedMover) else None
