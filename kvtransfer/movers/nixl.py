"""The mover `nixl`: NIXL over UCX (RDMA, TCP, shared memory, NVLink), for host and device memory.

It uses the native binding, not its Python wrapper: the wrapper fixes the progress thread's pause at 0, which
spins a whole core for each agent. Two flavours of the binding must never be loaded in one process.
"""

import importlib.util
import logging
import os
from collections.abc import MutableMapping
from typing import Any

from kvtransfer.buffer.region import Region
from kvtransfer.errors import MoverError, MoverUnavailable, PeerLostError
from kvtransfer.movers.base import Handle, PieceOfWrite, Progress
from kvtransfer.movers.spec import HostFacts, MoverSetup, MoverSpec

log = logging.getLogger(__name__)

PROGRESS_PAUSE_US = 100
HOST_ENVIRONMENT = {"UCX_TLS": "tcp,cma,self", "UCX_NET_DEVICES": "lo"}


def prepare_environment(environment: MutableMapping[str, str], *, same_host: bool) -> None:
    """Sets UCX's transports for host memory, unless the user has chosen: left alone it would also listen on
    the machine's outward address, and shared memory without `tcp` cannot notice a peer's death."""
    if not same_host:
        return
    for name, value in HOST_ENVIRONMENT.items():
        if name not in environment:
            environment[name] = value
            log.info("%s=%s (not set; set it to choose otherwise)", name, value)


class NixlMover:
    """A `Mover` over one NIXL agent. `agent_name` must never have been used before by any
    incarnation.

    `same_host` restricts UCX to what works inside one machine. Raises MoverUnavailable if the library or
    its UCX backend cannot be used here.
    """

    name = "nixl"
    quick = False

    def __init__(self, agent_name: str, *, same_host: bool) -> None:
        self.agent_name = agent_name
        prepare_environment(os.environ, same_host=same_host)
        try:
            import nixl_cu13._bindings as native
        except ImportError as error:
            raise MoverUnavailable(f"--mover nixl: nixl-cu13 cannot be loaded: {error}") from error
        self._native: Any = native
        config = native.nixlAgentConfig()
        config.useProgThread = True
        config.useListenThread = False  # Its listener would bind every interface.
        config.pthrDelay = PROGRESS_PAUSE_US
        config.syncMode = native.NIXL_THREAD_SYNC_NONE
        config.captureTelemetry = False
        try:
            self._agent: Any = native.nixlAgent(agent_name, config)
            self._backend = self._agent.createBackend("UCX", {})
        except Exception as error:  # The binding's errors have no common base but Exception.
            raise MoverUnavailable(f"--mover nixl: no UCX backend here: {error!r}") from error
        self._region: Region | None = None
        self._registered: Any = None
        self._peers: dict[str, Region] = {}
        self._handles: set[Handle] = set()

    def register(self, region: Region) -> None:
        native = self._native
        kind = native.VRAM_SEG if region.on_device else native.DRAM_SEG
        place = (region.address, region.byte_count, region.device_id, "")
        self._registered = native.nixlRegDList(kind, [place])
        try:
            self._agent.registerMem(self._registered, [self._backend])
        except Exception as error:
            raise MoverError(f"the staging buffer cannot be registered: {error!r}") from error
        self._region = region

    def metadata(self) -> bytes:
        return bytes(self._agent.getLocalMD())

    def add_peer(self, peer: str, metadata: bytes, region: Region) -> None:
        if peer in self._peers:
            return
        try:
            loaded = self._agent.loadRemoteMD(metadata)
        except Exception as error:
            raise MoverError(f"the description of {peer} cannot be used: {error!r}") from error
        if loaded != peer.encode():
            self._forget(loaded.decode(errors="replace"))
            raise MoverError(f"the description of {peer} is of another agent")
        self._peers[peer] = region

    def remove_peer(self, peer: str) -> None:
        if self._peers.pop(peer, None) is not None:
            self._forget(peer)

    def post(self, peer: str, pieces: list[PieceOfWrite]) -> Handle:
        native, ours, theirs = self._native, self._region, self._peers.get(peer)
        if ours is None or theirs is None:
            raise MoverError(f"unknown peer {peer}")
        local = [(ours.address + p.local_offset, p.byte_count, ours.device_id) for p in pieces]
        remote = [(theirs.address + p.remote_offset, p.byte_count, theirs.device_id) for p in pieces]
        local_kind = native.VRAM_SEG if ours.on_device else native.DRAM_SEG
        remote_kind = native.VRAM_SEG if theirs.on_device else native.DRAM_SEG
        handle: Handle | None = None
        try:
            handle = self._agent.createXferReq(
                native.NIXL_WRITE,
                native.nixlXferDList(local_kind, local),
                native.nixlXferDList(remote_kind, remote),
                peer,
                "",
                [self._backend],
            )
            self._agent.postXferReq(handle, "")
        except Exception as error:
            if handle is not None:
                self._handles.add(handle)
                self.release(handle)
            lost = isinstance(error, native.nixlRemoteDisconnectError)
            raise (PeerLostError if lost else MoverError)(f"write to {peer}: {error!r}") from error
        self._handles.add(handle)
        return handle

    def poll(self, handle: Handle) -> Progress:
        try:
            status = self._agent.getXferStatus(handle)
        except Exception as error:
            log.warning("write %d failed: %r", handle, error)
            return Progress.FAILED
        return Progress.PENDING if status == self._native.NIXL_IN_PROG else Progress.DONE

    def release(self, handle: Handle) -> None:
        if handle not in self._handles:
            return
        self._handles.discard(handle)
        try:
            self._agent.releaseXferReq(handle)
        except Exception as error:
            log.warning("write %d cannot be released: %r", handle, error)

    def close(self) -> None:
        for handle in list(self._handles):
            self.release(handle)
        for peer in list(self._peers):
            self.remove_peer(peer)
        if self._registered is not None:
            try:
                self._agent.deregisterMem(self._registered, [self._backend])
            except Exception as error:
                log.warning("the staging buffer cannot be deregistered: %r", error)
            self._registered = None
        self._agent = None

    def _forget(self, agent: str) -> None:
        try:
            self._agent.invalidateRemoteMD(agent)
        except Exception as error:
            log.warning("peer %s cannot be removed: %r", agent, error)


def missing() -> str | None:
    """Looks only whether the package is there: to load it is to choose it, and what fails then gives the
    reason."""
    if importlib.util.find_spec("nixl_cu13") is None:
        return "the package nixl-cu13 is not installed"
    return None


def slow_network(facts: HostFacts) -> str | None:
    if facts.device == "cpu" or facts.same_host or facts.rdma_cards:
        return None
    return (
        "no RDMA card is visible (/sys/class/infiniband is empty): NIXL moves KV over TCP and through host "
        "memory, far slower than cards would; in a container pass /dev/infiniband in"
    )


def build(setup: MoverSetup) -> NixlMover:
    # Peers of host memory on this host: keep it off every network card.
    return NixlMover(setup.agent_name, same_host=setup.same_host and setup.device is None)


MOVER = MoverSpec(name=NixlMover.name, preference=20, missing=missing, drawback=slow_network, build=build)
