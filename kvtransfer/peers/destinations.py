"""The peers that receive from this process: they connect and greet, and are watched until they are lost.

    UNKNOWN connection → PeerHello fits → GREETED → silent, unreachable or replaced → forgotten

What comes from another connection than the one that its peer greeted on is dropped. A peer's region stays
known to the mover until no write to it is in flight.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from kvtransfer.buffer.region import Region
from kvtransfer.errors import MoverError, ProtocolError
from kvtransfer.movers.base import Mover, two_sided
from kvtransfer.net.channel import Server
from kvtransfer.peers.handshake import mismatch
from kvtransfer.protocol.machine import TransferMachine
from kvtransfer.protocol.outbox import Destination
from kvtransfer.protocol.peer_messages import (
    MoverNote,
    PeerConnection,
    PeerHello,
    PeerMessage,
    PeerPing,
    PeerRefused,
)

log = logging.getLogger(__name__)

TWO_HELLOS = "this connection was greeted on in two ways"

PeerServer = Server[PeerMessage, PeerMessage]


@dataclass(slots=True)
class _Peer:
    identity: bytes
    connection: PeerConnection
    hello: PeerHello
    received_at_s: float
    sent_at_s: float


class Destinations:
    """The table of connected destinations, by epoch. `hello(None)` gives this process's own hello, or None
    while no worker is attached."""

    def __init__(
        self,
        server: PeerServer,
        machine: TransferMachine,
        mover: Mover,
        epoch: int,
        hello: Callable[[int | None], PeerHello | None],
        on_device: bool,
        peer_timeout_s: float,
        heartbeat_s: float,
    ) -> None:
        self._server, self._machine, self._mover, self._hello = server, machine, mover, hello
        self._epoch, self._on_device = epoch, on_device
        self._two_sided = two_sided(mover)
        self._peer_timeout_s, self._heartbeat_s = peer_timeout_s, heartbeat_s
        self._by_identity: dict[bytes, _Peer] = {}
        self._by_epoch: dict[Destination, _Peer] = {}
        self._leaving: dict[Destination, str] = {}
        """Lost peers by epoch, with their agents: the mover forgets them once nothing is in flight."""

    def __len__(self) -> int:
        return len(self._by_epoch)

    def agent(self, destination: Destination) -> str | None:
        """The mover's name for a connected peer."""
        peer = self._by_epoch.get(destination)
        return None if peer is None else peer.hello.agent_name

    def slot_bytes(self, destination: Destination) -> int | None:
        """The size of a connected peer's slots."""
        peer = self._by_epoch.get(destination)
        return None if peer is None else peer.hello.slot_bytes

    def receive(self, now_s: float) -> None:
        for identity, (connection, *messages) in self._server.receive():
            if not isinstance(connection, PeerConnection):
                raise ProtocolError("the codec lets no frame pass that does not begin with its connection")
            for message in messages:
                peer = self._by_identity.get(identity)
                if isinstance(message, PeerHello):
                    self._greet(identity, connection, message, now_s)
                elif peer is None:
                    self._machine.outbox.drops["peer_before_hello"] += 1
                    self._server.send(identity, [connection, PeerRefused("send hello first")])
                    break
                elif peer.connection != connection:
                    self._machine.outbox.drops["other_connection"] += 1
                else:
                    peer.received_at_s = now_s
                    if not isinstance(message, PeerPing):
                        epoch = peer.hello.epoch
                        self._machine.on_destination(epoch, message, peer.hello.slots, now_s)

    def send(self, destination: Destination, messages: list[PeerMessage], now_s: float) -> None:
        peer = self._by_epoch.get(destination)
        if peer is None:
            self._machine.outbox.drops["to_lost_peer"] += len(messages)
        elif self._server.send(peer.identity, [peer.connection, *messages]):
            peer.sent_at_s = now_s
        else:
            self.lose(destination, "its connection is gone", now_s)

    def send_notes(self, now_s: float) -> None:
        """Sends the mover's notes, before any message about the same writes."""
        if self._two_sided is None:
            return
        for agent, note in self._two_sided.notes():
            destination = self._named(agent)
            if destination is not None:
                self.send(destination, [MoverNote(note)], now_s)

    def tick(self, now_s: float) -> None:
        """Sends heartbeats, loses silent peers, and removes lost ones from the mover."""
        for agent, fault in [] if self._two_sided is None else self._two_sided.faults():
            destination = self._named(agent)
            if destination is not None:
                self._dismiss(destination, f"mover: {fault}"[:1000], now_s)
        for destination, peer in list(self._by_epoch.items()):
            if now_s - peer.received_at_s >= self._peer_timeout_s:
                self.lose(destination, f"silent for {self._peer_timeout_s} s", now_s)
            elif now_s - peer.sent_at_s >= self._heartbeat_s:
                self.send(destination, [PeerPing(self._epoch)], now_s)
        for destination, agent in list(self._leaving.items()):
            if not self._machine.sender.uses(destination):
                del self._leaving[destination]
                self._mover.remove_peer(agent)

    def next_deadline_s(self) -> float | None:
        return min(
            (
                min(p.sent_at_s + self._heartbeat_s, p.received_at_s + self._peer_timeout_s)
                for p in self._by_epoch.values()
            ),
            default=None,
        )

    def lose(self, destination: Destination, reason: str, now_s: float) -> None:
        peer = self._by_epoch.pop(destination, None)
        if peer is None:
            return
        log.warning("peer %s lost: %s", peer.hello.agent_name, reason)
        del self._by_identity[peer.identity]
        self._leaving[destination] = peer.hello.agent_name
        if self._two_sided is not None:
            self._two_sided.cut(peer.hello.agent_name)
        self._machine.sender.destination_lost(destination, f"destination lost: {reason}", now_s)

    def lose_all(self, reason: str, now_s: float) -> None:
        for destination in list(self._by_epoch):
            self._dismiss(destination, reason, now_s)

    def _dismiss(self, destination: Destination, reason: str, now_s: float) -> None:
        peer = self._by_epoch[destination]
        self._server.send(peer.identity, [peer.connection, PeerRefused(reason)])
        self.lose(destination, reason, now_s)

    def _named(self, agent: str) -> Destination | None:
        return next((d for d, peer in self._by_epoch.items() if peer.hello.agent_name == agent), None)

    def _greet(self, identity: bytes, connection: PeerConnection, theirs: PeerHello, now_s: float) -> None:
        ours = self._hello(None)
        former = self._by_identity.get(identity)
        if former is not None and (former.connection, former.hello.epoch) != (connection, theirs.epoch):
            # One of the two hellos was sent elsewhere, and nobody knows which. The other end is notified on
            # both connections, and greets again on another one.
            self._dismiss(former.hello.epoch, TWO_HELLOS, now_s)
            self._refuse(identity, connection, theirs, TWO_HELLOS, [])
            return
        if ours is None:
            self._refuse(identity, connection, theirs, "no worker is attached here", [])
            return
        reason = mismatch(ours, theirs)
        if theirs.expected_epoch != ours.epoch:
            reason = "another incarnation was meant"
        if reason is None:
            reason = self._introduce(theirs)
        if reason is not None:
            # Our hello goes first: by it the other side learns that the incarnation it meant has ended.
            self._refuse(identity, connection, theirs, reason, [ours])
            return
        former = self._by_epoch.get(theirs.epoch)
        if former is not None and former.identity != identity:
            self.lose(theirs.epoch, "connected anew", now_s)
        self._leaving.pop(theirs.epoch, None)
        peer = _Peer(identity, connection, theirs, now_s, now_s)
        self._by_identity[identity] = peer
        self._by_epoch[theirs.epoch] = peer
        log.info("peer %s connected, epoch %d", theirs.agent_name, theirs.epoch)
        self._server.send(identity, [connection, ours])

    def _introduce(self, theirs: PeerHello) -> str | None:
        # Host and device memory are different movers to the handshake, so theirs is of our kind.
        size_bytes = theirs.slots * theirs.slot_bytes
        region = Region(theirs.base_address, size_bytes, theirs.device_id, self._on_device)
        try:
            self._mover.add_peer(theirs.agent_name, theirs.agent_metadata, region)
        except MoverError as error:
            return f"mover: {error}"[:1000]
        return None

    def _refuse(
        self,
        identity: bytes,
        connection: PeerConnection,
        theirs: PeerHello,
        reason: str,
        first: list[PeerMessage],
    ) -> None:
        log.warning("peer %s refused: %s", theirs.agent_name, reason)
        self._machine.outbox.drops["peer_refused"] += 1
        self._server.send(identity, [connection, *first, PeerRefused(reason)])
