"""The mover `nccl`: NCCL between two staging buffers, for hosts where nothing else is set up. It runs kernels
on the GPU, which slow the worker's steps: last in the order of choice.

Sends need receives, so both sides take part (`TwoSidedMover`). One communicator a pair and direction:

    add_peer (sender)        note Join(unique id) ──>   the receiver joins as rank 1
    post                     note Announce(pieces) ──>  the receiver checks them and posts the receives
    the send's event         the sender's slots are free, and it sends `Written` on the same channel
    the receive's event      only now does the receiver accept that `Written`: it defers a peer's messages
                             after an announcement until that batch has landed

Either side ends a pair by aborting its communicator, and loses the connection with it, so that both do. A
batch has ended when it has landed, or when the abort has ended; until then its slots are in use.
"""

from collections import Counter

import msgspec

from kvtransfer.buffer.region import Region
from kvtransfer.errors import MoverError, MoverUnavailable
from kvtransfer.movers.base import Handle, PieceOfWrite, Progress
from kvtransfer.movers.nccl_library import NcclError, NcclLibrary, find_nccl
from kvtransfer.movers.nccl_pair import (
    RECEIVER,
    SENDER,
    Batch,
    NcclPair,
    PairLibrary,
    PairState,
    RunInBackground,
    Streams,
    in_thread,
)
from kvtransfer.movers.spec import MoverSetup, MoverSpec, needs_device_memory

MAX_BATCHES_AHEAD = 4096
SLOWS = "nccl runs kernels on the GPU, which slow the worker's own steps"
CONTEXT_BYTES = 480 << 20
"""Kernels, and buffers for each communicator: about 1000 MiB were measured on H200 with one communicator, the
bare context of 544 MiB included."""


class NcclDescription(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    agent_name: str
    gpu_uuid: str


class JoinPair(msgspec.Struct, frozen=True, tag="join", forbid_unknown_fields=True):
    unique_id: bytes


class Announce(msgspec.Struct, frozen=True, tag="announce", forbid_unknown_fields=True):
    """The receives to post: `(offset, byte_count)` in the receiver's buffer, in the order of the sends."""

    pieces: list[tuple[int, int]]


_NOTES = msgspec.msgpack.Decoder(JoinPair | Announce)


class NcclMover:
    """A `Mover`, and a `TwoSidedMover`, for device memory. `run_in_background` runs what may take a while."""

    name = "nccl"
    quick = False

    def __init__(
        self,
        agent_name: str,
        library: PairLibrary,
        device: Streams,
        run_in_background: RunInBackground = in_thread,
    ) -> None:
        self.agent_name = agent_name
        self._library, self._device, self._run_in_background = library, device, run_in_background
        self._region: Region | None = None
        self._regions: dict[str, Region] = {}
        self._outgoing: dict[str, NcclPair] = {}
        self._incoming: dict[str, NcclPair] = {}
        self._sources: set[str] = set()
        self._leaving: list[tuple[str, NcclPair]] = []
        """Pairs that are being stopped, with their peers."""
        self._handles: dict[Handle, Batch] = {}
        self._next_handle = 1
        self._arriving: dict[str, list[Batch]] = {}
        self._announced: Counter[str] = Counter()
        self._landed: Counter[str] = Counter()
        self._notes: list[tuple[str, bytes]] = []

    # ------------------------------------------------------------ as any mover

    def register(self, region: Region) -> None:
        if not region.on_device:
            raise MoverError("the staging buffer is not in device memory")
        self._region = region

    def metadata(self) -> bytes:
        return msgspec.msgpack.encode(NcclDescription(self.agent_name, self._device.uuid))

    def add_peer(self, peer: str, metadata: bytes, region: Region) -> None:
        if peer in self._outgoing:
            return
        try:
            theirs = msgspec.msgpack.decode(metadata, type=NcclDescription)
        except msgspec.MsgspecError as error:
            raise MoverError(f"the description of {peer} cannot be used: {error}") from error
        if theirs.agent_name != peer:
            raise MoverError(f"the description of {peer} is of another agent")
        if theirs.gpu_uuid == self._device.uuid:
            raise MoverError("nccl takes no two processes on one GPU: --mover cuda_ipc does, on both sides")
        unique_id = self._library.unique_id()
        self._outgoing[peer] = NcclPair(
            self._library, self._device, unique_id, SENDER, self._run_in_background
        )
        self._regions[peer] = region
        self._notes.append((peer, msgspec.msgpack.encode(JoinPair(unique_id))))

    def remove_peer(self, peer: str) -> None:
        self.cut(peer)

    def post(self, peer: str, pieces: list[PieceOfWrite]) -> Handle:
        ours, pair = self._region, self._outgoing.get(peer)
        if ours is None or pair is None:
            raise MoverError(f"unknown peer {peer}")
        theirs = self._regions[peer]
        for piece in pieces:
            ends = (piece.local_offset + piece.byte_count, piece.remote_offset + piece.byte_count)
            if ends[0] > ours.byte_count or ends[1] > theirs.byte_count:
                raise MoverError("a piece lies outside its region")
        batch = Batch([(ours.address + p.local_offset, p.byte_count) for p in pieces])
        pair.put(batch)
        note = Announce([(p.remote_offset, p.byte_count) for p in pieces])
        self._notes.append((peer, msgspec.msgpack.encode(note)))
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        self._handles[handle] = batch
        return handle

    def poll(self, handle: Handle) -> Progress:
        return self._handles[handle].progress

    def release(self, handle: Handle) -> None:
        self._handles.pop(handle, None)

    def close(self) -> None:
        """Begins to abort everything; what does not end by itself ends with the process."""
        for peer in list(self._outgoing):
            self.cut(peer)
        for peer in list(self._sources):
            self.leave_source(peer)

    # ------------------------------------------------------------ as a two-sided one

    @property
    def busy(self) -> bool:
        pairs = [*self._outgoing.values(), *self._incoming.values()]
        return bool(self._leaving) or not all(pair.idle for pair in pairs)

    def step(self) -> None:
        for pair in (*self._outgoing.values(), *self._incoming.values()):
            pair.advance()
        for _, pair in self._leaving:
            pair.advance()
        self._leaving = [entry for entry in self._leaving if entry[1].state is not PairState.STOPPED]
        for peer, batches in self._arriving.items():
            while batches and batches[0].progress is not Progress.PENDING:
                batches.pop(0)
                self._landed[peer] += 1

    def notes(self) -> list[tuple[str, bytes]]:
        notes, self._notes = self._notes, []
        return notes

    def faults(self) -> list[tuple[str, str]]:
        """Peers whose communicator, in either direction, has failed, with the reason: to be lost."""
        both = [*self._outgoing.items(), *self._incoming.items()]
        return [(peer, pair.fault) for peer, pair in both if pair.fault is not None]

    def cut(self, peer: str) -> None:
        pair = self._outgoing.pop(peer, None)
        if pair is not None:
            pair.stop()
            self._leaving.append((peer, pair))
            self._notes = [entry for entry in self._notes if entry[0] != peer]

    def accept_source(self, peer: str) -> None:
        self._sources.add(peer)

    def leave_source(self, peer: str) -> None:
        self._sources.discard(peer)
        pair = self._incoming.pop(peer, None)
        if pair is not None:
            pair.stop()
            self._leaving.append((peer, pair))

    def on_note(self, peer: str, note: bytes) -> None:
        """Handles a source's note. Raises MoverError for what makes no sense: the source has to be lost."""
        if peer not in self._sources:
            raise MoverError("a note before the greeting")
        try:
            message = _NOTES.decode(note)
        except msgspec.MsgspecError as error:
            raise MoverError(f"a note that cannot be read: {error}") from error
        pair, ours = self._incoming.get(peer), self._region
        if isinstance(message, JoinPair):
            if pair is not None:
                raise MoverError("joined twice")
            self._incoming[peer] = NcclPair(
                self._library, self._device, message.unique_id, RECEIVER, self._run_in_background
            )
            return
        if pair is None or ours is None:
            raise MoverError("an announcement before the pair has joined")
        batches = self._arriving.setdefault(peer, [])
        if len(batches) >= MAX_BATCHES_AHEAD:
            raise MoverError("too many announcements")
        for offset, byte_count in message.pieces:
            if offset < 0 or byte_count <= 0 or offset + byte_count > ours.byte_count:
                raise MoverError("an announced piece lies outside the buffer")
        batch = Batch([(ours.address + offset, byte_count) for offset, byte_count in message.pieces])
        pair.put(batch)
        self._announced[peer] += 1
        batches.append(batch)

    def announced(self, peer: str) -> int:
        return self._announced[peer]

    def landed(self, peer: str) -> int:
        return self._landed[peer]


def missing() -> str | None:
    return None if find_nccl() else "libnccl.so.2 is not found (package nvidia-nccl-cu13)"


def build(setup: MoverSetup) -> NcclMover:
    device = setup.gpu
    try:
        return NcclMover(setup.agent_name, NcclLibrary(same_host=setup.same_host), device)
    except NcclError as error:
        raise MoverUnavailable(f"--mover nccl: {error}") from error


MOVER = MoverSpec(
    name=NcclMover.name,
    preference=10,
    missing=missing,
    why_not=needs_device_memory,
    drawback=lambda facts: SLOWS,
    context_bytes=CONTEXT_BYTES,
    build=build,
)
