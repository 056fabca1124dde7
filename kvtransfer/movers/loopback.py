"""The mover `loopback`: it copies within one process, for tests and simulation. No flag chooses it.

All `LoopbackMover`s of one `LoopbackFabric` reach each other. Copies happen when the fabric is stepped, so a
test decides the order; failures, partial copies and stalls are injected per fabric.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from kvtransfer.buffer.region import Region
from kvtransfer.errors import MoverError, PeerLostError
from kvtransfer.movers.base import Handle, PieceOfWrite, Progress


@dataclass(slots=True)
class _LoopbackWrite:
    mover: "LoopbackMover"
    peer: str
    pieces: list[PieceOfWrite]
    progress: Progress = Progress.PENDING


@dataclass(slots=True)
class LoopbackFabric:
    """The wire. `fate(peer, pieces)` decides what becomes of a write when it is stepped: DONE copies all of
    it, FAILED copies the first half of its first piece, PENDING leaves it for a later step."""

    fate: Callable[[str, list[PieceOfWrite]], Progress] = lambda peer, pieces: Progress.DONE
    automatic: bool = True
    """Step a write when it is polled."""
    buffers: dict[str, memoryview] = field(default_factory=dict)
    posted: dict[Handle, _LoopbackWrite] = field(default_factory=dict)
    next_handle: Handle = 1

    def step(self, handle: Handle) -> None:
        """Advances one write. A released handle still advances: cancelling does not stop data."""
        write = self.posted[handle]
        if write.progress is not Progress.PENDING:
            return
        target = self.buffers.get(write.peer)
        fate = Progress.FAILED if target is None else self.fate(write.peer, write.pieces)
        if fate is Progress.DONE:
            for piece in write.pieces:
                self._copy(write, piece, piece.byte_count)
        elif fate is Progress.FAILED and target is not None:
            self._copy(write, write.pieces[0], write.pieces[0].byte_count // 2)
        write.progress = fate

    def _copy(self, write: _LoopbackWrite, piece: PieceOfWrite, byte_count: int) -> None:
        source, target = self.buffers[write.mover.agent_name], self.buffers[write.peer]
        data = source[piece.local_offset : piece.local_offset + byte_count]
        target[piece.remote_offset : piece.remote_offset + byte_count] = data


class LoopbackMover:
    """A `Mover` whose region is a memoryview given at construction."""

    name = "loopback"
    quick = False

    def __init__(self, fabric: LoopbackFabric, agent_name: str, buffer: memoryview) -> None:
        self.agent_name = agent_name
        self._fabric, self._buffer = fabric, buffer
        self._peers: set[str] = set()
        self._handles: set[Handle] = set()

    def register(self, region: Region) -> None:
        if region.byte_count != len(self._buffer):
            raise MoverError(f"region of {region.byte_count} bytes, buffer of {len(self._buffer)}")
        self._fabric.buffers[self.agent_name] = self._buffer

    def metadata(self) -> bytes:
        return self.agent_name.encode()

    def add_peer(self, peer: str, metadata: bytes, region: Region) -> None:
        if metadata != peer.encode():
            raise MoverError("metadata of another agent")
        self._peers.add(peer)

    def remove_peer(self, peer: str) -> None:
        self._peers.discard(peer)

    def post(self, peer: str, pieces: list[PieceOfWrite]) -> Handle:
        if peer not in self._peers:
            raise MoverError(f"unknown peer {peer}")
        target = self._fabric.buffers.get(peer)
        if target is None:
            raise PeerLostError(f"peer {peer} is gone")
        for piece in pieces:
            last = max(piece.local_offset - len(self._buffer), piece.remote_offset - len(target))
            if last + piece.byte_count > 0:
                raise MoverError("a piece lies outside its region")
        handle = self._fabric.next_handle
        self._fabric.next_handle += 1
        self._fabric.posted[handle] = _LoopbackWrite(self, peer, pieces)
        self._handles.add(handle)
        return handle

    def poll(self, handle: Handle) -> Progress:
        if handle not in self._handles:
            raise MoverError(f"unknown handle {handle}")
        if self._fabric.automatic:
            self._fabric.step(handle)
        return self._fabric.posted[handle].progress

    def release(self, handle: Handle) -> None:
        self._handles.discard(handle)

    def close(self) -> None:
        self._handles.clear()
        self._peers.clear()
        self._fabric.buffers.pop(self.agent_name, None)
