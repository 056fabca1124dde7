"""Writes end exactly once, whatever the mover does; over the loopback mover."""

import pytest

from kvtransfer.buffer.region import Region
from kvtransfer.errors import MoverBroken, MoverError, PeerLostError
from kvtransfer.messages import Aborted, Filled, OpenSend, Segment, SendReady, SendSlots, SlotUse
from kvtransfer.movers.base import PieceOfWrite, Progress
from kvtransfer.movers.loopback import LoopbackFabric, LoopbackMover
from kvtransfer.peers.writes import Writes
from kvtransfer.protocol.machine import TransferMachine
from kvtransfer.protocol.peer_messages import Closed, Grant, Offer, Written
from tests.unit.kvtransfer.cluster import SLOT_BYTES, TOKEN_BYTES, limits

DESTINATION = 9


class Bench:
    """A sender with one packed segment, ready to be written to the agent `there`."""

    def __init__(self, fate: Progress) -> None:
        self.fate = fate
        self.fabric = LoopbackFabric(fate=lambda peer, pieces: self.fate)
        here, self.there = bytearray(2 * SLOT_BYTES), bytearray(2 * SLOT_BYTES)
        self.mover = LoopbackMover(self.fabric, "here", memoryview(here))
        self.other = LoopbackMover(self.fabric, "there", memoryview(self.there))
        for mover in (self.mover, self.other):
            mover.register(Region(0, 2 * SLOT_BYTES))
        self.mover.add_peer("there", b"there", Region(0, 2 * SLOT_BYTES))
        self.machine = TransferMachine(limits(2))
        self.disconnected: list[int] = []
        self.writes = Writes(
            self.mover, self.machine.sender, SLOT_BYTES, 5.0, lambda d, *_: self.disconnected.append(d)
        )
        self.machine.on_command(OpenSend(1, 1000.0), 0.0)
        self.machine.on_command(SendReady(1), 0.0)
        self.machine.on_destination(DESTINATION, Offer(1, 0, 4), 2, 0.0)
        self.machine.on_destination(DESTINATION, Grant(1, [SlotUse(1, 3)]), 2, 0.0)
        self.machine.settle(0.0)
        [slots] = [e for e in self.machine.outbox.to_worker if isinstance(e, SendSlots)]
        [use] = slots.slots
        here[use.slot * SLOT_BYTES : (use.slot + 1) * SLOT_BYTES] = b"x" * SLOT_BYTES
        segment = Segment(use.slot, use.generation, 0, 4, 4 * TOKEN_BYTES)
        self.machine.on_command(Filled(1, [segment]), 0.0)
        [self.write] = self.machine.outbox.writes
        self.machine.outbox.to_destinations.clear()

    @property
    def sent(self) -> list[type]:
        return [type(message) for _, message in self.machine.outbox.to_destinations]


def test_done() -> None:
    bench = Bench(Progress.DONE)
    bench.writes.post(bench.write, "there", 0.0)
    assert len(bench.writes) == 1 and bench.sent == []
    bench.writes.poll(0.5)
    assert bench.sent == [Written] and len(bench.writes) == 0
    assert bytes(bench.there) == bytes(SLOT_BYTES) + b"x" * SLOT_BYTES
    assert (bench.writes.moved_bytes, bench.writes.moved_segments) == (SLOT_BYTES, 1)
    assert bench.writes.move_seconds == 0.5


def test_failed_half_way() -> None:
    bench = Bench(Progress.FAILED)
    bench.writes.post(bench.write, "there", 0.0)
    bench.writes.poll(0.1)
    assert bench.sent[-1] is Closed and Written not in bench.sent
    assert bench.machine.pool.free == 2 and bench.writes.moved_bytes == 0


@pytest.mark.parametrize("agent", [None, "stranger"])
def test_cannot_be_posted(agent: str | None) -> None:
    bench = Bench(Progress.DONE)
    bench.writes.post(bench.write, agent, 0.0)
    assert any(isinstance(event, Aborted) for event in bench.machine.outbox.to_worker)
    assert bench.machine.pool.free == 2 and len(bench.writes) == 0


def test_a_write_that_hangs_is_given_up_with_its_peer() -> None:
    bench = Bench(Progress.PENDING)
    bench.writes.post(bench.write, "there", 0.0)
    bench.writes.poll(4.9)
    assert len(bench.writes) == 1 and bench.disconnected == []
    bench.writes.poll(5.0)
    assert len(bench.writes) == 0 and bench.disconnected == [DESTINATION]
    assert bench.machine.pool.free == 2
    with pytest.raises(MoverError, match="unknown peer"):
        bench.mover.post("there", [PieceOfWrite(0, 0, 1)])


class StoppingMover(LoopbackMover):
    """One whose writes end some time after their peer was cut."""

    busy = True

    def step(self) -> None: ...
    def notes(self) -> list[tuple[str, bytes]]:
        return []

    def faults(self) -> list[tuple[str, str]]:
        return []

    def cut(self, peer: str) -> None: ...
    def accept_source(self, peer: str) -> None: ...
    def leave_source(self, peer: str) -> None: ...
    def on_note(self, peer: str, note: bytes) -> None: ...
    def announced(self, peer: str) -> int:
        return 0

    def landed(self, peer: str) -> int:
        return 0


@pytest.mark.parametrize("stops", [True, False])
def test_a_write_that_takes_time_to_stop_keeps_its_slots_until_then(
    stops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.unit.kvtransfer.peers.test_writes.LoopbackMover", StoppingMover)
    bench = Bench(Progress.PENDING)
    bench.writes.post(bench.write, "there", 0.0)
    bench.writes.poll(5.0)
    assert bench.disconnected == [DESTINATION]
    assert len(bench.writes) == 1 and bench.machine.pool.free == 1 and Closed not in bench.sent
    if stops:
        bench.fate = Progress.FAILED
        bench.writes.poll(5.1)
        assert len(bench.writes) == 0 and bench.machine.pool.free == 2
    else:
        with pytest.raises(MoverBroken):
            bench.writes.poll(10.0)


def test_loopback_checks_bounds_and_notices_death() -> None:
    bench = Bench(Progress.DONE)
    with pytest.raises(MoverError, match="outside"):
        bench.mover.post("there", [PieceOfWrite(0, 2 * SLOT_BYTES - 1, 2)])
    with pytest.raises(MoverError, match="another agent"):
        bench.mover.add_peer("elsewhere", b"there", Region(0, 1))
    bench.other.close()
    with pytest.raises(PeerLostError):
        bench.mover.post("there", [PieceOfWrite(0, 0, 1)])
