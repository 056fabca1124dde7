"""The mover by CUDA IPC against a driver that behaves by its documented rules, and copies when it is told."""

import msgspec
import pytest

from kvtransfer.buffer.region import Region
from kvtransfer.errors import MoverBroken, MoverError
from kvtransfer.movers.base import PieceOfWrite, Progress
from kvtransfer.movers.cuda_ipc import STREAMS_A_PEER, CudaIpcMover, IpcDescription
from tests.unit.kvtransfer.fake_gpu import FakeDevice, Host

SIZE = 64


class Node:
    def __init__(self, host: Host, name: str, gpu: int, visible: tuple[int, ...] = (0, 1)) -> None:
        self.device = FakeDevice(host, gpu, visible)
        self.handle = host.allocate(gpu, SIZE)
        self.memory = host.allocations[self.handle]
        self.region = Region(self.memory.base, SIZE, gpu, on_device=True)
        self.mover = CudaIpcMover(name, self.device, self.handle)
        self.mover.register(self.region)

    def learn(self, other: "Node", **changes: str) -> None:
        theirs = msgspec.msgpack.decode(other.mover.metadata(), type=IpcDescription)
        metadata = msgspec.msgpack.encode(msgspec.structs.replace(theirs, **changes))
        self.mover.add_peer(other.mover.agent_name, metadata, other.region)


def two(source_gpu: int = 0, target_gpu: int = 1, **host: object) -> tuple[Node, Node]:
    machine = Host(**host)  # type: ignore[arg-type]
    return Node(machine, "a", source_gpu), Node(machine, "b", target_gpu)


@pytest.mark.parametrize("target_gpu", [0, 1])
def test_a_write_is_done_when_all_its_pieces_are(target_gpu: int) -> None:
    a, b = two(target_gpu=target_gpu)
    a.learn(b)
    a.memory.data[:] = bytes(range(SIZE))
    handle = a.mover.post("b", [PieceOfWrite(0, 32, 16), PieceOfWrite(48, 0, 8)])
    [stream] = [stream for stream in a.device.streams if stream.queued]
    a.device.run(stream, 1)
    assert a.mover.poll(handle) is Progress.PENDING
    assert b.memory.data[32:48] == bytes(range(16))
    a.device.run(stream)
    assert a.mover.poll(handle) is Progress.DONE
    assert b.memory.data == bytes(range(48, 56)) + bytes(24) + bytes(range(16)) + bytes(16)
    a.mover.release(handle)
    a.mover.close()
    assert (b.memory.mappings, a.device.events, a.device.streams) == (0, 0, [])


def test_writes_are_spread_over_the_streams_and_end_out_of_order() -> None:
    a, b = two()
    a.learn(b)
    handles = [a.mover.post("b", [PieceOfWrite(0, 0, 8)]) for _ in range(2 * STREAMS_A_PEER)]
    assert len(a.device.streams) == STREAMS_A_PEER
    a.device.run(a.device.streams[1])
    progress = [a.mover.poll(handle) for handle in handles]
    assert progress == [Progress.PENDING, Progress.DONE, Progress.PENDING, Progress.DONE]


def test_only_the_oldest_write_of_a_stream_costs_a_question() -> None:
    a, b = two()
    a.learn(b)
    handles = [a.mover.post("b", [PieceOfWrite(0, 0, 8)]) for _ in range(8)]
    assert {a.mover.poll(handle) for handle in handles} == {Progress.PENDING}
    assert a.device.queries == STREAMS_A_PEER


def test_events_are_used_again() -> None:
    a, b = two()
    a.learn(b)
    for _ in range(5):
        handle = a.mover.post("b", [PieceOfWrite(0, 0, 8)])
        assert a.mover.poll(handle) is Progress.PENDING, "an event of an earlier write counts for this one"
        a.device.run_all()
        assert a.mover.poll(handle) is Progress.DONE
        a.mover.release(handle)
    assert a.device.events == 1


def test_a_dead_peers_memory_is_let_go() -> None:
    a, b = two()
    a.learn(b)
    handle = a.mover.post("b", [PieceOfWrite(0, 0, 8)])
    assert b.memory.mappings == 1
    a.device.run_all()  # The copy ends: its target stays mapped whatever has become of its owner.
    assert a.mover.poll(handle) is Progress.DONE
    a.mover.release(handle)
    a.mover.remove_peer("b")
    assert b.memory.mappings == 0
    with pytest.raises(MoverError, match="unknown peer"):
        a.mover.post("b", [PieceOfWrite(0, 0, 8)])


def test_a_write_given_up_must_have_ended_before_its_peer_goes() -> None:
    a, b = two()
    a.learn(b)
    a.mover.release(a.mover.post("b", [PieceOfWrite(0, 0, 8)]))
    with pytest.raises(MoverBroken, match="do not end"):
        a.mover.remove_peer("b")
    assert b.memory.mappings == 1
    a.device.run_all()
    a.mover.remove_peer("b")
    a.mover.close()
    assert (b.memory.mappings, a.device.events) == (0, 0)


@pytest.mark.parametrize("when", ["post", "poll"])
def test_a_failed_device_is_not_a_failed_write(when: str) -> None:
    a, b = two()
    a.learn(b)
    handle = a.mover.post("b", [PieceOfWrite(0, 0, 8)])
    a.device.failed = True
    with pytest.raises(MoverBroken, match="CUDA_ERROR_ECC_UNCORRECTABLE"):
        if when == "post":
            a.mover.post("b", [PieceOfWrite(0, 0, 8)])
        else:
            a.mover.poll(handle)


@pytest.mark.parametrize(
    "piece", [PieceOfWrite(SIZE - 7, 0, 8), PieceOfWrite(0, SIZE - 7, 8)], ids=["ours", "theirs"]
)
def test_nothing_outside_the_buffers(piece: PieceOfWrite) -> None:
    a, b = two()
    a.learn(b)
    with pytest.raises(MoverError, match="outside"):
        a.mover.post("b", [piece])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"host": "another"}, ["inside one host", "--mover nixl"]),
        ({"gpu_uuid": "gpu-7"}, ["gpu-7", "CUDA_VISIBLE_DEVICES", "--mover nixl"]),
        ({"agent_name": "c"}, ["another agent"]),
        ({"ipc_handle": b"x" * 64, "namespaces": "pid:1"}, ["IPC and PID namespaces", "--mover nixl"]),
    ],
)
def test_a_peer_that_cannot_be_mapped_is_refused_with_the_reason(
    changes: dict[str, str], words: list[str]
) -> None:
    a, b = two()
    with pytest.raises(MoverError) as caught:
        a.learn(b, **changes)
    assert all(word in str(caught.value) for word in words), caught.value
    assert b.memory.mappings == 0


def test_no_peer_access() -> None:
    a, b = two(links=set())
    with pytest.raises(MoverError, match="no peer access"):
        a.learn(b)


def test_a_peer_that_claims_more_than_it_has() -> None:
    a, b = two()
    with pytest.raises(MoverError, match="has 64 bytes"):
        a.mover.add_peer("b", b.mover.metadata(), Region(b.region.address, 2 * SIZE, 1, on_device=True))
    assert b.memory.mappings == 0


def test_garbage_and_repetition() -> None:
    a, b = two()
    with pytest.raises(MoverError, match="cannot be used"):
        a.mover.add_peer("b", b"\xc1", b.region)
    a.learn(b)
    a.learn(b)
    assert b.memory.mappings == 1
    a.mover.remove_peer("nobody")
