"""The two-sided mover against a library that follows NCCL's rules: order, aborts, deaths, nonsense; then two
whole transfer processes over it."""

import ctypes
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from kvtransfer import process
from kvtransfer.buffer.region import Region
from kvtransfer.config import TransferConfig
from kvtransfer.errors import MoverError
from kvtransfer.movers.base import PieceOfWrite, Progress, two_sided
from kvtransfer.movers.nccl import Announce, JoinPair, NcclMover
from kvtransfer.protocol.deferred import DeferredMessages
from kvtransfer.protocol.peer_messages import Closed
from tests.e2e.transfer_pair import SLOT_BYTES, SLOTS, Worker, content_of, drive
from tests.patience import patient
from tests.unit.kvtransfer.fake_nccl import FakeNccl, FakeStreams, Wire

SIZE = 64


def inline(work: Callable[[], None]) -> Callable[[], bool]:
    work()
    return lambda: True


class Node:
    def __init__(self, wire: Wire, name: str, gpu: str) -> None:
        self.buffer = (ctypes.c_char * SIZE)()
        self.library = FakeNccl(wire)
        self.device = FakeStreams(self.library, gpu)
        self.run_in_background = inline
        self.mover = NcclMover(name, self.library, self.device, lambda work: self.run_in_background(work))
        self.region = Region(ctypes.addressof(self.buffer), SIZE, 0, on_device=True)
        self.mover.register(self.region)


class Two:
    """`a` sends to `b`; `talk` carries the notes."""

    def __init__(self) -> None:
        self.wire = Wire()
        self.a, self.b = Node(self.wire, "a", "gpu-0"), Node(self.wire, "b", "gpu-1")
        self.greet()

    def greet(self) -> None:
        self.b.mover.accept_source("a")
        self.a.mover.add_peer("b", self.b.mover.metadata(), self.b.region)

    def talk(self) -> None:
        for peer, note in self.a.mover.notes():
            assert peer == "b"
            self.b.mover.on_note("a", note)

    def step(self) -> None:
        for node in (self.a, self.b):
            node.mover.step()

    def settle(self) -> None:
        self.talk()
        for _ in range(12):
            self.step()

    @property
    def ahead(self) -> int:
        """Batches announced that have not landed."""
        return self.b.mover.announced("a") - self.b.mover.landed("a")


def test_it_is_two_sided() -> None:
    assert two_sided(Two().a.mover) is not None


def test_writes_wait_for_the_pair_and_land_in_order() -> None:
    two = Two()
    two.a.buffer[:] = bytes(range(SIZE))
    handles = [two.a.mover.post("b", [PieceOfWrite(8 * i, 56 - 8 * i, 8)]) for i in range(5)]
    two.a.mover.step()
    assert {two.a.mover.poll(handle) for handle in handles} == {Progress.PENDING}
    two.settle()
    two.settle()
    assert [two.a.mover.poll(handle) for handle in handles] == [Progress.DONE] * 5
    assert two.b.buffer[24:] == b"".join(bytes(range(8 * i, 8 * i + 8)) for i in range(4, -1, -1))
    assert (two.b.mover.announced("a"), two.b.mover.landed("a")) == (5, 5)
    assert not two.a.mover.busy and not two.b.mover.busy
    assert two.a.device.open_events == two.b.device.open_events == 0


def test_an_announced_batch_is_ahead_until_its_receive_is_done() -> None:
    two = Two()
    two.settle()
    two.wire.running = False
    handle = two.a.mover.post("b", [PieceOfWrite(0, 0, 8), PieceOfWrite(8, 16, 8)])
    two.settle()
    assert two.a.mover.poll(handle) is Progress.PENDING and two.ahead == 1
    assert two.b.mover.busy
    two.wire.running = True
    two.wire.run()
    two.settle()
    assert two.a.mover.poll(handle) is Progress.DONE and two.ahead == 0


@pytest.mark.parametrize("side", ["a", "b"])
def test_a_stopped_pair_ends_its_batches_only_when_the_abort_has(side: str) -> None:
    two = Two()
    two.settle()
    two.wire.running = False
    handles = [two.a.mover.post("b", [PieceOfWrite(0, 0, 8)]) for _ in range(3)]
    two.settle()
    waiting: list[Callable[[], None]] = []
    done: list[bool] = []

    def later(work: Callable[[], None]) -> Callable[[], bool]:
        waiting.append(work)
        return lambda: bool(done)

    two.a.run_in_background = two.b.run_in_background = later
    if side == "a":
        two.a.mover.cut("b")
    else:
        two.b.mover.leave_source("a")
    two.step()
    assert {two.a.mover.poll(handle) for handle in handles} == {Progress.PENDING} and two.ahead == 3
    [abort] = waiting
    abort()
    two.step()
    assert {two.a.mover.poll(handle) for handle in handles} == {Progress.PENDING}, "it has not ended yet"
    done.append(True)
    two.step()
    if side == "a":
        assert [two.a.mover.poll(handle) for handle in handles] == [Progress.FAILED] * 3
        assert two.ahead == 3, "the receiver's own receive is still posted"
        assert two.a.device.open_streams == two.a.device.open_events == 0
    else:
        assert two.ahead == 0
        assert {two.a.mover.poll(handle) for handle in handles} == {Progress.PENDING}
        assert two.b.device.open_streams == two.b.device.open_events == 0


def test_a_lost_pair_can_be_joined_anew() -> None:
    two = Two()
    two.settle()
    two.wire.running = False
    lost = two.a.mover.post("b", [PieceOfWrite(0, 0, 8)])
    two.settle()
    two.a.mover.cut("b")
    two.b.mover.leave_source("a")
    two.greet()
    two.step()
    assert two.a.mover.poll(lost) is Progress.FAILED and two.ahead == 0
    two.wire.running = True
    two.a.buffer[:8] = b"12345678"
    handle = two.a.mover.post("b", [PieceOfWrite(0, 8, 8)])
    two.settle()
    two.settle()
    assert two.a.mover.poll(handle) is Progress.DONE and two.b.buffer[8:16] == b"12345678"


def test_a_failed_communicator_is_a_fault_of_its_peer() -> None:
    two = Two()
    two.settle()
    handle = two.a.mover.post("b", [PieceOfWrite(0, 0, 8)])
    two.wire.failing = {0}
    two.settle()
    [(peer, why)] = two.a.mover.faults()
    assert peer == "b" and "network error" in why
    assert two.a.mover.poll(handle) is Progress.FAILED
    with pytest.raises(MoverError):
        two.a.mover.post("b", [PieceOfWrite(0, 0, 8)])
    two.a.mover.cut("b")
    assert two.a.mover.faults() == []


@pytest.mark.parametrize(
    ("note", "words"),
    [
        (b"\xc1", "cannot be read"),
        (msgspec.msgpack.encode(JoinPair(b"x" * 128)), "joined twice"),
        (msgspec.msgpack.encode(Announce([(SIZE - 7, 8)])), "outside"),
        (msgspec.msgpack.encode(Announce([(-1, 8)])), "outside"),
        (msgspec.msgpack.encode(Announce([(0, 0)])), "outside"),
    ],
)
def test_nonsense_loses_the_source(note: bytes, words: str) -> None:
    two = Two()
    two.settle()
    with pytest.raises(MoverError, match=words):
        two.b.mover.on_note("a", note)
    assert two.ahead == 0


def test_what_is_said_out_of_turn() -> None:
    two = Two()
    with pytest.raises(MoverError, match="before the pair has joined"):
        two.b.mover.on_note("a", msgspec.msgpack.encode(Announce([(0, 8)])))
    with pytest.raises(MoverError, match="before the greeting"):
        two.b.mover.on_note("stranger", b"")
    with pytest.raises(MoverError, match="invalid argument"):
        two.b.mover.on_note("a", msgspec.msgpack.encode(JoinPair(b"x" * 128)))


def test_one_gpu_is_refused_with_the_way_out() -> None:
    wire = Wire()
    a, b = Node(wire, "a", "gpu-0"), Node(wire, "b", "gpu-0")
    with pytest.raises(MoverError, match="--mover cuda_ipc"):
        a.mover.add_peer("b", b.mover.metadata(), b.region)


def test_messages_wait_for_what_was_announced_before_them() -> None:
    deferred = DeferredMessages()
    assert not deferred.defer(Closed(1), announced=2, landed=2)
    assert deferred.defer(Closed(2), announced=3, landed=2)
    assert deferred.defer(Closed(3), announced=4, landed=2)
    assert deferred.take_due(2) == []
    assert deferred.take_due(3) == [Closed(2)]
    assert deferred.defer(Closed(4), announced=4, landed=4), "never before what came before it"
    assert deferred.take_due(4) == [Closed(3), Closed(4)] and len(deferred) == 0


# ---------------------------------------------------------------- two transfer processes


class HostNccl(NcclMover):
    """Over host memory, which the fake library copies."""

    def register(self, region: Region) -> None:
        super().register(replace(region, on_device=True))


class Threads:
    """Two transfer processes, each stepped by a thread of its own, over one wire."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory, self.wire = directory, Wire()
        self.stops: dict[str, threading.Event] = {}
        self.threads: dict[str, threading.Thread] = {}
        monkeypatch.setattr(process, "select_mover", self._mover)

    def _mover(self, config: TransferConfig, agent_name: str, *_: object) -> NcclMover:
        library = FakeNccl(self.wire)
        return HostNccl(agent_name, library, FakeStreams(library, agent_name), inline)

    def start(self, name: str) -> None:
        self.stops[name] = threading.Event()
        self.threads[name] = threading.Thread(target=self._run, args=(name, self.stops[name]))
        self.threads[name].start()

    def _run(self, name: str, stop: threading.Event) -> None:
        at = f"ipc://{self.directory}/{name}"
        one = process.TransferProcess(
            TransferConfig(
                name=name,
                listen=f"{at}.worker",
                peer_listen=f"{at}.peers",
                staging_socket=self.directory / f"{name}.staging",
                slots=SLOTS,
                slot_bytes=SLOT_BYTES,
                peer_timeout_s=1.0,
                heartbeat_s=0.2,
                transfer_timeout_s=10.0,
            )
        )
        while not stop.is_set():
            one._poller.poll(1)
            one.step(time.monotonic())
        one.close()

    def stop(self, name: str) -> None:
        self.stops.pop(name).set()
        self.threads.pop(name).join(patient(30.0))

    def close(self) -> None:
        for name in list(self.threads):
            self.stop(name)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Threads]:
    with tempfile.TemporaryDirectory(prefix="baton-") as directory:
        both = Threads(Path(directory), monkeypatch)
        both.start("prefill")
        both.start("decode")
        yield both
        both.close()


def all_free(*workers: Worker) -> None:
    for worker in workers:
        worker.client.last_stats = None
    drive(list(workers), lambda: all(worker.all_free() for worker in workers), "every slot is free again")


def test_kv_goes_both_ways_survives_a_fault_and_a_restart(threads: Threads) -> None:
    prefill, decode = Worker(threads.directory, "prefill", 11), Worker(threads.directory, "decode", 12)
    sides = [prefill, decode]
    contents = {transfer_id: content_of(300, transfer_id) for transfer_id in range(1, 7)}
    for transfer_id, content in contents.items():
        source, target = sides if transfer_id % 2 else reversed(sides)
        target.receive(transfer_id, source, 300)
        source.send(transfer_id, content)
    drive(sides, lambda: len(prefill.committed | decode.committed) == 6, "all committed")
    assert {i: bytes(data) for i, data in (prefill.got | decode.got).items()} == contents
    all_free(*sides)

    threads.wire.running = False
    decode.receive(7, prefill, 300)
    prefill.send(7, content_of(300, 7))
    drive(sides, lambda: prefill.sent_tokens[7] > 0, "packed")
    threads.wire.failing = {0}  # The sender's communicator: both sides end what was open, and greet anew.
    drive(sides, lambda: 7 in prefill.aborted and 7 in decode.aborted, "both hear of the fault")
    threads.wire.failing, threads.wire.running = set(), True
    all_free(*sides)
    decode.receive(8, prefill, 300)
    prefill.send(8, content_of(300, 8))
    drive(sides, lambda: 8 in prefill.committed, "the pair has joined anew")
    assert decode.got[8] == content_of(300, 8)

    threads.wire.running = False  # The other side goes with a batch on its way.
    decode.receive(9, prefill, 300)
    prefill.send(9, content_of(300, 9))
    drive(sides, lambda: prefill.sent_tokens[9] > 0, "packed")
    threads.stop("prefill")
    drive(sides, lambda: 9 in decode.aborted, "its end is noticed")
    threads.wire.running = True
    threads.start("prefill")
    drive(sides, lambda: bool(prefill.lost) and prefill.client.ready, "the next incarnation")
    all_free(*sides)
    decode.receive(10, prefill, 300)
    prefill.send(10, content_of(300, 10))
    drive(sides, lambda: 10 in prefill.committed, "the next incarnation serves")
    assert decode.got[10] == content_of(300, 10)
    for worker in sides:
        worker.client.close()
