"""A router's connection over a UNIX socket, on asyncio's loop and on uvloop's."""

import asyncio
import itertools
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from kvtransfer.errors import TransferConfigError
from kvtransfer.net.codec import Codec
from services.protocol import connection
from services.protocol.connection import UnixConnection, open_connection
from services.protocol.frame_server import FrameServer
from services.protocol.framing import FrameSplitter, with_length
from services.protocol.messages import Failed, Report, Request, StatusRequest, Tokens
from tests.patience import patient

DEADLINE_S = patient(30.0)
Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """As the router runs, and as most tests do."""
    chosen: Run = request.param
    return chosen


class Peer:
    """The worker's end."""

    def __init__(self, path: Path) -> None:
        self.dropped: list[str] = []
        self.ended: list[bytes] = []
        self.server: FrameServer[Request, Report] = FrameServer(
            f"ipc://{path}", Codec(Request), Codec(Report),
            on_drop=self.dropped.append, on_end=self.ended.append,
        )  # fmt: skip
        self.name = b""
        self.requests: list[Request] = []

    def look(self) -> None:
        for name, messages in self.server.receive():
            self.name = name
            self.requests += messages


class Heard:
    """What a connection called back with."""

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.ends = 0
        self.dropped: list[str] = []
        self.mismatches: list[str] = []

    def end(self) -> None:
        self.ends += 1

    def connect(self, path: Path) -> UnixConnection:
        return UnixConnection(
            f"ipc://{path}", self.reports.extend, self.mismatches.append, self.end, self.dropped.append
        )


async def until(done: Callable[[], bool], peer: Peer | None = None) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not done():
            await asyncio.sleep(0.001)
            if peer is not None:
                peer.look()


async def accepted(listener: socket.socket) -> socket.socket:
    peer, _ = await asyncio.get_running_loop().sock_accept(listener)
    peer.setblocking(False)
    return peer


def listening(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    listener.setblocking(False)
    return listener


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path / "w"


def test_frames_cross_both_ways_in_order_and_the_end_is_told(path: Path, run: Run) -> None:
    async def scenario() -> None:
        heard = Heard()
        router = heard.connect(path)  # before anybody listens
        assert router.send([StatusRequest(0)])
        peer = Peer(path)
        await until(lambda: len(peer.requests) == 1, peer)
        # More than a socket's buffer holds, while nobody reads.
        asked: list[Request] = [StatusRequest(number) for number in range(1, 400)]
        for _ in range(400):
            assert router.send(asked)
        await until(lambda: len(peer.requests) == 1 + 400 * len(asked), peer)
        assert peer.requests[1:] == asked * 400
        answers: list[Report] = [Tokens(1, 0, list(range(size))) for size in (1, 90, 300_000)]
        answers.append(Failed(1, "internal", "the last word", False))
        for answer in answers:
            assert peer.server.send(peer.name, [answer])
        await until(lambda: len(heard.reports) == len(answers), peer)
        assert heard.reports == answers
        peer.server.close()
        await until(lambda: heard.ends == 1)
        assert not heard.dropped and not peer.dropped
        assert not router.send([StatusRequest(1)])
        router.close()
        router.close()

    run(scenario())


def test_the_last_words_of_a_worker_come_before_its_end(path: Path, run: Run) -> None:
    async def scenario() -> None:
        order: list[object] = []
        router = UnixConnection(
            f"ipc://{path}", order.extend, order.append, lambda: order.append("end"), order.append
        )
        router.send([StatusRequest(0)])
        peer = Peer(path)
        await until(lambda: bool(peer.requests), peer)
        last = Failed(1, "internal", "the last word", False)
        assert peer.server.send(peer.name, [last])
        peer.server.close()
        await until(lambda: len(order) == 2)
        assert order == [last, "end"]
        router.close()

    run(scenario())


def test_nothing_overtakes_what_waits_for_room(path: Path, run: Run) -> None:
    async def scenario() -> None:
        with listening(path) as listener:
            router = Heard().connect(path)
            assert router.send([StatusRequest(0)])  # before there is a connection
            peer = await accepted(listener)
        loop, codec, frames = asyncio.get_running_loop(), Codec[Request](Request), FrameSplitter(1 << 20)
        with peer:
            asked: list[Request] = [StatusRequest(0)]
            for number in range(1, 100):
                assert router.send([StatusRequest(number)] * 1000)
                asked += [StatusRequest(number)] * 1000
            got: list[Request] = []
            async with asyncio.timeout(DEADLINE_S):
                while len(got) < len(asked):
                    for frame in frames.feed(await loop.sock_recv(peer, 1 << 16)):
                        got += codec.decode(frame)
            assert got == asked
        router.close()

    run(scenario())


def test_a_worker_that_does_not_read_is_not_waited_for(
    path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "MAX_UNSENT_BYTES", 1000)

    async def scenario() -> None:
        def fill(router: UnixConnection) -> int:
            return len(
                list(itertools.takewhile(bool, (router.send([StatusRequest(1)]) for _ in range(10**6))))
            )

        router = Heard().connect(path)
        assert 10 < fill(router) < 1000, "nobody is there"
        router.close()
        with listening(path) as listener:
            router = Heard().connect(path)
            peer = await accepted(listener)
            await until(lambda: router._transport is not None)
            sent = fill(router)
            assert sent > 10
            assert not router.send([StatusRequest(1)])
            loop, frames, got = asyncio.get_running_loop(), FrameSplitter(1 << 20), 0
            async with asyncio.timeout(DEADLINE_S):
                while got < sent:
                    got += len(list(frames.feed(await loop.sock_recv(peer, 1 << 16))))
            await until(lambda: router.send([StatusRequest(2)]))
            router.close()
            peer.close()

    run(scenario())


def test_garbage_ends_the_connection_and_is_counted(path: Path, run: Run) -> None:
    async def scenario() -> None:
        with listening(path) as listener:
            heard = Heard()
            router = heard.connect(path)
            with await accepted(listener) as peer:
                codec = Codec[Report](Report)
                peer.send(with_length(codec.encode([Tokens(1, 0, [5])])) + b"HTTP/1.1 400 Bad Request\r\n")
                await until(lambda: heard.ends == 1)
        assert heard.dropped == ["oversized_frame"] and heard.reports == [Tokens(1, 0, [5])]
        router.close()

    run(scenario())


def test_frames_that_do_not_decode_cost_nothing_else(path: Path, run: Run) -> None:
    async def scenario() -> None:
        with listening(path) as listener:
            heard = Heard()
            router = heard.connect(path)
            with await accepted(listener) as peer:
                good = Codec[Report](Report).encode([Tokens(1, 0, [5])])
                half_good = b"\x01\x92" + b"\x91\xa1?" + good[2:]
                for frame in (b"", b"\x01junk", b"\x09\x90", half_good, good):
                    peer.send(with_length(frame))
                await until(lambda: len(heard.reports) == 2)
                assert heard.dropped == ["malformed_frame"] * 2 + ["other_version", "malformed_report"]
                assert heard.mismatches == ["protocol version 9, this side speaks 1"]
                peer.send(b"\x20\x00\x00\x00half")
            await until(lambda: heard.ends == 1)  # in the middle of a frame
            assert len(heard.reports) == 2
        router.close()

    run(scenario())


def test_after_closing_nothing_is_called_back(path: Path, run: Run) -> None:
    async def scenario() -> None:
        peer, heard = Peer(path), Heard()
        for turns in range(6):  # as soon as it is asked for, while it is opened, and afterwards
            router = heard.connect(path)
            router.send([StatusRequest(turns)])
            for _ in range(turns):
                await asyncio.sleep(0)
            router.close()
        # Whatever was accepted is seen to end.
        last = heard.connect(path)
        last.send([StatusRequest(99)])
        await until(lambda: StatusRequest(99) in peer.requests, peer)
        await until(lambda: len(peer.server._peers) == 1, peer)
        assert heard.ends == 0 and not heard.reports
        last.close()
        peer.server.close()

    run(scenario())


def test_a_directory_open_to_others_and_a_long_path_are_refused(path: Path, run: Run) -> None:
    async def scenario() -> None:
        def opened(endpoint: str) -> None:
            heard = Heard()
            open_connection(
                endpoint, None, on_reports=print, on_mismatch=print, on_end=heard.end, on_drop=print
            )

        with pytest.raises(TransferConfigError, match="over 107 bytes"):
            opened(f"ipc://{path}{'x' * 108}")
        path.parent.chmod(0o755)
        with pytest.raises(TransferConfigError, match="mode 755"):
            opened(f"ipc://{path}")

    run(scenario())
