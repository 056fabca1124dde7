"""The worker's side of the boundary, against a scripted transfer process."""

import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtransfer.client import SlotsAssigned, TransferClient, TransferLost, WorkerEvent
from kvtransfer.codecs import WORKER_COMMANDS, WORKER_EVENTS
from kvtransfer.errors import AttachError
from kvtransfer.messages import (
    Aborted,
    Arrived,
    Attached,
    AttachRefused,
    AttachWorker,
    Command,
    Commit,
    Event,
    Freed,
    KvGeometry,
    NotAttached,
    OpenReceive,
    OpenSend,
    Ping,
    Segment,
    SendCommitted,
    SendGranted,
    SendSlots,
    SlotCounts,
    SlotUse,
    Stats,
    TransferAddress,
)
from kvtransfer.net.channel import Server
from tests.patience import patient

GEOMETRY = KvGeometry("m", 1, 1, 2, "float16")
HERE = TransferAddress("ipc:///peers", 70)
SOURCE = TransferAddress("ipc:///source", 5)
A, B = SlotUse(1, 4), SlotUse(2, 9)
WAIT_MS = int(patient(20_000))


class Script:
    """A transfer process that sends what the test has it send. Device memory, so nothing is mapped."""

    def __init__(self, directory: Path) -> None:
        self.server: Server[Command, Event] = Server(
            f"ipc://{directory}/w", WORKER_COMMANDS, WORKER_EVENTS, on_drop=lambda reason: None
        )
        self.peer = b""
        self.received: list[Command] = []

    def hear(self) -> None:
        assert self.server.socket.poll(WAIT_MS)
        for peer, messages in self.server.receive():
            self.peer = peer
            self.received.extend(messages)

    def take(self) -> list[Command]:
        self.hear()
        received, self.received = self.received, []
        return received

    def send(self, *events: Event) -> None:
        assert self.server.send(self.peer, list(events))

    def attach(self, epoch: int = 70) -> None:
        while not any(isinstance(message, AttachWorker) for message in self.received):
            self.hear()
        self.received.clear()
        address = TransferAddress(HERE.endpoint, epoch)
        self.send(Attached(address, "nixl", 4, 64, True, None, b"handle", 0))


class Scene:
    def __init__(self, directory: Path) -> None:
        self.script = Script(directory)
        helper = threading.Thread(target=self.script.attach)
        helper.start()
        self.client = TransferClient(self.script.server.endpoint, 3, GEOMETRY, timeout_s=5.0)
        helper.join()
        self.now_s = time.monotonic()

    def hear(self, *events: Event) -> list[WorkerEvent]:
        """What the client makes of these events."""
        self.script.send(*events)
        assert self.client.socket.poll(WAIT_MS)
        return self.client.receive(self.now_s)

    def flushed(self) -> list[Command]:
        self.client.flush()
        return self.script.take()


@pytest.fixture
def scene() -> Iterator[Scene]:
    with tempfile.TemporaryDirectory(prefix="baton-") as directory:
        scene = Scene(Path(directory))
        yield scene
        scene.client.close()
        scene.script.server.close()


def test_what_is_attached(scene: Scene) -> None:
    client = scene.client
    assert client.ready and client.address == HERE and client.checksum
    assert (client.slots, client.slot_bytes, client.tokens_per_slot) == (4, 64, 8)
    assert client.staging is None and client.attached.cuda_ipc_handle == b"handle"
    with pytest.raises(AttachError):
        client.slot_view(0)


def test_one_frame_for_all_commands_freed_first(scene: Scene) -> None:
    client = scene.client
    client.open_send(1, 9.0)
    client.open_receive(2, SOURCE, 0, 8, 9.0)
    client.freed([A])
    client.freed([B])
    client.commit(2)
    client.flush()
    client.flush()  # Nothing left to send.
    [(_, messages)] = scene.script.server.receive() if scene.script.server.socket.poll(WAIT_MS) else []
    assert messages == [
        Freed([A, B]),
        OpenSend(1, 9.0),
        OpenReceive(2, SOURCE, 0, 8, 9.0),
        Commit(2),
    ]
    assert not scene.script.server.socket.poll(50)


def test_events_about_ended_transfers_are_kept_from_the_worker(scene: Scene) -> None:
    client = scene.client
    client.open_send(1, 9.0)
    client.open_receive(2, SOURCE, 0, 8, 9.0)
    client.abort(1, "left")
    client.abort(2, "left")
    scene.flushed()
    late: tuple[Event, ...] = (
        SendGranted(1, 2),
        Arrived(2, [Segment(B.slot, B.generation, 0, 4, 32)]),
        Aborted(2, "crossed"),
        SendCommitted(1),
    )
    assert scene.hear(*late) == []
    assert scene.flushed() == [Freed([B])]
    client.open_send(3, 9.0)
    assert scene.hear(SendGranted(3, 2)) == [SendGranted(3, 2)]


def test_what_has_arrived_is_told_once(scene: Scene) -> None:
    scene.client.open_receive(2, SOURCE, 0, 8, 9.0)
    arrived = Arrived(2, [Segment(B.slot, B.generation, 0, 4, 32)])
    assert scene.hear(arrived, arrived) == [arrived]
    again = Arrived(2, [Segment(B.slot, B.generation + 1, 4, 4, 32)])
    assert scene.hear(again) == [again]


def test_slots_that_are_lent_twice_are_told_once(scene: Scene) -> None:
    """Whatever was filled of the slot before. The next use has a generation of its own."""
    client, again = scene.client, SlotUse(1, 5)
    client.open_send(1, 9.0)
    assigned = SendSlots([A, B])
    assert scene.hear(assigned, assigned) == [SlotsAssigned([A, B])]
    client.filled(1, [Segment(1, 4, 0, 4, 16)])
    scene.flushed()
    assert scene.hear(assigned, SendSlots([again])) == [SlotsAssigned([again])]
    client.freed([again])
    assert scene.flushed() == [Freed([again])]


def test_a_reborn_process_is_attached_again(scene: Scene) -> None:
    client = scene.client
    client.open_send(1, 9.0)
    scene.hear(SendSlots([A]))
    scene.flushed()
    assert scene.hear(NotAttached(71), NotAttached(71)) == [TransferLost(70)]
    assert not client.ready
    client.open_send(2, 9.0)
    client.freed([A])
    client.flush()  # All of it was about the incarnation that has ended.
    scene.now_s += 2.0
    client.tick(scene.now_s)
    scene.script.attach(71)
    assert client.socket.poll(WAIT_MS)
    assert client.receive(scene.now_s) == []
    assert client.ready and client.address.epoch == 71
    client.open_send(3, 9.0)
    assert scene.flushed()[-1:] == [OpenSend(3, 9.0)]


def test_an_answer_of_a_life_that_has_ended_meanwhile_is_not_kept(scene: Scene) -> None:
    """The worker hangs just after it has asked. One incarnation answers and dies, the next one answers as
    well, and only then does the worker look."""
    client = scene.client
    assert scene.hear(NotAttached(71)) == [TransferLost(70)]
    first, second = (
        Attached(TransferAddress(HERE.endpoint, epoch), "nixl", 4, 64, True, None, b"handle", 0)
        for epoch in (71, 72)
    )
    assert scene.hear(first) == [] and client.address.epoch == 71
    client.open_send(1, 9.0)
    assert scene.hear(SendSlots([A]), second) == [TransferLost(71)]
    assert client.ready and client.address.epoch == 72
    client.open_send(2, 9.0)
    assert scene.flushed()[-1:] == [OpenSend(2, 9.0)], "what was sent to the earlier incarnation is forgotten"


def test_an_account_of_another_life_ends_the_attachment(scene: Scene) -> None:
    counts = SlotCounts(4, 0, 0, 0)
    stats = Stats(71, 1, counts, 0, 0, 0, 0, 0, 0.0, 0.0, {}, 0, 0, None)
    assert scene.hear(stats) == [TransferLost(70)]
    assert not scene.client.ready and scene.client.last_stats is None
    scene.now_s += 2.0
    scene.client.tick(scene.now_s)
    scene.script.attach(71)
    assert scene.client.socket.poll(WAIT_MS)
    assert scene.client.receive(scene.now_s) == [] and scene.client.address.epoch == 71


def test_silence_ends_the_attachment(scene: Scene) -> None:
    client = scene.client
    for _ in range(12):
        scene.now_s += 1.0
        client.tick(scene.now_s)
    assert client.receive(scene.now_s) == [TransferLost(70)]
    assert not client.ready
    received = scene.script.take()
    while not isinstance(received[-1], AttachWorker):
        received += scene.script.take()
    assert received[:6] == [Ping(3)] * 6
    assert all(isinstance(message, AttachWorker) for message in received[6:])


def test_a_worker_that_was_busy_itself_does_not_blame_the_process(scene: Scene) -> None:
    client = scene.client
    scene.now_s += 100.0
    client.tick(scene.now_s)
    assert client.receive(scene.now_s) == [] and client.ready


def test_refusal_is_told() -> None:
    with tempfile.TemporaryDirectory(prefix="baton-") as directory:
        script = Script(Path(directory))

        def refuse() -> None:
            script.hear()
            script.send(AttachRefused("no room"))

        helper = threading.Thread(target=refuse)
        helper.start()
        with pytest.raises(AttachError, match="no room"):
            TransferClient(script.server.endpoint, 3, GEOMETRY, timeout_s=0.5)
        helper.join()
        script.server.close()


def test_a_transfer_process_that_dies_is_missed_at_once(scene: Scene) -> None:
    """Its connection ends: no silence is waited for. The client attaches to the next incarnation."""
    client, endpoint = scene.client, scene.script.server.endpoint
    client.open_send(9, 60.0)
    scene.flushed()
    scene.script.server.close()
    until_s = time.monotonic() + WAIT_MS / 1000
    while client.ready:
        assert time.monotonic() < until_s
        client.tick(scene.now_s)
    assert client.receive(scene.now_s) == [TransferLost(70)]
    scene.script = Script(Path(endpoint.removeprefix("ipc://")).parent)
    helper = threading.Thread(target=scene.script.attach, args=(71,))
    client.tick(scene.now_s + 2)
    helper.start()
    assert client.socket.poll(WAIT_MS)
    assert client.receive(scene.now_s + 2) == []
    helper.join()
    assert client.ready and client.address.epoch == 71
