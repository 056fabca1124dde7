"""A worker's UNIX socket: who may connect, what is dropped, who is told of what, what is left behind."""

import socket
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from kvtransfer.errors import TransferConfigError
from kvtransfer.net.channel import Server
from kvtransfer.net.codec import Codec
from services.protocol import frame_server
from services.protocol.frame_server import FrameServer, open_server
from services.protocol.framing import with_length
from services.protocol.messages import Failed, Refusal, Report, Request, StatusRequest, Tokens
from tests.patience import patient
from tests.router_peer import RouterPeer

WAIT_MS = int(patient(20_000))
MANY = 40


class Worker:
    """A server, and all that it has called back with."""

    def __init__(self, endpoint: str, limit_bytes: int = 1 << 20) -> None:
        self.dropped: list[str] = []
        self.ended: list[bytes] = []
        self.bad: list[tuple[bytes, object]] = []
        self.requests: list[tuple[bytes, Request]] = []
        self.server: FrameServer[Request, Report] = FrameServer(
            endpoint,
            Codec(Request, limit_bytes),
            Codec(Report),
            on_drop=self.dropped.append,
            on_end=self.ended.append,
            on_bad=lambda peer, said, why: self.bad.append((peer, said)),
            refusal=Refusal,
        )
        self._poller = zmq.Poller()
        self._poller.register(self.server.socket, zmq.POLLIN)

    def turn(self) -> None:
        """Sleeps as a worker does, until there is something to take in."""
        assert self._poller.poll(WAIT_MS), "nothing came"
        for peer, messages in self.server.receive():
            self.requests += [(peer, message) for message in messages]

    def rests(self) -> bool:
        return not self._poller.poll(0)

    def take(self, count: int) -> list[Request]:
        """The first so many requests."""
        while len(self.requests) < count:
            self.turn()
        return [request for _, request in self.requests[:count]]

    def meet(self, peer: RouterPeer) -> bytes:
        """The name that the server has for a peer."""
        before = len(self.requests)
        peer.send([StatusRequest(0)])
        self.take(before + 1)
        return self.requests.pop()[0]


@pytest.fixture
def endpoint() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="baton-") as path:  # mode 0700, and short
        yield f"ipc://{path}/w"


@pytest.fixture
def worker(endpoint: str) -> Iterator[Worker]:
    worker = Worker(endpoint)
    yield worker
    worker.server.close()


@pytest.fixture
def peer(worker: Worker, endpoint: str) -> Iterator[RouterPeer]:
    peer = RouterPeer(endpoint)
    yield peer
    peer.close()


def path_of(endpoint: str) -> Path:
    return Path(endpoint.removeprefix("ipc://"))


# ---------------------------------------------------------------- the socket's path


def test_the_socket_is_private_and_goes_with_the_server(endpoint: str) -> None:
    for _ in range(2):  # the second finds the path free again
        worker = Worker(endpoint)
        assert stat.S_IMODE(path_of(endpoint).stat().st_mode) == 0o600
        worker.server.close()
        worker.server.close()
        assert list(path_of(endpoint).parent.iterdir()) == []


def test_a_stale_path_is_taken_over_a_live_one_and_another_file_are_not(endpoint: str) -> None:
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path_of(endpoint)))
    worker = Worker(endpoint)
    with pytest.raises(TransferConfigError, match="another process is listening"):
        Worker(endpoint)
    peer = RouterPeer(endpoint)
    worker.meet(peer)
    peer.close()
    worker.server.close()
    path_of(endpoint).write_text("kept")
    with pytest.raises(TransferConfigError, match="cannot be bound"):
        Worker(endpoint)
    assert path_of(endpoint).read_text() == "kept"


def test_open_directories_and_long_paths_are_refused(endpoint: str) -> None:
    directory = path_of(endpoint).parent
    directory.chmod(0o755)
    with pytest.raises(TransferConfigError, match="mode 755"):
        Worker(endpoint)
    directory.chmod(0o700)
    for odd in (f"{endpoint}{'x' * 108}", "ipc://relative"):
        with pytest.raises(TransferConfigError):
            Worker(odd)


def test_tcp_needs_keys_and_ipc_has_frames(endpoint: str) -> None:
    def opened(at: str) -> FrameServer[Request, Report] | Server[Request, Report]:
        return open_server(at, None, on_drop=print, on_bad=print, on_end=print)

    with pytest.raises(TransferConfigError, match="CURVE"):
        opened("tcp://127.0.0.1:0")
    server = opened(endpoint)
    assert isinstance(server, FrameServer) and server.endpoint == endpoint
    server.close()


# ---------------------------------------------------------------- frames


def test_frames_cross_both_ways_in_order(worker: Worker, peer: RouterPeer) -> None:
    asked = [StatusRequest(number) for number in range(MANY)]
    for one in asked:
        peer.send([one])
    assert worker.take(MANY) == asked
    name = worker.requests[0][0]
    answers: list[Report] = [Tokens(1, 0, [5]), Failed(1, "internal", "the last word", False)]
    assert worker.server.send(name, answers)
    assert peer.wait() == answers
    assert worker.rests() and not worker.dropped


def test_each_of_many_peers_has_its_own_name(worker: Worker, endpoint: str) -> None:
    peers = [RouterPeer(endpoint) for _ in range(MANY)]
    for number, peer in enumerate(peers):
        peer.send([StatusRequest(number)])
    worker.take(MANY)
    names = {request.ask_id: name for name, request in worker.requests if isinstance(request, StatusRequest)}
    assert len(set(names.values())) == MANY
    for number, peer in enumerate(peers):
        assert worker.server.send(names[number], [Tokens(number, 0, [number])])
        assert peer.wait() == [Tokens(number, 0, [number])]
        peer.close()
    while len(worker.ended) < MANY:
        worker.turn()
    assert set(worker.ended) == set(names.values())


def test_a_frame_may_come_byte_by_byte(worker: Worker, peer: RouterPeer) -> None:
    worker.meet(peer)
    data = peer.frame([StatusRequest(1 << 40), StatusRequest(2)])
    for at in range(len(data)):
        assert not worker.requests
        peer.socket.sendall(data[at : at + 1])
        worker.turn()
    assert worker.take(2) == [StatusRequest(1 << 40), StatusRequest(2)]


def test_frames_larger_than_the_sockets_buffers_cross_both_ways(worker: Worker, peer: RouterPeer) -> None:
    name = worker.meet(peer)
    asked: list[Request] = [StatusRequest(1 << 60)] * 20_000
    sender = threading.Thread(target=peer.send, args=(asked,))
    sender.start()
    assert worker.take(len(asked)) == asked
    sender.join()
    tokens = Tokens(1, 0, list(range(400_000)))
    assert worker.server.send(name, [tokens]) and worker.server.send(name, [Tokens(1, 0, [7])])
    got: list[Report] = []
    while len(got) < 2:
        worker.server.receive()
        got += peer.receive()
    assert got == [tokens, Tokens(1, 0, [7])]
    assert worker.rests(), "a socket that has room is not asked about when nothing waits for it"


def test_a_router_that_sends_without_end_does_not_keep_the_worker(
    worker: Worker, peer: RouterPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.meet(peer)
    monkeypatch.setattr(frame_server, "READ_BYTES", 1000)
    monkeypatch.setattr(frame_server, "READ_BYTES_PER_TURN", 1000)
    frame = peer.frame([StatusRequest(1)])
    peer.socket.sendall(frame * 200)
    worker.turn()
    assert len(worker.requests) <= 1000 // len(frame)
    assert worker.take(200) == [StatusRequest(1)] * 200


# ---------------------------------------------------------------- what is refused


def test_frames_that_do_not_decode_are_dropped_and_nothing_else(worker: Worker, peer: RouterPeer) -> None:
    for frame in (b"", b"\xff123", b"\x01garbage", b"\x01\x90"):
        peer.socket.sendall(with_length(frame))
    peer.send([StatusRequest(1)])
    assert worker.take(1) == [StatusRequest(1)]
    assert worker.dropped == ["malformed_frame", "other_version", "malformed_frame"]
    assert peer.wait() == [Refusal("protocol version 255, this side speaks 1")]
    assert not worker.ended


def test_a_message_that_is_not_allowed_costs_its_neighbours_nothing(worker: Worker, endpoint: str) -> None:
    peer = RouterPeer(endpoint, object)
    peer.send([StatusRequest(1), {"type": "cancel", "request_id": 0}, StatusRequest(2)])
    assert worker.take(2) == [StatusRequest(1), StatusRequest(2)]
    assert worker.bad == [(worker.requests[0][0], {"type": "cancel", "request_id": 0})]
    peer.close()


def test_a_frame_that_is_too_long_is_refused_with_its_length_and_ends_the_connection(endpoint: str) -> None:
    worker = Worker(endpoint, limit_bytes=1000)
    peer, other = RouterPeer(endpoint), RouterPeer(endpoint)
    other_name = worker.meet(other)
    peer.send([StatusRequest(1)])
    peer.socket.sendall((1001).to_bytes(4, "little") + b"x" * 50)
    assert worker.take(1) == [StatusRequest(1)], "what came before counts"
    while not worker.ended:
        worker.turn()
    assert worker.ended == [worker.requests[0][0]] and worker.dropped == ["oversized_frame"]
    assert peer.wait() == [Refusal("a frame of 1001 bytes is over the limit of 1000")]
    assert peer.wait() == []
    assert worker.server.send(other_name, [Tokens(1, 0, [5])]), "others are not hurt"
    peer.close()
    other.close()
    worker.server.close()


def test_garbage_ends_the_connection(worker: Worker, peer: RouterPeer) -> None:
    peer.socket.sendall(b"GET / HTTP/1.1\r\n\r\n")
    while not worker.ended:
        worker.turn()
    assert worker.dropped == ["oversized_frame"] and not worker.requests


# ---------------------------------------------------------------- peers that go, or do not read


def test_sending_to_nobody_is_no_error(worker: Worker) -> None:
    assert not worker.server.send(b"nobody", [Tokens(1, 0, [5])])


@pytest.mark.parametrize("half", [b"", b"\x20", b"\x20\x00\x00\x00", b"\x20\x00\x00\x00\x01\x91"])
def test_a_peer_that_dies_in_the_middle_of_a_frame_is_noticed_once(
    worker: Worker, peer: RouterPeer, half: bytes
) -> None:
    name = worker.meet(peer)
    peer.send([StatusRequest(9)])
    peer.socket.sendall(half)
    peer.close()
    while not worker.ended:
        worker.turn()
    assert worker.requests == [(name, StatusRequest(9))] and worker.ended == [name]
    assert not worker.server.send(name, [Tokens(1, 0, [5])])
    assert worker.rests() and not worker.dropped


def test_a_peer_that_has_gone_is_known_to_be_when_something_is_sent(worker: Worker, peer: RouterPeer) -> None:
    name = worker.meet(peer)
    peer.close()
    assert not worker.server.send(name, [Tokens(1, 0, [5])])
    worker.turn()
    assert worker.ended == [name]


def test_a_reconnect_is_another_peer(worker: Worker, peer: RouterPeer, endpoint: str) -> None:
    first = worker.meet(peer)
    peer.close()
    again = RouterPeer(endpoint)
    assert worker.meet(again) != first
    assert worker.ended == [first]
    again.close()


def test_a_peer_that_does_not_read_is_not_waited_for_and_gets_all_that_was_taken(
    worker: Worker, peer: RouterPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame_server, "MAX_UNSENT_BYTES", 10_000)
    name = worker.meet(peer)
    taken = 0
    while worker.server.send(name, [Tokens(taken, 0, [5] * 1000)]):
        taken += 1
    assert taken > 10
    got: list[Report] = []
    while len(got) < taken:
        worker.server.receive()
        got += peer.receive()
    assert got == [Tokens(number, 0, [5] * 1000) for number in range(taken)]
    assert worker.server.send(name, [Tokens(1, 0, [5])]), "there is room again"
    assert worker.rests()


def test_closing_ends_every_connection(worker: Worker, peer: RouterPeer) -> None:
    worker.meet(peer)
    worker.server.close()
    assert peer.wait() == [] and not worker.ended
