"""An HTTP connection on a real socket, with an application that answers with what it has read."""

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from router.api.http_connection import HttpConnection, connection_with

DEADLINE_S = 20.0


class Echo:
    """Answers with path and body. `/early` is answered unread, `/held` once `release` is set; `/stream` in
    two parts without a length."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, bytes]] = []
        self.gone = 0
        self.release = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, path = b"", scope["path"]
        while path != "/early":
            message = await receive()
            if message["type"] == "http.disconnect":
                self.gone += 1
                return
            body += message["body"]
            if not message["more_body"]:
                break
        self.seen.append((scope["method"], path, body))
        if path == "/held":
            await self.release.wait()
        text = json.dumps([path, len(body), body.decode()]).encode()
        fields = [] if path == "/stream" else [(b"content-length", b"%d" % len(text))]
        await send({"type": "http.response.start", "status": 200, "headers": fields})
        await send({"type": "http.response.body", "body": text[:3], "more_body": True})
        await send({"type": "http.response.body", "body": text[3:]})


class Client:
    def __init__(self, end: socket.socket, connection: HttpConnection, echo: Echo) -> None:
        self.end, self.connection, self.echo = end, connection, echo
        self._loop = asyncio.get_running_loop()

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            await self._loop.sock_sendall(self.end, piece)
            await asyncio.sleep(0)

    async def until(self, *marks: bytes) -> bytes:
        """What comes, until it holds all marks; or, without any, until the end."""
        got = b""
        async with asyncio.timeout(DEADLINE_S):
            while not marks or not all(mark in got for mark in marks):
                part = await self._loop.sock_recv(self.end, 1 << 16)
                if not part:
                    assert not marks, got
                    return got
                got += part
        return got


async def state(condition: Callable[[], bool]) -> None:
    """Polls it in the loop's turns, with a deadline."""
    end_s = asyncio.get_running_loop().time() + DEADLINE_S
    while not condition():
        assert asyncio.get_running_loop().time() < end_s
        await asyncio.sleep(0)


Scenario = Callable[[Client], Awaitable[None]]


def played(scenario: Scenario, upload_s: float = 30.0, idle_s: float = 30.0) -> None:
    async def run() -> None:
        echo = Echo()
        config = uvicorn.Config(
            echo,
            http=connection_with(upload_s),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_keep_alive=idle_s,  # type: ignore[arg-type]
        )
        config.load()
        loop, server = asyncio.get_running_loop(), ServerState()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        connection = connection_with(upload_s)(config, server, {}, loop)
        transport, _ = await loop.connect_accepted_socket(lambda: connection, theirs)
        with ours:
            await scenario(Client(ours, connection, echo))
        await state(lambda: not server.connections and not server.tasks)
        transport.close()

    asyncio.run(run())
