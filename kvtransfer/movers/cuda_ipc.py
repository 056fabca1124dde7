"""The mover `cuda_ipc`: copies between two staging buffers on the GPUs of one host, by the copy engines.

    register   the staging buffer has been exported by CUDA IPC when it was allocated
    describe   its handle travels to peers with the own GPU's UUID
    prepare    a peer's buffer is mapped into this process; its GPU must be visible here and reachable
    post       one asynchronous copy for each piece, on one of the peer's streams, and one event behind them
    check      the event is queried; within a stream only the oldest one
    release    the event goes back; the mapping stays until the peer is removed

A mapping keeps the memory of a dead peer taken, so a lost peer is removed, and its mapping closed, as soon as
nothing is in flight. Nothing can stop a copy that has been queued. It takes microseconds, whatever becomes
of the peer; a device that does not end it is broken, and the process with it (MoverBroken).
"""

import logging
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec

from kvtransfer.buffer.cuda import CudaError, GpuName
from kvtransfer.buffer.region import Region
from kvtransfer.errors import MoverBroken, MoverError, MoverUnavailable
from kvtransfer.movers.base import Handle, PieceOfWrite, Progress
from kvtransfer.movers.spec import HostFacts, MoverSetup, MoverSpec, needs_device_memory

log = logging.getLogger(__name__)

STREAMS_A_PEER = 2
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
NAMESPACES = ("ipc", "pid")
NIXL_ELSE = "or force NIXL on both sides by --mover nixl"


class IpcDescription(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a peer needs to map this buffer, and to name the reason why it cannot."""

    agent_name: str
    host: str
    namespaces: str
    gpu_uuid: str
    ipc_handle: bytes


class CopyDevice(Protocol):
    """What the mover needs of `kvtransfer.buffer.cuda.CudaDevice`."""

    index: int
    uuid: str

    def visible(self) -> list[GpuName]: ...
    def can_access(self, other_index: int) -> bool: ...
    def import_memory(self, handle: bytes) -> int: ...
    def unmap(self, address: int) -> None: ...
    def mapped_bytes(self, address: int) -> int | None: ...
    def new_stream(self) -> Any: ...
    def drop_stream(self, stream: Any) -> None: ...
    def copy(self, target: int, source: int, byte_count: int, stream: Any) -> None: ...
    def new_event(self) -> Any: ...
    def drop_event(self, event: Any) -> None: ...
    def record(self, event: Any, stream: Any) -> None: ...
    def reached(self, event: Any) -> bool: ...


@dataclass(slots=True)
class _CopyQueue:
    """One stream, with the writes queued on it, which end in order."""

    stream: Any
    handles: deque[Handle] = field(default_factory=deque)


@dataclass(slots=True)
class _IpcPeer:
    address: int
    byte_count: int
    queues: list[_CopyQueue]


@dataclass(slots=True)
class _IpcWrite:
    queue: _CopyQueue
    event: Any
    done: bool = False
    released: bool = False


def this_host() -> str:
    """The id of the running kernel, the same in all of its containers."""
    return BOOT_ID.read_text().strip()


def these_namespaces() -> str:
    """The namespaces that two processes must share for CUDA IPC."""
    return " ".join(str(Path(f"/proc/self/ns/{name}").readlink()) for name in NAMESPACES)


class CudaIpcMover:
    """A `Mover` for device memory within one host. `ipc_handle` is the staging buffer's own."""

    name = "cuda_ipc"
    quick = True

    def __init__(self, agent_name: str, device: CopyDevice, ipc_handle: bytes) -> None:
        self.agent_name = agent_name
        self._device = device
        self._description = IpcDescription(
            agent_name, this_host(), these_namespaces(), device.uuid, ipc_handle
        )
        self._region: Region | None = None
        self._peers: dict[str, _IpcPeer] = {}
        self._posted: dict[Handle, _IpcWrite] = {}
        self._events: list[Any] = []
        self._next_handle = 1

    def register(self, region: Region) -> None:
        if not region.on_device:
            raise MoverError("the staging buffer is not in device memory")
        self._region = region

    def metadata(self) -> bytes:
        return msgspec.msgpack.encode(self._description)

    def add_peer(self, peer: str, metadata: bytes, region: Region) -> None:
        if peer in self._peers:
            return
        try:
            theirs = msgspec.msgpack.decode(metadata, type=IpcDescription)
        except msgspec.MsgspecError as error:
            raise MoverError(f"the description of {peer} cannot be used: {error}") from error
        if theirs.agent_name != peer:
            raise MoverError(f"the description of {peer} is of another agent")
        self._require_reachable(theirs)
        try:
            address = self._device.import_memory(theirs.ipc_handle)
        except CudaError as error:
            why = ""
            if theirs.namespaces != self._description.namespaces:
                why = " (it runs in another container: they have to share IPC and PID namespaces)"
            text = f"cuda_ipc cannot map the buffer of {peer}: {error}{why}; {NIXL_ELSE}"
            raise MoverError(text) from error
        mapped_bytes = self._device.mapped_bytes(address)
        if mapped_bytes is not None and mapped_bytes < region.byte_count:
            self._device.unmap(address)
            raise MoverError(f"the buffer of {peer} has {mapped_bytes} bytes, not {region.byte_count}")
        queues = [_CopyQueue(self._device.new_stream()) for _ in range(STREAMS_A_PEER)]
        self._peers[peer] = _IpcPeer(address, region.byte_count, queues)

    def remove_peer(self, peer: str) -> None:
        """Raises MoverBroken if a copy to it does not end."""
        lost = self._peers.get(peer)
        if lost is None:
            return
        for queue in lost.queues:
            self._advance(queue)
            if queue.handles:
                raise MoverBroken(f"copies to {peer} do not end: the GPU or its link has failed")
        del self._peers[peer]
        try:
            for queue in lost.queues:
                self._device.drop_stream(queue.stream)
            self._device.unmap(lost.address)
        except CudaError as error:
            log.warning("the buffer of %s is not unmapped: %s", peer, error)

    def post(self, peer: str, pieces: list[PieceOfWrite]) -> Handle:
        ours, theirs = self._region, self._peers.get(peer)
        if ours is None or theirs is None:
            raise MoverError(f"unknown peer {peer}")
        for piece in pieces:
            ends = (piece.local_offset + piece.byte_count, piece.remote_offset + piece.byte_count)
            if ends[0] > ours.byte_count or ends[1] > theirs.byte_count:
                raise MoverError("a piece lies outside its region")
        queue = min(theirs.queues, key=lambda candidate: len(candidate.handles))
        try:
            event = self._events.pop() if self._events else self._device.new_event()
            for piece in pieces:
                target, source = theirs.address + piece.remote_offset, ours.address + piece.local_offset
                self._device.copy(target, source, piece.byte_count, queue.stream)
            self._device.record(event, queue.stream)
        except CudaError as error:
            # Some of its copies may be queued, and there is no event behind them.
            raise MoverBroken(f"write to {peer}: {error}") from error
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        self._posted[handle] = _IpcWrite(queue, event)
        queue.handles.append(handle)
        return handle

    def poll(self, handle: Handle) -> Progress:
        posted = self._posted[handle]
        if not posted.done and posted.queue.handles[0] == handle:
            self._advance(posted.queue)
        return Progress.DONE if posted.done else Progress.PENDING

    def release(self, handle: Handle) -> None:
        posted = self._posted.get(handle)
        if posted is None:
            return
        posted.released = True
        if posted.done:
            self._forget(handle)
        # A copy cannot be cancelled: what is pending stays in its queue, for `remove_peer` to see.

    def close(self) -> None:
        for peer in list(self._peers):
            self.remove_peer(peer)
        for event in self._events:
            self._device.drop_event(event)
        self._events.clear()

    def _require_reachable(self, theirs: IpcDescription) -> None:
        peer, ours = theirs.agent_name, self._description
        if theirs.host != ours.host:
            raise MoverError(f"cuda_ipc works inside one host, and {peer} is on another; {NIXL_ELSE}")
        index = next((gpu.index for gpu in self._device.visible() if gpu.uuid == theirs.gpu_uuid), None)
        if index is None:
            raise MoverError(
                f"the GPU of {peer} ({theirs.gpu_uuid}) is not visible to {ours.agent_name}: give both the "
                f"same CUDA_VISIBLE_DEVICES and choose by --device-index; {NIXL_ELSE}"
            )
        if not self._device.can_access(index):
            raise MoverError(
                f"GPU {self._device.index} cannot copy into GPU {index} of {peer} (no peer access); "
                f"{NIXL_ELSE}"
            )

    def _advance(self, queue: _CopyQueue) -> None:
        """Marks what has ended, oldest first, up to the first that has not."""
        while queue.handles:
            posted = self._posted[queue.handles[0]]
            try:
                if not self._device.reached(posted.event):
                    return
            except CudaError as error:
                raise MoverBroken(str(error)) from error
            posted.done = True
            handle = queue.handles.popleft()
            if posted.released:
                self._forget(handle)

    def _forget(self, handle: Handle) -> None:
        self._events.append(self._posted.pop(handle).event)


def unreachable(facts: HostFacts) -> str | None:
    if not facts.unreachable_gpus:
        return None
    gpus = ", ".join(map(str, facts.unreachable_gpus))
    return (
        f"no peer access from this GPU to GPU {gpus}; leave those out of CUDA_VISIBLE_DEVICES, or take "
        "--mover nixl for all"
    )


def build(setup: MoverSetup) -> CudaIpcMover:
    if setup.cuda_ipc_handle is None:
        raise MoverUnavailable("--mover cuda_ipc: the staging buffer has no CUDA IPC handle")
    return CudaIpcMover(setup.agent_name, setup.gpu, setup.cuda_ipc_handle)


MOVER = MoverSpec(
    name=CudaIpcMover.name,
    preference=30,
    automatic=lambda facts: facts.device == "cuda" and facts.same_host,
    why_not=needs_device_memory,
    unreachable=unreachable,
    build=build,
)
