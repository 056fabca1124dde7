"""Frames of a byte stream however it is cut, and a UNIX socket beside libzmq's own ROUTER."""

import asyncio
import contextlib
import itertools
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from kvtransfer.errors import TransferConfigError
from kvtransfer.net.channel import Codec, Server
from services.protocol.connection import UnixWire
from services.protocol.messages import Failed, Report, Request, StatusRequest, Tokens
from services.protocol.zmtp import GREETING, READY, Incoming, ZmtpError, message
from tests.patience import patient

LIMIT_BYTES = 1 << 20
BODIES = [b"a", b"b" * 255, b"c" * 256, b"", b"d" * 70_000]
DEADLINE_S = patient(30.0)


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


@pytest.mark.parametrize("size", [1, 2, 7, 64, 65, 1000, 1 << 20])
def test_bodies_do_not_depend_on_how_the_bytes_come(size: int) -> None:
    incoming = Incoming(LIMIT_BYTES)
    stream = GREETING + READY + b"".join(map(message, BODIES))
    assert list(itertools.chain.from_iterable(map(incoming.feed, cut(stream, size)))) == BODIES
    assert incoming.ready


def test_a_message_in_parts_counts_as_an_empty_one() -> None:
    incoming = Incoming(LIMIT_BYTES)
    assert incoming.feed(GREETING + READY + b"\x01\x01x" + b"\x01\x01y" + b"\x00\x01z" + message(b"on")) == [
        b"",
        b"on",
    ]


@pytest.mark.parametrize(
    "stream",
    [
        b"HTTP/1.1 400 Bad Request\r\n".ljust(64, b"x"),
        GREETING[:10] + b"\x02" + GREETING[11:],
        GREETING[:12] + b"CURVE" + GREETING[17:],
        GREETING + message(b"too early"),
        GREETING + READY + b"\x02" + (LIMIT_BYTES + 1).to_bytes(8, "big"),
        GREETING + b"\x04\x0d\x05ERROR\x06denied",
    ],
)
def test_anything_else_ends_the_connection(stream: bytes) -> None:
    with pytest.raises(ZmtpError):
        Incoming(LIMIT_BYTES).feed(stream)


class Peer:
    """A worker's end: libzmq."""

    def __init__(self, path: Path) -> None:
        self.dropped: list[str] = []
        self.mismatches: list[str] = []
        self.server: Server[Request, Report] = Server(
            f"ipc://{path}", Codec(Request), Codec(Report), on_drop=self.dropped.append
        )
        self.name = b""
        self.requests: list[Request] = []

    def look(self) -> None:
        for name, messages in self.server.receive():
            self.name = name
            self.requests += messages


class Heard:
    """What a wire called back with."""

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.ends = 0
        self.dropped: list[str] = []
        self.mismatches: list[str] = []

    def end(self) -> None:
        self.ends += 1

    def wire(self, path: Path) -> UnixWire:
        return UnixWire(
            f"ipc://{path}", self.reports.extend, self.mismatches.append, self.end, self.dropped.append
        )


async def until(done: Callable[[], bool], peer: Peer | None = None) -> None:
    """libzmq works in threads of its own: looks until `done`."""
    async with asyncio.timeout(DEADLINE_S):
        while not done():
            await asyncio.sleep(0.001)
            if peer is not None:
                peer.look()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path / "w"


def test_frames_cross_both_ways_in_order_and_the_end_is_told(path: Path) -> None:
    async def run() -> None:
        heard = Heard()
        wire = heard.wire(path)  # before anybody listens
        assert wire.send([StatusRequest(0)])
        peer = Peer(path)
        await until(lambda: len(peer.requests) == 1, peer)
        # More than a socket's buffer holds, while nobody reads.
        asked: list[Request] = [StatusRequest(number) for number in range(1, 400)]
        for _ in range(400):
            assert wire.send(asked)
        await until(lambda: len(peer.requests) == 1 + 400 * len(asked), peer)
        assert peer.requests[1:] == asked * 400
        answers: list[Report] = [Tokens(1, 0, list(range(size))) for size in (1, 90, 300_000)]
        answers.append(Failed(1, "internal", "the last word", False))
        for answer in answers:
            assert peer.server.send(peer.name, [answer])
        await until(lambda: len(heard.reports) == len(answers))
        assert heard.reports == answers
        peer.server.close()
        await until(lambda: heard.ends == 1)
        assert not heard.dropped and not peer.dropped
        wire.close()
        wire.close()

    asyncio.run(run())


def test_nothing_overtakes_what_waits_for_room(path: Path) -> None:
    async def run() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            wire = Heard().wire(path)
            peer, _ = listener.accept()
        with peer:
            peer.sendall(GREETING + READY)
            peer.setblocking(False)
            await until(lambda: wire._incoming.ready)
            count = 0
            while not wire._unsent:
                assert wire.send([StatusRequest(count)] * 1000)
                count += 1
            # There is room again, of which the loop has not heard yet.
            received = peer.recv(1 << 22)
            assert wire.send([StatusRequest(count)])
            codec, incoming = Codec[Request](Request), Incoming(1 << 20)
            asked: list[Request] = []
            async with asyncio.timeout(DEADLINE_S):
                while not asked or asked[-1] != StatusRequest(count):
                    for body in incoming.feed(received):
                        asked += codec.decode(body)
                    received = b""
                    await asyncio.sleep(0)
                    with contextlib.suppress(BlockingIOError):
                        received = peer.recv(1 << 22)
            assert asked == [StatusRequest(number // 1000) for number in range(1000 * count + 1)]
        wire.close()

    asyncio.run(run())


def test_a_worker_that_does_not_read_is_not_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.protocol.connection.MAX_UNSENT_BYTES", 1000)

    async def run() -> None:
        wire = Heard().wire(path)
        sent = list(itertools.takewhile(bool, (wire.send([StatusRequest(1)]) for _ in range(1000))))
        assert 10 < len(sent) < 1000
        wire.close()

    asyncio.run(run())


def test_garbage_ends_the_connection_and_is_counted(path: Path) -> None:
    async def run() -> None:
        async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 400 Bad Request\r\n".ljust(64, b"x"))

        server = await asyncio.start_unix_server(speak, path)
        heard = Heard()
        wire = heard.wire(path)
        await until(lambda: heard.ends == 1)
        assert heard.dropped == ["malformed_frame"]
        wire.close()
        server.close()

    asyncio.run(run())


def test_a_directory_open_to_others_is_refused(path: Path) -> None:
    path.parent.chmod(0o755)

    async def run() -> None:
        with pytest.raises(TransferConfigError):
            Heard().wire(path)

    asyncio.run(run())
