"""The server's end of an HTTP connection, which passes one request after the other to the application.

1. Until its first byte a connection may idle for `keep_alive_s`, and again after each answer.
2. It keeps a head, up to a bound, until all of it is there, and then parses it (framing.py).
3. It passes the body on as it comes, and pauses the socket while the application does not read.
4. It leaves what follows unread until the request is answered and its body is over.
5. It answers what is not HTTP once and ends; for a while it still reads and drops what comes, so that the
   answer is not lost in a reset.

The base classes are uvicorn's, for what lies between them and ASGI; the parsing is not. A response's head
leaves in one write with the first part of its body: uvloop makes a system call of each write, and for a
client on the same host that is a second delivery through the kernel, and a second wake-up, before the first
token.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from router.api.framing import ChunkedBody, Head, take_head
from router.errors import ApiError
from router.ids import draw_name

MAX_UNREAD_BYTES = 64 << 10
"""Behind a request that is being answered, and of a body that comes faster than it is read."""
READ_BYTES = 64 << 10
"""More of one connection is not read in one turn of the loop."""
MAX_JOINED_BYTES = 64 << 10
LINGER_S = 2.0
LINGER_BYTES = 32 << 20
"""Of a body that nobody reads: its client may send it to the end before it looks for the answer ..."""
LINGER_HEAD_BYTES = 1 << 20
"""... and of what is no request."""
_HEAD = b"HTTP/1.1 "
_CONTINUE = b"HTTP/1.1 100"
_NEWLINES = b"\r\n"


class JoinedHead(asyncio.Transport):
    """A transport that keeps a response's head until the next write, or until the loop's next turn.

    It calls `stays` before it closes for the first time; True: the connection will close it later."""

    def __init__(
        self,
        transport: asyncio.Transport,
        loop: asyncio.AbstractEventLoop,
        stays: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__()
        self._transport, self._loop, self._stays = transport, loop, stays
        self._stayed = False
        self._head: bytes | None = None

    def write(self, data: Any) -> None:
        head = self._head
        if head is not None:
            self._head = None
            if len(data) <= MAX_JOINED_BYTES:
                self._transport.write(head + data)
            else:
                self._transport.writelines((head, data))
        elif data.startswith(_HEAD) and not data.startswith(_CONTINUE):
            self._head = data
            # A head may be all there is, as in an answer to HEAD.
            self._loop.call_soon(self._flush)
        else:
            self._transport.write(data)

    def write_eof(self) -> None:
        self._flush()
        self._transport.write_eof()

    def close(self) -> None:
        self._flush()
        if self._stayed or self._transport.is_closing() or not self._stays():
            self._transport.close()
        self._stayed = True

    def _flush(self) -> None:
        head, self._head = self._head, None
        if head is not None:
            self._transport.write(head)

    def is_closing(self) -> bool:
        return self._stayed or self._transport.is_closing()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)


class _Flow(FlowControl):
    """Flow control that does not resume reading while the connection has enough unread bytes (`held`)."""

    held = False

    def resume_reading(self) -> None:
        if not self.held:
            super().resume_reading()


class _Expecting100(RequestResponseCycle):
    """A request whose client waits for `100 Continue` before it sends the body. If the answer comes instead,
    the connection ends with it: what comes next may or may not be that body."""

    async def send(self, message: Any) -> None:
        if self.waiting_for_100_continue and self.more_body:
            self.keep_alive = False
        await super().send(message)


class _Http10(RequestResponseCycle):
    """A request of HTTP/1.0, which has no chunks: its answer ends with the connection."""

    async def send(self, message: Any) -> None:
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        if not self.response_started:
            self.response_started = True
            lines = [STATUS_LINE[message["status"]]]
            for name, value in (*self.default_headers, *message.get("headers", ())):
                if name != b"connection":
                    lines += (name, b": ", value, b"\r\n")
            self.transport.write(b"".join((*lines, b"connection: close\r\n\r\n")))
            return
        if self.scope["method"] != "HEAD":
            self.transport.write(message.get("body", b""))
        if not message.get("more_body", False):
            self.response_complete = True
            self.message_event.set()
            self.transport.close()
            self.on_response()


class HttpConnection(HttpToolsProtocol):
    """The protocol of one connection. A request that is not whole after `upload_timeout_s` ends it, unless
    the application answers already: then the endpoint bounds the body's time (`read_body` in asgi.py)."""

    upload_timeout_s = 60.0
    flow: _Flow
    _arrival: asyncio.TimerHandle | None = None
    _linger: asyncio.TimerHandle | None = None
    _lingered_bytes = 0
    _linger_bytes = LINGER_BYTES
    _searched = 0
    _left = 0
    _chunks: ChunkedBody | None = None
    _turn: asyncio.Handle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        joined = JoinedHead(transport, self.loop, self._lingers)
        super().connection_made(joined)
        self.flow = _Flow(joined)
        self._buffer = bytearray()
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._arrival, self._linger, self._turn):
            if timer is not None:
                timer.cancel()
        self._arrival = None
        self._unset_keepalive_if_required()
        self._buffer.clear()
        super().connection_lost(exc)

    # ------------------------------------------------------------ bytes in

    def data_received(self, data: bytes) -> None:
        if self._linger is not None:
            self._lingered_bytes += len(data)
            if self._lingered_bytes > self._linger_bytes:
                self.transport.close()
                return
        else:
            if not self._awaits_head or self._buffer or data.strip(_NEWLINES):
                self._unset_keepalive_if_required()
            self._buffer += data
            if self._turn is None:
                self._advance()
        if len(data) >= READ_BYTES and (self._linger is not None or not self.transport.is_closing()):
            # uvloop reads on as long as there is something, up to 32 times: others come first.
            self._hold()
            if self._turn is None:
                self._turn = self.loop.call_soon(self._advance)

    @property
    def _awaits_head(self) -> bool:
        return not self._left and self._chunks is None

    def _advance(self) -> None:
        """Takes heads and bodies from the front of what has arrived, as far as it can now."""
        self._turn = None
        try:
            while self._buffer and (self._take_head() if self._awaits_head else self._take_body()):
                pass
        except ApiError as error:
            self._refuse(error)
            return
        if len(self._buffer) > MAX_UNREAD_BYTES:
            self._hold()
        elif self.flow.held:
            self.flow.held = False
            self.flow.resume_reading()

    def _hold(self) -> None:
        self.flow.held = True
        self.flow.pause_reading()

    def _take_head(self) -> bool:
        if self.cycle is not None and not self.cycle.response_complete:
            return False
        if self._arrival is None:
            # Empty lines before a request say nothing (RFC 9112, 2.2).
            if self._buffer[0] in _NEWLINES:
                self._buffer = self._buffer.lstrip(_NEWLINES)
            if not self._buffer:
                return False
            self._await_request()
        head = take_head(self._buffer, self._searched)
        if head is None:
            self._searched = len(self._buffer)
            return False
        self._searched = 0
        self._begin(head)
        return True

    def _take_body(self) -> bool:
        """Whether there may be more to take in this turn."""
        chunks = self._chunks
        if chunks is None:
            data = bytes(self._buffer[: self._left])
            del self._buffer[: len(data)]
            self._left -= len(data)
        else:
            before = len(self._buffer)
            data = chunks.take(self._buffer)
            if chunks.done:
                self._chunks = None
            elif self._buffer and len(self._buffer) < before and self._turn is None:
                self._turn = self.loop.call_soon(self._advance)
        if data:
            self.on_body(data)
        if not self._awaits_head:
            return False
        self._end_of_body()
        return True

    def _begin(self, head: Head) -> None:
        self.scope = {
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": head.version,
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme or "http",
            "root_path": self.root_path,
            "headers": head.headers,
            "state": self.app_state.copy(),
            "method": head.method,
            "path": self.root_path + head.path,
            "raw_path": self.root_path.encode("ascii") + head.raw_path,
            "query_string": head.query,
        }
        kind = RequestResponseCycle
        if head.version == "1.0":
            kind = _Http10
        elif head.expects_continue:
            kind = _Expecting100
        self.cycle = kind(
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=head.expects_continue,
            keep_alive=head.keep_alive,
            on_response=self.on_response_complete,
        )
        self._left = head.body_bytes or 0
        self._chunks = ChunkedBody() if head.body_bytes is None else None
        if self._awaits_head:
            self._end_of_body()
        self._start_asgi_task(self.cycle, self.app)

    def on_body(self, body: bytes) -> None:
        cycle = self.cycle
        if cycle.response_complete:
            return
        cycle.body += body
        if len(cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        cycle.message_event.set()

    def _end_of_body(self) -> None:
        self._forget_arrival()
        if not self.cycle.response_complete:
            self.cycle.more_body = False
            self.cycle.message_event.set()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._buffer and not self.transport.is_closing() and self._turn is None:
            self._unset_keepalive_if_required()
            self._turn = self.loop.call_soon(self._advance)

    # ------------------------------------------------------------ what ends a connection

    def _refuse(self, error: ApiError) -> None:
        """Answers what cannot be parsed, and closes. The application that still works on it sees a client
        that is gone."""
        self._forget_arrival()
        self._buffer.clear()
        cycle = self.cycle
        is_answered = cycle is not None and not self._awaits_head and cycle.response_started
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        if not is_answered and not self.transport.is_closing():
            self._write(error)
        self._chunks, self._left = None, 1  # never over
        self._linger_bytes = LINGER_HEAD_BYTES
        self.transport.close()

    def _lingers(self) -> bool:
        """Keeps the connection open for a while if the request is not over: closed at once, the client would
        get a reset in place of the answer."""
        if self._awaits_head:
            return False
        self._linger = self.loop.call_later(LINGER_S, self.transport.close)
        self.transport.write_eof()
        self._buffer.clear()
        self.flow.held = False
        self.flow.resume_reading()
        return True

    def _write(self, error: ApiError) -> None:
        body = error.body()
        lines = [STATUS_LINE[error.status], b"content-type: application/json\r\n"]
        lines.append(b"content-length: %d\r\nx-request-id: req-%s\r\n" % (len(body), draw_name().encode()))
        self.transport.write(b"".join((*lines, b"connection: close\r\n\r\n", body)))

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
        if self._awaits_head:
            took = f"The request did not arrive within {self.upload_timeout_s:g} s."
            self._refuse(ApiError(408, took, code="upload_too_slow"))
        else:
            self.transport.close()


def connection_with(upload_timeout_s: float) -> type[HttpConnection]:
    """The class with this timeout: uvicorn makes the connections, and takes a class."""
    return type("LimitedConnection", (HttpConnection,), {"upload_timeout_s": upload_timeout_s})
