"""The network: `Server` and `Link` as kvtransfer.net.channel has them, with frames that travel in virtual
time.

It behaves as ZMQ over one stream each: frames keep their order within a connection and are lost with it; what
a link has not sent waits for the next connection, which is a new peer to the server. A partition holds frames
back. Frames are encoded and decoded by the shipped codecs, so damage is damage of bytes.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import zmq

from kvtransfer.net.channel import FRAMES_PER_RECEIVE, HIGH_WATER_FRAMES, DropReport, decode_frame
from kvtransfer.net.codec import Codec
from tests.sim.kernel import Process, Violation, World

RECONNECT_S = 0.02
MONITOR_FRAMES = [int(zmq.EVENT_DISCONNECTED).to_bytes(2, "little") + bytes(4), b""]


class Socket:
    """What is asked of a ZMQ socket beside frames: its descriptor, and a monitor of its connection."""

    def __init__(self, descriptor: int, readable: Callable[[], bool]) -> None:
        self.number, self._readable = descriptor, readable
        self.monitor: Socket | None = None
        self.monitored: Socket | None = None
        self.disconnects = 0
        self.closed = False

    def getsockopt(self, option: int) -> int:
        if option == zmq.FD:
            return self.number
        return int(zmq.POLLIN) if self._readable() else 0

    def poll(self, timeout_ms: int) -> int:
        return int(self._readable())

    def get_monitor_socket(self, events: int) -> "Socket":
        self.monitor = Socket(self.number + 1, lambda: self.disconnects > 0)
        self.monitor.monitored = self
        return self.monitor

    def recv_multipart(self, flags: int) -> list[bytes]:
        """Of a monitor: the end of one connection."""
        if self.monitored is not None:
            self.monitored.disconnects -= 1
        return MONITOR_FRAMES

    def disable_monitor(self) -> None:
        if self.monitor is not None:
            self.monitor.closed = True
        self.monitor = None
        self.disconnects = 0

    def close(self, linger: int = 0) -> None:
        pass


@dataclass(eq=False)
class Connection:
    """One connection of a link to a server. `up` and `down` are what is on the way."""

    link: "Link"
    server: "Server"
    identity: bytes
    up: deque[bytes] = field(default_factory=deque)
    down: deque[bytes] = field(default_factory=deque)
    open: bool = True
    slow_until_s: float = 0.0
    clear_s: dict[bool, float] = field(default_factory=lambda: {True: 0.0, False: 0.0})
    """When the last frame of each direction arrives."""


class Server:
    def __init__(
        self, network: "Network", endpoint: str, receives: Codec[Any], sends: Codec[Any], on_drop: DropReport
    ) -> None:
        self.network, self.endpoint = network, endpoint
        self.owner = network.owner()
        self._receives, self._sends, self._on_drop = receives, sends, on_drop
        self.inbox: deque[tuple[bytes, bytes]] = deque()
        self.connections: dict[bytes, Connection] = {}
        self.socket = Socket(network.descriptor(), lambda: bool(self.inbox))
        network.bind(self)

    def receive(self) -> list[tuple[bytes, list[Any]]]:
        arrived: list[tuple[bytes, list[Any]]] = []
        for _ in range(FRAMES_PER_RECEIVE):
            if not self.inbox:
                break
            peer, frame = self.inbox.popleft()
            messages = decode_frame(self._receives, [frame], self._on_drop, self._on_drop)
            if messages is not None:
                arrived.append((peer, messages))
        return arrived

    def send(self, peer: bytes, messages: list[Any]) -> bool:
        connection = self.connections.get(peer)
        if connection is None:
            return False
        self.owner.about_to_send()
        return self.network.send(connection, False, self._sends.encode(messages), messages)

    def close(self) -> None:
        self.network.unbind(self)


class Link:
    def __init__(
        self, network: "Network", endpoint: str, receives: Codec[Any], sends: Codec[Any], on_drop: DropReport
    ) -> None:
        self.network, self.endpoint = network, endpoint
        self.owner = network.owner()
        self.mismatch = ""
        self._receives, self._sends, self._on_drop = receives, sends, on_drop
        self.inbox: deque[bytes] = deque()
        self.unsent: deque[tuple[bytes, list[Any]]] = deque()
        self.connection: Connection | None = None
        self.closed = False
        self.socket = Socket(network.descriptor(), lambda: bool(self.inbox))
        network.connect(self)

    def pending(self) -> bool:
        return bool(self.inbox)

    def receive(self) -> list[Any]:
        arrived: list[Any] = []
        for _ in range(FRAMES_PER_RECEIVE):
            if not self.inbox:
                break
            frame = self.inbox.popleft()
            messages = decode_frame(self._receives, [frame], self._on_drop, self._note_mismatch)
            if messages is not None:
                arrived.extend(messages)
        return arrived

    def send(self, messages: list[Any]) -> bool:
        frame = self._sends.encode(messages)
        self.owner.about_to_send()
        if self.connection is not None:
            return self.network.send(self.connection, True, frame, messages)
        self.unsent.append((frame, messages))
        return True

    def _note_mismatch(self, what: str) -> None:
        self.mismatch = what

    def close(self) -> None:
        self.closed = True
        if self.connection is not None:
            self.network.disconnect(self.connection)
        self.inbox.clear()
        self.network.forget(self)


def _direct(frame: bytes, connection: Connection, upward: bool) -> list[bytes]:
    return [frame]


class Network:
    """`damage(frame, connection, upward)` says what arrives for one frame: itself, nothing, more, or other
    bytes. `latency_s` is sampled for each frame between the two bounds."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.latency_s = (0.0001, 0.002)
        self.damage: Callable[[bytes, Connection, bool], list[bytes]] = _direct
        self.servers: dict[str, Server] = {}
        self.homes: dict[str, Process] = {}
        """Who listened last at an endpoint."""
        self.connections: dict[bytes, Connection] = {}
        self.partitions: dict[frozenset[str], float] = {}
        """Until when two processes cannot reach each other."""
        self._waiting: list[Link] = []
        self.links: list[Link] = []
        self._descriptors = 8
        self._identities = 0

    # ------------------------------------------------------------ made in a process's turn

    def owner(self) -> Process:
        if self.world.running is None:
            raise Violation("a socket is made outside of a process")
        return self.world.running

    def descriptor(self) -> int:
        self._descriptors += 2
        return self._descriptors

    def bind(self, server: Server) -> None:
        self.servers[server.endpoint] = server
        self.homes[server.endpoint] = server.owner
        for link in [link for link in self._waiting if link.endpoint == server.endpoint]:
            self._waiting.remove(link)
            self._try_soon(link)

    def unbind(self, server: Server) -> None:
        if self.servers.get(server.endpoint) is server:
            del self.servers[server.endpoint]
        for connection in list(server.connections.values()):
            self.disconnect(connection)

    def connect(self, link: Link) -> None:
        self.links.append(link)
        self._try(link)

    def forget(self, link: Link) -> None:
        if link in self.links:
            self.links.remove(link)
        if link in self._waiting:
            self._waiting.remove(link)

    # ------------------------------------------------------------ frames

    def send(self, connection: Connection, upward: bool, frame: bytes, messages: list[Any]) -> bool:
        sender = connection.link.owner if upward else connection.server.owner
        queue = connection.up if upward else connection.down
        if len(queue) >= HIGH_WATER_FRAMES:
            return False
        receiver = connection.server.owner if upward else connection.link.owner
        self.world.log.append((self.world.now_s, sender.name, receiver.name, messages))
        queue.append(frame)
        delay_s = self.world.rng.uniform(*self.latency_s)
        if self.world.now_s < connection.slow_until_s:
            delay_s *= 300
        arrival_s = max(self.world.now_s + delay_s, connection.clear_s[upward])
        connection.clear_s[upward] = arrival_s
        self.world.at(arrival_s, lambda: self._arrive(connection, upward))
        return True

    def _arrive(self, connection: Connection, upward: bool) -> None:
        queue = connection.up if upward else connection.down
        if not connection.open or not queue:
            return
        until_s = self.parted_until_s(connection.link.owner, connection.server.owner)
        if until_s > self.world.now_s:
            connection.clear_s[upward] = max(connection.clear_s[upward], until_s)
            self.world.at(until_s, lambda: self._arrive(connection, upward))
            return
        self._deliver(connection, upward, queue.popleft())

    def _deliver(self, connection: Connection, upward: bool, frame: bytes) -> None:
        end = connection.server if upward else connection.link
        for arrived in self.damage(frame, connection, upward):
            if upward:
                connection.server.inbox.append((connection.identity, arrived))
            else:
                connection.link.inbox.append(arrived)
        if len(end.inbox) > HIGH_WATER_FRAMES:
            raise Violation(f"{len(end.inbox)} frames wait at {end.owner.name}")
        end.owner.wake()

    # ------------------------------------------------------------ connections

    def parted_until_s(self, one: Process, other: Process) -> float:
        return self.partitions.get(frozenset((one.name, other.name)), 0.0)

    def part(self, one: str, other: str, seconds: float) -> None:
        self.partitions[frozenset((one, other))] = self.world.now_s + seconds

    def heal(self) -> None:
        """Everybody reaches everybody, and what was held back arrives."""
        self.partitions.clear()
        for connection in self.connections.values():
            connection.slow_until_s = 0.0
            for upward, queue in ((True, connection.up), (False, connection.down)):
                connection.clear_s[upward] = 0.0
                for _ in queue:
                    self.world.after(0.0, partial(self._arrive, connection, upward))
        for link in self.links:
            self._try_soon(link)

    def disconnect(self, connection: Connection, delivered: bool = False) -> None:
        """The connection breaks: what is on the way is lost, but for some that has arrived unseen."""
        if not connection.open:
            return
        for upward, queue in ((True, connection.up), (False, connection.down)):
            receiver = connection.server.owner if upward else connection.link.owner
            if delivered and receiver.alive:
                for _ in range(self.world.rng.randint(0, len(queue))):
                    self._deliver(connection, upward, queue.popleft())
        connection.open = False
        connection.up.clear()
        connection.down.clear()
        del self.connections[connection.identity]
        del connection.server.connections[connection.identity]
        link = connection.link
        link.connection = None
        if link.owner.alive and not link.closed:
            if link.socket.monitor is not None:
                link.socket.disconnects += 1
                link.owner.wake()
            self._try_soon(link)

    def gone(self, process: Process) -> None:
        """The process is dead: its servers and links are gone, and what others sent to it."""
        for connection in list(self.connections.values()):
            if process in (connection.link.owner, connection.server.owner):
                self.disconnect(connection, delivered=True)
        for server in [one for one in self.servers.values() if one.owner is process]:
            self.unbind(server)
        for link in [one for one in self.links if one.owner is process]:
            link.closed = True
            self.forget(link)

    def _try_soon(self, link: Link) -> None:
        self.world.after(self.world.rng.uniform(0.5, 2.0) * RECONNECT_S, lambda: self._try(link))

    def _try(self, link: Link) -> None:
        if link.closed or link.connection is not None:
            return
        server = self.servers.get(link.endpoint)
        if server is None:
            if link not in self._waiting:
                self._waiting.append(link)
            return
        until_s = self.parted_until_s(link.owner, server.owner)
        if until_s > self.world.now_s:
            self.world.at(until_s, lambda: self._try(link))
            return
        self._identities += 1
        identity = self._identities.to_bytes(5, "big")
        connection = Connection(link, server, identity)
        link.connection = server.connections[identity] = self.connections[identity] = connection
        while link.unsent:
            self.send(connection, True, *link.unsent.popleft())
