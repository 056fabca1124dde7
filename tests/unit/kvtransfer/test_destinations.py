"""Peers that receive from us, hello by hello."""

from msgspec.structs import replace

from kvtransfer.destinations import Destinations, PeerServer
from kvtransfer.handshake import PEER_VERSION
from kvtransfer.machine import TransferMachine
from kvtransfer.movers.base import Region
from kvtransfer.movers.loopback import LoopbackFabric, LoopbackMover
from kvtransfer.peer_messages import PeerHello, PeerMessage, PeerRefused
from tests.unit.kvtransfer.cluster import GEOMETRY, SLOT_BYTES, limits

OURS = PeerHello(PEER_VERSION, 50, None, "loopback/cpu", GEOMETRY, 2, SLOT_BYTES, "ours", b"ours", 0, 0)


def theirs(epoch: int) -> PeerHello:
    name = f"theirs-{epoch}"
    return replace(OURS, epoch=epoch, expected_epoch=50, agent_name=name, agent_metadata=name.encode())


class Frames(PeerServer):
    """A server without a socket: what arrives is put there, what is said is kept."""

    def __init__(self) -> None:
        self.arrived: list[tuple[bytes, list[PeerMessage]]] = []
        self.said: list[tuple[bytes, PeerMessage]] = []

    def receive(self) -> list[tuple[bytes, list[PeerMessage]]]:  # type: ignore[override]
        arrived, self.arrived = self.arrived, []
        return arrived

    def send(self, peer: bytes, messages: list[PeerMessage]) -> bool:
        self.said += [(peer, message) for message in messages]
        return True


def scene() -> tuple[Destinations, Frames]:
    frames = Frames()
    mover = LoopbackMover(LoopbackFabric(), "ours", memoryview(bytearray(2 * SLOT_BYTES)))
    mover.register(Region(0, 2 * SLOT_BYTES))
    machine = TransferMachine(limits(2))
    return Destinations(frames, machine, mover, 50, lambda epoch: OURS, False, 5.0, 0.5), frames


def test_a_connection_speaks_for_one_life_only() -> None:
    """A hello that is heard again, from a life before, must not take the connection of the present one: what
    is written for it would then go into the memory of the dead."""
    destinations, frames = scene()
    frames.arrived = [(b"a", [theirs(2)])]
    destinations.receive(0.0)
    assert destinations.agent(2) == "theirs-2" and frames.said == [(b"a", OURS)]
    frames.arrived = [(b"a", [theirs(1)])]
    destinations.receive(1.0)
    assert len(destinations) == 0 and destinations.agent(1) is None
    [(_, refused)] = frames.said[1:]
    assert isinstance(refused, PeerRefused) and "another life" in refused.reason
    frames.arrived = [(b"b", [theirs(2)])]
    destinations.receive(2.0)
    assert destinations.agent(2) == "theirs-2" and len(destinations) == 1


def test_the_same_hello_again_changes_nothing() -> None:
    destinations, frames = scene()
    frames.arrived = [(b"a", [theirs(2), theirs(2)])]
    destinations.receive(0.0)
    assert len(destinations) == 1 and frames.said == [(b"a", OURS), (b"a", OURS)]
