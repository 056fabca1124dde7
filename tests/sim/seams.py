"""Where shipped code meets the outside: for the time of a simulation its sockets, memory, movers and clock
are the world's. Nothing else of it is replaced."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import kvtransfer.client
import kvtransfer.peers.sources
import kvtransfer.process
import kvtransfer.stats
import services.protocol.client
import services.protocol.connection
import services.protocol.frame_server
import services.worker
from kvtransfer.buffer.region import Region
from kvtransfer.client import TransferClient
from kvtransfer.config import TransferConfig
from kvtransfer.errors import TransferConfigError
from tests.sim.fabric import Fabric, SimMover
from tests.sim.kernel import World
from tests.sim.network import Link, Network, Server


class SimTransferClient(TransferClient):
    """Attaches in the worker's turns, not in its constructor: there is no thread that could wait there."""

    def _attach_within(self, timeout_s: float) -> None:
        """`tick` asks."""


class Mapping(bytearray):
    """A staging buffer, as both of its processes see it. It lives as long as somebody looks at it."""

    def close(self) -> None:
        """Nothing is mapped."""


class SimStaging:
    """Its `fd` is the buffer itself, for the door to hand out."""

    cuda_ipc_handle = None

    def __init__(self, byte_count: int) -> None:
        self.fd = Mapping(byte_count)
        self.region = Region(0, byte_count)

    def resident_bytes(self) -> int:
        return len(self.fd)

    def close(self) -> None:
        """See `Mapping`."""


class SimStagingServer:
    def __init__(self, buffers: dict[str, Mapping], path: Path, fd: Mapping) -> None:
        self._buffers, self._path = buffers, str(path)
        buffers[self._path] = fd

    def fileno(self) -> int:
        return -1

    def serve(self) -> None:
        """Whoever maps the buffer finds it in `buffers`."""

    def close(self) -> None:
        self._buffers.pop(self._path, None)


class SimProbe:
    def __init__(self, network: Network, endpoint: str) -> None:
        self._network, self._endpoint = network, endpoint
        self._asking = network.owner()

    def proves_death(self) -> bool:
        home = self._network.homes.get(self._endpoint)
        if home is not None and self._network.parted_until_s(self._asking, home) > self._network.world.now_s:
            return False
        return self._endpoint not in self._network.servers

    def close(self) -> None:
        """Nothing is held."""


class Seams:
    """`buffers` are the staging buffers, by the path of the socket that hands each out."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.network = Network(world)
        self.fabric = Fabric(world, self.network.parted_until_s)
        self.buffers: dict[str, Mapping] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        clock = SimpleNamespace(monotonic=self.world.clock_s, sleep=self.world.sleep)
        process_info = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
        replaced: list[tuple[Any, str, Any]] = [
            (kvtransfer.process, "Server", self._server),
            (kvtransfer.process, "HostStaging", SimStaging),
            (kvtransfer.process, "select_mover", self._mover),
            (kvtransfer.process, "StagingSocketServer", partial(SimStagingServer, self.buffers)),
            (kvtransfer.stats, "psutil", SimpleNamespace(Process=lambda: process_info)),
            (kvtransfer.process, "secrets", SimpleNamespace(randbelow=self.world.rng.randrange)),
            (kvtransfer.peers.sources, "secrets", SimpleNamespace(randbelow=self.world.rng.randrange)),
            (kvtransfer.process, "time", clock),
            (kvtransfer.stats, "os", SimpleNamespace(getpid=lambda: 1)),
            (kvtransfer.peers.sources, "Link", self._link),
            (kvtransfer.peers.sources, "IncarnationProbe", partial(SimProbe, self.network)),
            (kvtransfer.client, "Link", self._link),
            (kvtransfer.client, "receive_staging", self._receive_staging),
            (services.protocol.frame_server, "FrameServer", self._server),
            (services.worker, "time", clock),
            (services.worker, "os", SimpleNamespace(getpid=lambda: 1)),
            (services.protocol.client, "open_connection", services.protocol.connection.ZmqConnection),
            (services.protocol.connection, "Link", self._link),
        ]
        with ExitStack() as stack:
            for owner, name, value in replaced:
                stack.enter_context(patch.object(owner, name, value))
            yield

    # ------------------------------------------------------------ what stands in for what

    def _server(
        self,
        endpoint: str,
        receives: Any,
        sends: Any,
        *,
        keys: Any = None,
        on_drop: Any,
        refusal: Any = None,
        on_bad: Any = None,
        on_end: Any = None,
    ) -> Server:
        return Server(self.network, endpoint, receives, sends, on_drop)

    def _link(
        self,
        endpoint: str,
        receives: Any,
        sends: Any,
        *,
        keys: Any = None,
        on_drop: Any,
        on_bad: Any = None,
    ) -> Link:
        return Link(self.network, endpoint, receives, sends, on_drop)

    def _mover(self, config: TransferConfig, agent_name: str, device: None, ipc_handle: None) -> SimMover:
        return SimMover(self.fabric, agent_name, config.slots * config.slot_bytes, config.slot_bytes)

    def _receive_staging(self, path: Path, byte_count: int, timeout_s: float) -> Mapping:
        found = self.buffers.get(str(path))
        if found is None:
            raise TransferConfigError(f"staging_socket {path}: nobody hands out a buffer")
        return found
