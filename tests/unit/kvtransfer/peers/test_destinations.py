"""Peers that receive from us, hello by hello."""

from msgspec.structs import replace

from kvtransfer.buffer.region import Region
from kvtransfer.messages import OpenSend, SendConfirmed, SendGranted, SlotUse
from kvtransfer.movers.loopback import LoopbackFabric, LoopbackMover
from kvtransfer.peers.destinations import TWO_HELLOS, Destinations, PeerServer
from kvtransfer.peers.handshake import PEER_VERSION
from kvtransfer.protocol.machine import TransferMachine
from kvtransfer.protocol.peer_messages import (
    Closed,
    Grant,
    Offer,
    PeerConnection,
    PeerHello,
    PeerMessage,
    PeerRefused,
)
from tests.unit.kvtransfer.cluster import GEOMETRY, SLOT_BYTES, limits

OURS = PeerHello(PEER_VERSION, 50, None, "loopback/cpu", GEOMETRY, 2, SLOT_BYTES, "ours", b"ours", 0, 0)
FIRST, SECOND = PeerConnection(11), PeerConnection(22)


def theirs(epoch: int) -> PeerHello:
    name = f"theirs-{epoch}"
    return replace(OURS, epoch=epoch, expected_epoch=50, agent_name=name, agent_metadata=name.encode())


class Frames(PeerServer):
    """A server without a socket: what arrives is put there, what is sent is kept."""

    def __init__(self) -> None:
        self.arrived: list[tuple[bytes, list[PeerMessage]]] = []
        self.sent: list[tuple[bytes, list[PeerMessage]]] = []

    def receive(self) -> list[tuple[bytes, list[PeerMessage]]]:  # type: ignore[override]
        arrived, self.arrived = self.arrived, []
        return arrived

    def send(self, peer: bytes, messages: list[PeerMessage]) -> bool:
        self.sent.append((peer, messages))
        return True


def scene() -> tuple[Destinations, Frames]:
    frames = Frames()
    mover = LoopbackMover(LoopbackFabric(), "ours", memoryview(bytearray(2 * SLOT_BYTES)))
    mover.register(Region(0, 2 * SLOT_BYTES))
    machine = TransferMachine(limits(2))
    return Destinations(frames, machine, mover, 50, lambda epoch: OURS, False, 5.0, 0.5), frames


def test_a_connection_speaks_for_one_life_only() -> None:
    """A hello that arrives again, from an earlier incarnation, must not take the connection of the present
    one: what is written for it would then go into the memory of the dead."""
    destinations, frames = scene()
    frames.arrived = [(b"a", [FIRST, theirs(2)])]
    destinations.receive(0.0)
    assert destinations.agent(2) == "theirs-2" and frames.sent == [(b"a", [FIRST, OURS])]
    frames.arrived = [(b"a", [SECOND, theirs(1)])]
    destinations.receive(1.0)
    assert len(destinations) == 0 and destinations.agent(1) is None
    refused = PeerRefused(TWO_HELLOS)
    assert frames.sent[1:] == [(b"a", [FIRST, refused]), (b"a", [SECOND, refused])]
    frames.arrived = [(b"b", [SECOND, theirs(2)])]
    destinations.receive(2.0)
    assert destinations.agent(2) == "theirs-2" and len(destinations) == 1


def test_the_same_hello_again_changes_nothing() -> None:
    destinations, frames = scene()
    frames.arrived = [(b"a", [FIRST, theirs(2), theirs(2)])]
    destinations.receive(0.0)
    assert len(destinations) == 1 and frames.sent == [(b"a", [FIRST, OURS])] * 2


def test_what_was_said_on_another_connection_is_dropped() -> None:
    """An offer and its grant that arrive again, when the incarnation that made them has ended: the transfer
    may be waiting for its next offer, and the slot be somebody else's in the same generation."""
    destinations, frames = scene()
    machine = destinations._machine
    machine.on_command(OpenSend(7, 60.0), 0.0)
    offer: list[PeerMessage] = [Offer(7, 0, 8), Grant(7, [SlotUse(0, 1)])]
    frames.arrived = [(b"b", [SECOND, theirs(3)]), (b"b", [FIRST, *offer])]
    destinations.receive(0.0)
    assert not machine.outbox.to_worker and machine.outbox.drops["other_connection"] == 2
    frames.arrived = [(b"b", [SECOND, *offer])]
    destinations.receive(0.0)
    assert [type(event) for event in machine.outbox.to_worker] == [SendConfirmed, SendGranted]


def test_a_stranger_is_answered_on_its_own_connection() -> None:
    destinations, frames = scene()
    frames.arrived = [(b"a", [SECOND, Closed(1)])]
    destinations.receive(0.0)
    assert frames.sent == [(b"a", [SECOND, PeerRefused("send hello first")])]
