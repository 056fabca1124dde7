"""uvicorn's HTTP connection, with a response's head and the first part of its body in one write, and with a
limit on how long a request may take to arrive.

uvicorn writes them one after the other, and uvloop makes a system call of each. For a client on the same host
that is a second delivery through the kernel, and a second wake-up of the client, before the first token.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from router.errors import ApiError

_LATE = (
    b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
    b"connection: close\r\n\r\n%s"
)
_HEAD = b"HTTP/1.1 "
_CONTINUE = b"HTTP/1.1 100"


class JoinedHead(asyncio.Transport):
    """A transport that keeps a response's head until the next write, or until the loop's next turn."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._transport, self._loop = transport, loop
        self._head: bytes | None = None

    def write(self, data: Any) -> None:
        head = self._head
        if head is not None:
            self._head = None
            self._transport.write(head + data)
        elif data.startswith(_HEAD) and not data.startswith(_CONTINUE):
            self._head = data
            # A head may be all there is, as in an answer to HEAD.
            self._loop.call_soon(self._flush)
        else:
            self._transport.write(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        head, self._head = self._head, None
        if head is not None:
            self._transport.write(head)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)


class HttpConnection(HttpToolsProtocol):
    """A request that is not whole after `upload_timeout_s` ends the connection, unless it is being answered:
    then its body is the endpoint's business (`read_body` in http.py)."""

    upload_timeout_s = 60.0
    _arrival: asyncio.TimerHandle | None = None
    _head_arrives = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(JoinedHead(transport, self.loop))
        self._await_request()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_arrives = True
        if self._arrival is None:
            self._await_request()

    def on_headers_complete(self) -> None:
        self._head_arrives = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._forget_arrival()
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_arrival()
        super().connection_lost(exc)

    def _await_request(self) -> None:
        self._arrival = self.loop.call_later(self.upload_timeout_s, self._on_late)

    def _forget_arrival(self) -> None:
        if self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None

    def _on_late(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._await_request()  # an answer is under way: what comes behind it must not cut it off
            return
        self._arrival = None
        if self._head_arrives:
            body = ApiError(
                408, f"The request did not arrive within {self.upload_timeout_s:g} s.", code="upload_too_slow"
            ).body()
            self.transport.write(_LATE % (len(body), body))
        self.transport.close()


def connection_with(upload_timeout_s: float) -> type[HttpConnection]:
    """uvicorn makes the connections, and takes a class."""
    return type("LimitedConnection", (HttpConnection,), {"upload_timeout_s": upload_timeout_s})
