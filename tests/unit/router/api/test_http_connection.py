"""A connection takes what HTTP is, however it is cut to pieces, answers what is not, and keeps little."""

import asyncio
import json
import random
import socket

import pytest

from router.api.framing import MAX_HEAD_BYTES, MAX_HEADERS
from router.api.http_connection import MAX_UNREAD_BYTES
from tests.patience import patient
from tests.unit.router.api.connections import Client, played, state

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
READ_BYTES = 256 << 10
"""What one read of the loop may bring at most."""
GET = b"GET /behind HTTP/1.1\r\nhost: x\r\n\r\n"

BODY = b'{"prompt": "Prefill is", "max_tokens": 3}'
OFFERS = {
    "none": b"",
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n",
    "websocket": b"Connection: keep-alive, upgrade\r\nUpgrade: WebSocket\r\nSec-WebSocket-Key: eA==\r\n",
    "both": b"Upgrade: TLS/1.0, h2c\r\nConnection: upgrade\r\n",
    "unannounced": b"Upgrade: h2c\r\n",
}


def chunked(body: bytes, draw: random.Random) -> bytes:
    """With extensions and trailers, as it may be."""
    out, at = b"", 0
    while at < len(body):
        size = draw.randint(1, len(body) - at)
        extension = draw.choice((b"", b";a", b' ;a="b c"'))
        out += b"%x%s\r\n%s\r\n" % (size, extension, body[at : at + size])
        at += size
    return out + draw.choice((b"0\r\n\r\n", b"000;z\r\nx-sum: 1\r\nx-b:\r\n\r\n"))


def request(offer: bytes, is_chunked: bool, draw: random.Random, path: bytes = b"/echo") -> bytes:
    head = b"POST %s?a=b HTTP/1.1\r\nHost: x:1\r\n%s" % (path, offer)
    if is_chunked:
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(BODY, draw)
    return head + b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("offer", OFFERS)
def test_a_request_is_what_it_is_however_it_arrives(
    offer: str, is_chunked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    draw = random.Random(f"{offer} {is_chunked}")
    raw = b"\r\n" + request(OFFERS[offer], is_chunked, draw) + GET
    at_head = raw.index(b"\r\n\r\n") + 4
    ways: list[list[int]] = [[], [at_head], list(range(1, len(raw)))]
    ways += [sorted(draw.sample(range(1, len(raw)), 3)) for _ in range(5)]

    echoed = json.dumps(["/echo", len(BODY), BODY.decode()]).encode()

    async def scenario(client: Client) -> None:
        for cuts in ways:
            ends = [*cuts, len(raw)]
            await client.send(*[raw[a:b] for a, b in zip([0, *ends], ends, strict=False)])
            await client.until(echoed, b'["/behind", 0, ""]')
        assert client.echo.seen == [("POST", "/echo", BODY), ("GET", "/behind", b"")] * len(ways)

    played(scenario)
    assert not caplog.records


LINES = b"GET / HTTP/1.1\r\nhost: x\r\n"
POST = b"POST / HTTP/1.1\r\nhost: x\r\n"
REFUSED = {
    "endless line": (b"GET /" + b"y" * MAX_HEAD_BYTES, 414),
    "endless header": (LINES + b"x-a: " + b"y" * MAX_HEAD_BYTES, 431),
    "endless name": (LINES + b"y" * MAX_HEAD_BYTES, 431),
    "large": (LINES + b"x-a: " + b"y" * MAX_HEAD_BYTES + b"\r\n\r\n", 431),
    "many": (LINES + b"a: b\r\n" * MAX_HEADERS + b"\r\n", 431),
    "many and endless": (LINES + b"a: b\r\n" * (MAX_HEAD_BYTES // 6), 431),
    "tls": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "no http": (b"hello\r\n", 400),
    "http2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "version 2": (b"GET / HTTP/2.0\r\nhost: x\r\n\r\n", 505),
    "version 0.9": (b"GET /\r\n\r\n", 505),
    "version 3": (b"GET / HTTP/3.0\r\nhost: x\r\n\r\n", 400),
    "line feeds": (b"GET / HTTP/1.1\nhost: x\n\n", 400),
    "folded": (LINES + b" y: z\r\n\r\n", 400),
    "space in name": (LINES + b"a : b\r\n\r\n", 400),
    "zero byte": (LINES + b"a: \0\r\n\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (LINES + b"Host: y\r\n\r\n", 400),
    "bad host": (b"GET / HTTP/1.1\r\nhost: a b\r\n\r\n", 400),
    "two hosts of old": (b"GET / HTTP/1.0\r\nhost: x\r\nhost: y\r\n\r\n", 400),
    "two lengths": (POST + b"content-length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
    "list of lengths": (POST + b"content-length: 1, 2\r\n\r\nab", 400),
    "signed length": (POST + b"content-length: +1\r\n\r\na", 400),
    "huge length": (POST + b"content-length: 99999999999999999999999\r\n\r\na", 400),
    "length and chunks": (POST + b"content-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "chunks and length": (POST + b"transfer-encoding: chunked\r\ncontent-length: 1\r\n\r\n0\r\n\r\n", 400),
    "chunks twice": (POST + b"transfer-encoding: chunked, chunked\r\n\r\n0\r\n\r\n", 400),
    "chunks of old": (b"POST / HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "gzip": (POST + b"transfer-encoding: gzip\r\n\r\n", 501),
    "gzip in chunks": (POST + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    "identity": (POST + b"transfer-encoding: identity\r\n\r\n", 501),
    "proxy": (b"CONNECT a:443 HTTP/1.1\r\nhost: a\r\n\r\n", 501),
}  # fmt: skip


def is_refusal(got: bytes, status: int) -> bool:
    head, _, body = got.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    return (
        head.startswith(b"HTTP/1.1 %d " % status)
        and b"\r\nconnection: close" in head
        and b"\r\nx-request-id: req-" in head
        and b"content-length: %d\r\n" % len(body) in head
        and set(error) == {"message", "type", "param", "code"}
    )


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_answered_once_and_the_connection_ends(case: str, behind: bool) -> None:
    raw, status = REFUSED[case]

    async def scenario(client: Client) -> None:
        if behind:  # in the same packet as a request that is fine
            await client.send(GET + raw)
        else:
            await client.send(raw[: len(raw) // 2], raw[len(raw) // 2 :])
        got = await client.until()
        if behind:
            first, mark, got = got.partition(b'["/behind", 0, ""]')
            assert first.startswith(b"HTTP/1.1 200 ") and mark
        assert is_refusal(got, status), got
        assert client.echo.seen == ([("GET", "/behind", b"")] if behind else [])
        client.end.shutdown(socket.SHUT_WR)

    played(scenario)


def test_the_largest_head_is_taken() -> None:
    async def scenario(client: Client) -> None:
        for more, status in ((0, b"200"), (1, b"431")):
            room = MAX_HEAD_BYTES - len(LINES) - len(b"a: \r\n\r\n")
            await client.send(LINES + b"a: " + b"y" * (room + more) + b"\r\n\r\n")
            assert (await client.until(b"HTTP/1.1 " + status)) is not None
        await client.until()
        assert len(client.echo.seen) == 1

    played(scenario)


BROKEN = {
    "size": (b"xyz\r\n", 400),
    "negative": (b"-1\r\n", 400),
    "long": (b"2\r\nabc\r\n", 400),
    "line feed": (b"2\nab\r\n", 400),
    "trailer": (b"0\r\nno header\r\n\r\n", 400),
    "extension": (b"2;" + b"x" * 5000 + b"\r\n", 431),
    "extensions": ((b"1;" + b"x" * 4000 + b"\r\na\r\n") * 20, 431),
    "trailers": (b"0\r\n" + b"a: b\r\n" * 20000, 431),
    "trailer without end": (b"0\r\na:" + b"b" * 5000, 431),
}


@pytest.mark.parametrize("path", [b"/echo", b"/early"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_body_that_breaks_off_is_no_request(case: str, path: bytes) -> None:
    raw, status = BROKEN[case]

    async def scenario(client: Client) -> None:
        await client.send(request(b"", True, random.Random(1), path).partition(b"\r\n\r\n")[0] + b"\r\n\r\n")
        if path == b"/early":
            assert (await client.until(b'["/early", 0, ""]')).startswith(b"HTTP/1.1 200 ")
        await client.send(b"3\r\nabc\r\n" + raw)
        got = await client.until()
        if path == b"/echo":
            assert is_refusal(got, status), got
            await state(lambda: client.echo.gone == 1)
            assert not client.echo.seen
        else:
            assert got == b""
        client.end.shutdown(socket.SHUT_WR)

    played(scenario)


@pytest.mark.parametrize("case", ["head", "behind a held answer", "behind an answer unread", "after the end"])
def test_nothing_grows(case: str) -> None:
    """A client that sends without end, where nobody reads."""
    endless = b"GET / HTTP/1.1\r\nhost: x\r\nx-a: "
    before = {
        "head": endless,
        "behind a held answer": b"GET /held HTTP/1.1\r\nhost: x\r\n\r\n" + GET,
        "behind an answer unread": POST.replace(b"/ ", b"/early ") + b"content-length: 99999999\r\n\r\n",
        "after the end": b"\x16\x03\x01",
    }[case]

    async def scenario(client: Client) -> None:
        sent = asyncio.create_task(client.send(before, *[b"y" * 65536] * 100))
        for _ in range(200):
            await asyncio.sleep(0)
            held = len(client.connection._buffer) + (
                len(client.connection.cycle.body) if client.connection.cycle else 0
            )
            assert held <= MAX_UNREAD_BYTES + 2 * READ_BYTES
        sent.cancel()
        client.echo.release.set()

    played(scenario)


def test_a_pipeline_is_answered_in_order_one_at_a_time() -> None:
    async def scenario(client: Client) -> None:
        await client.send(b"GET /held HTTP/1.1\r\nhost: x\r\n\r\n" + GET * 300)
        await state(lambda: bool(client.echo.seen))
        for _ in range(20):
            await asyncio.sleep(0)
        assert client.echo.seen == [("GET", "/held", b"")]
        client.echo.release.set()
        got = b""
        while got.count(b'["/behind", 0, ""]') < 300:
            got += await client.until(b"]")
        assert len(client.echo.seen) == 301

    played(scenario)


def test_many_small_chunks_are_taken_in_turns() -> None:
    """A neighbour's callback runs in between."""
    body = b"x" * 20_000
    raw = POST.replace(b"/ ", b"/echo ") + b"transfer-encoding: chunked\r\n\r\n"
    raw += b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"

    async def scenario(client: Client) -> None:
        turns = 0

        def count() -> None:
            nonlocal turns
            turns += 1
            if not client.echo.seen:
                asyncio.get_running_loop().call_soon(count)

        client.connection.data_received(raw)
        count()
        await state(lambda: bool(client.echo.seen))
        assert client.echo.seen == [("POST", "/echo", body)]
        assert turns >= 20_000 // 1024
        await client.until(b"]")

    played(scenario)


def test_http_1_0_gets_no_chunks_and_an_end() -> None:
    async def scenario(client: Client) -> None:
        await client.send(b"POST /stream HTTP/1.0\r\ncontent-length: 2\r\n\r\nhi")
        got = await client.until()
        head, _, body = got.partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head and head.count(b"connection: close") == 1
        assert body == b'["/stream", 2, "hi"]'

    played(scenario)


def test_leave_to_send_a_body_is_given_where_it_is_read() -> None:
    head = b"POST %s HTTP/1.1\r\nhost: x\r\nExpect: 100-Continue\r\ncontent-length: 2\r\n\r\n"

    async def read(client: Client) -> None:
        await client.send(head % b"/echo")
        assert await client.until(b"100 Continue\r\n\r\n") == CONTINUE
        await client.send(b"hi" + GET)
        assert b"connection: close" not in await client.until(b'["/echo", 2, "hi"]', b"/behind")

    async def unread(client: Client) -> None:
        await client.send(head % b"/early")
        got = await client.until()
        assert CONTINUE not in got and b"\r\nconnection: close\r\n" in got
        client.end.shutdown(socket.SHUT_WR)

    played(read)
    played(unread)


def test_an_idle_connection_stays_for_its_time_and_a_slow_head_is_told() -> None:
    async def idle(client: Client) -> None:
        assert await client.until() == b""

    async def idle_again(client: Client) -> None:
        await client.send(GET)
        assert (await client.until()).count(b"HTTP/1.1 ") == 1

    async def slow(client: Client) -> None:
        await client.send(GET, GET[:9])
        got = await client.until()
        assert is_refusal(got.partition(b'""]')[2], 408)

    async def not_yet(client: Client) -> None:
        """Neither the time for a request nor empty lines end it, or keep it."""
        await client.send(b"\r\n")
        await asyncio.sleep(0.2)
        await client.send(GET)
        await client.until(b'["/behind", 0, ""]')

    played(idle, idle_s=0.05)
    played(idle_again, idle_s=0.05)
    played(slow, upload_s=0.05)
    played(not_yet, upload_s=0.05)


def test_idle_connections_end_with_the_server() -> None:
    async def idle(client: Client) -> None:
        await client.send(GET)
        await client.until(b'["/behind", 0, ""]')
        client.connection.shutdown()
        assert await client.until() == b""

    async def busy(client: Client) -> None:
        await client.send(b"GET /held HTTP/1.1\r\nhost: x\r\n\r\n")
        await state(lambda: bool(client.echo.seen))
        client.connection.shutdown()
        client.echo.release.set()
        assert b"connection: close" in await client.until()

    played(idle)
    played(busy)


def test_who_never_stops_is_cut_off() -> None:
    """What follows a refusal is thrown away, but not for ever."""

    async def scenario(client: Client) -> None:
        sending = asyncio.create_task(client.send(b"\x16", *[b"y" * 65536] * 1000))
        await asyncio.wait([sending], timeout=patient(20.0))
        assert isinstance(sending.exception(), OSError)

    played(scenario)
