"""Connections to sources: what ends them, and that nobody is woken for nothing."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kvtransfer.codecs import PEER_MESSAGES
from kvtransfer.messages import Aborted, OpenReceive, TransferAddress
from kvtransfer.net.channel import Server
from kvtransfer.peers.handshake import PEER_VERSION
from kvtransfer.peers.sources import SETTLE_S, Sources
from kvtransfer.protocol.machine import TransferMachine
from kvtransfer.protocol.peer_messages import (
    CancelTransfer,
    Closed,
    PeerConnection,
    PeerHello,
    PeerMessage,
    PeerPing,
    PeerRefused,
)
from tests.patience import patient
from tests.unit.kvtransfer.cluster import GEOMETRY, SLOT_BYTES, limits

OURS = PeerHello(PEER_VERSION, 1, None, "nixl/cpu", GEOMETRY, 8, SLOT_BYTES, "ours", b"", 0, 0)
THEIRS = msgspec.structs.replace(OURS, epoch=50, agent_name="theirs")
WAIT_MS = int(patient(20_000))
TIMEOUT_S, HEARTBEAT_S = 5.0, 0.5


class Scene:
    """One receiving side with one opened transfer, and the source's server, played by the test."""

    def __init__(self, directory: Path) -> None:
        self.server: Server[PeerMessage, PeerMessage] = Server(
            f"ipc://{directory}/p", PEER_MESSAGES, PEER_MESSAGES, on_drop=lambda reason: None
        )
        self.address = TransferAddress(self.server.endpoint, 50)
        self.machine = TransferMachine(limits(8))
        self.sockets: list[object] = []
        self.sources = Sources(
            self.machine,
            PEER_MESSAGES,
            None,
            OURS.epoch,
            lambda epoch: msgspec.structs.replace(OURS, expected_epoch=epoch),
            TIMEOUT_S,
            HEARTBEAT_S,
            self.sockets.append,
            self.sockets.remove,
        )
        self.machine.on_command(OpenReceive(1, self.address, 0, 40, 1e6), 0.0)
        self.machine.outbox.connects.clear()
        self.sources.connect(self.address, 0.0)
        self.peer, self.connection = b"", PeerConnection(1)

    def hear(self) -> list[PeerMessage]:
        assert self.server.socket.poll(WAIT_MS)
        received: list[PeerMessage] = []
        for peer, (connection, *messages) in self.server.receive():
            assert isinstance(connection, PeerConnection)
            self.peer, self.connection = peer, connection
            received.extend(messages)
        return received

    def send(self, message: PeerMessage, now_s: float) -> None:
        self.send_at_once([message], now_s)

    def send_at_once(self, messages: list[PeerMessage], now_s: float) -> None:
        """In one frame, on the connection that the last frame came on."""
        assert self.server.send(self.peer, [self.connection, *messages])
        assert self.sources._sources[self.address].link.socket.poll(WAIT_MS)
        self.sources.receive(now_s)

    def ready(self) -> None:
        [hello] = self.hear()
        assert isinstance(hello, PeerHello) and hello.expected_epoch == 50
        self.send(THEIRS, 0.0)
        assert len(self.sources) == 1
        self.machine.settle(0.0)
        assert self.machine.pool.counts().granted == 2

    @property
    def reasons(self) -> list[str]:
        return [event.reason for event in self.machine.outbox.to_worker if isinstance(event, Aborted)]


@pytest.fixture
def scene() -> Iterator[Scene]:
    with tempfile.TemporaryDirectory(prefix="baton-") as directory:
        scene = Scene(Path(directory))
        yield scene
        scene.sources.close()
        scene.server.close()
        assert scene.sockets == []


def test_the_next_deadline_always_lies_ahead(scene: Scene) -> None:
    scene.ready()
    for tenth in range(1, 200):
        now_s = tenth / 10
        scene.sources.tick(now_s)
        deadline_s = scene.sources.next_deadline_s()
        assert deadline_s is not None and deadline_s > now_s


def test_a_source_that_does_not_fit_is_left_alone(scene: Scene) -> None:
    scene.hear()
    scene.send(msgspec.structs.replace(THEIRS, mover="other"), 0.0)
    assert "mover differs" in scene.reasons[0]
    assert scene.sockets == [] and scene.machine.pool.free == 8


def test_silence_loses_it_and_asks_again_for_what_is_quarantined(scene: Scene) -> None:
    scene.ready()
    scene.sources.tick(TIMEOUT_S)
    assert "silent" in scene.reasons[0]
    assert scene.machine.pool.counts().quarantined == 2
    while not any(isinstance(message, PeerHello) for message in scene.hear()):
        pass
    scene.send(THEIRS, 6.0)
    [(_, cancel)] = [
        entry for entry in scene.machine.outbox.to_sources if isinstance(entry[1], CancelTransfer)
    ]
    assert isinstance(cancel, CancelTransfer)
    scene.send(Closed(1), 6.0)
    assert scene.machine.pool.free == 8


def test_heartbeats_keep_it(scene: Scene) -> None:
    scene.ready()
    for second in range(1, 20):
        scene.send(PeerPing(50), float(second))
        scene.sources.tick(float(second))
    assert scene.reasons == []


def test_another_life_at_the_same_address_proves_the_former_over(scene: Scene) -> None:
    scene.ready()
    scene.send(PeerRefused("send hello first"), 1.0)  # What a restarted source sends on an old connection.
    assert scene.machine.pool.counts().quarantined == 2
    while not any(isinstance(message, PeerHello) for message in scene.hear()):
        pass
    scene.send(msgspec.structs.replace(THEIRS, epoch=51), 2.0)
    assert scene.machine.pool.counts().quarantined == 2  # What was on the way may still be landing.
    scene.sources.tick(2.0 + SETTLE_S)
    assert scene.machine.pool.free == 8 and scene.sockets == []


def test_a_refused_connection_proves_death(scene: Scene) -> None:
    scene.ready()
    scene.server.close()
    scene.sources.tick(2 * HEARTBEAT_S)
    assert "nobody listens" in scene.reasons[0]
    scene.sources.tick(2 * HEARTBEAT_S + SETTLE_S)
    assert scene.machine.pool.free == 8 and scene.sockets == []


def test_what_was_said_on_another_connection_is_dropped(scene: Scene) -> None:
    """A hello of an earlier incarnation, received again, must not prove the present one dead: slots in
    quarantine would be free while it may still write. A `Closed` that is received again would free them
    likewise."""
    scene.ready()
    former = scene.connection
    scene.sources.tick(TIMEOUT_S)
    while not any(isinstance(message, PeerHello) for message in scene.hear()):
        pass
    renewed, scene.connection = scene.connection, former
    assert renewed != former
    scene.send(msgspec.structs.replace(THEIRS, epoch=49), 6.0)
    scene.send_at_once([THEIRS, Closed(1)], 6.0)
    assert len(scene.sources) == 0 and scene.machine.pool.counts().quarantined == 2
    assert scene.machine.outbox.drops["other_connection"] == 2
    scene.connection = renewed
    scene.send_at_once([THEIRS, Closed(1)], 6.0)
    assert len(scene.sources) == 1 and scene.machine.pool.free == 8


def test_what_is_said_before_hello_is_dropped(scene: Scene) -> None:
    scene.hear()
    scene.send(Closed(1), 0.0)
    assert scene.machine.outbox.drops["peer_before_hello"] == 1
    assert scene.reasons == []


def test_two_refusals_at_once_are_one(scene: Scene) -> None:
    scene.hear()
    refusal = PeerRefused("not now")
    scene.send_at_once([refusal, refusal], 0.0)  # Nothing is quarantined, so the first one forgets it.
    assert len(scene.reasons) == 1 and "not now" in scene.reasons[0]
    assert scene.sockets == []


def test_what_was_said_on_an_ended_connection_does_not_count_for_the_next(scene: Scene) -> None:
    scene.ready()
    former = scene.sources._sources[scene.address].link
    scene.send_at_once([PeerRefused("send hello first"), THEIRS, PeerRefused("again")], 1.0)
    renewed = scene.sources._sources[scene.address].link
    assert renewed is not former and scene.sockets == [renewed]
    assert len(scene.sources) == 0  # The new connection has not been greeted yet.
    while not any(isinstance(message, PeerHello) for message in scene.hear()):
        pass
    scene.send(THEIRS, 2.0)
    assert len(scene.sources) == 1
    assert scene.sources._sources[scene.address].link is renewed
