"""The client: requests over HTTP/1.1, each on a connection that is idle or new, and when their answers come.

Written on the event loop's protocols and httptools' parser, with one typed decoding of each chunk: what
stands between a server and the clock must cost little beside what it measures. Times are
`time.perf_counter`'s: the event loop's own may be cached and in whole milliseconds.
"""

import asyncio
import ssl
import time
from collections.abc import Callable
from typing import cast

import httptools

from deploy.bench.load.outcome import Outcome
from deploy.bench.load.stream import EventStream, failure_of
from deploy.bench.load.target import Target

_MOST_ERROR_BYTES = 1 << 16
OnEnd = Callable[[], None]


class LoadClient:
    """Sends requests and notes when their answers come, inside a running event loop.

    `on_end` is called once for each request that was sent.
    """

    def __init__(self, target: Target, timeout_s: float, on_end: OnEnd) -> None:
        self._target, self._timeout_s, self._on_end = target, timeout_s, on_end
        self._loop = asyncio.get_running_loop()
        self._tls = ssl.create_default_context() if target.tls else None
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()
        self._connecting: set[asyncio.Task[None]] = set()

    def send(self, outcome: Outcome) -> None:
        """Never waits and raises nothing: what goes wrong is the outcome's failure."""
        outcome.started_s = time.perf_counter()
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                connection.ask(outcome)
                return
        task = self._loop.create_task(self._connect_and_ask(outcome))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    def close(self) -> None:
        for task in self._connecting:
            task.cancel()
        for connection in list(self._open):
            connection.abort()

    async def _connect_and_ask(self, outcome: Outcome) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                _, connection = await self._loop.create_connection(
                    lambda: _Connection(
                        self._loop, self._target.head, self._timeout_s, self._ended, self._open
                    ),
                    self._target.host,
                    self._target.port,
                    ssl=self._tls,
                )
        except TimeoutError:
            self._fail(outcome, "timeout")
        except OSError as error:
            self._fail(outcome, f"connection: {error.strerror or type(error).__name__}")
        else:
            connection.ask(outcome)

    def _fail(self, outcome: Outcome, failure: str) -> None:
        outcome.end(time.perf_counter(), failure)
        self._on_end()

    def _ended(self, connection: "_Connection") -> None:
        if connection.usable:
            self._idle.append(connection)
        self._on_end()


class _Connection(asyncio.Protocol):
    """At most one request at a time. `on_message_complete` and its like are called by httptools."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        head: bytes,
        timeout_s: float,
        on_end: "Callable[[_Connection], None]",
        everyone: "set[_Connection]",
    ) -> None:
        self._loop, self._head, self._timeout_s = loop, head, timeout_s
        self._on_end, self._everyone = on_end, everyone
        self._transport: asyncio.WriteTransport | None = None
        self._outcome: Outcome | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._keep_alive = True
        self._parser = httptools.HttpResponseParser(self)
        self._stream = EventStream()
        self._status = self._new_chunks = 0
        self._error_body = b""
        self._complete = False

    @property
    def usable(self) -> bool:
        return self._keep_alive and self._transport is not None and not self._transport.is_closing()

    def ask(self, outcome: Outcome) -> None:
        """One request; the answer is written into the outcome."""
        self._outcome = outcome
        if not self.usable or self._transport is None:
            self._end("connection: closed by the server")
            return
        self._parser = httptools.HttpResponseParser(self)
        self._status, self._stream, self._error_body = 0, EventStream(), b""
        self._timer = self._loop.call_later(self._timeout_s, self._expire)
        body = outcome.planned.body
        self._transport.write(b"%s%d\r\n\r\n%s" % (self._head, len(body), body))

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # ------------------------------------------------------------ the event loop's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(
            asyncio.WriteTransport, transport
        )  # uvloop's derives from no class of asyncio's
        self._everyone.add(self)

    def data_received(self, data: bytes) -> None:
        if self._outcome is None:
            self.abort()  # an answer that nobody asked for
            return
        self._new_chunks = 0
        now_s = time.perf_counter()
        outcome = self._outcome
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._keep_alive = False
            self._end("unreadable answer")
        if self._new_chunks:
            outcome.arrived_s.append(now_s)
            outcome.chunks.append(self._new_chunks)
        if self._complete:
            self._end(self._failure())

    def connection_lost(self, error: Exception | None) -> None:
        self._keep_alive = False
        self._everyone.discard(self)
        if self._outcome is not None:
            self._end("connection: lost before the answer's end")

    # ------------------------------------------------------------ httptools' calls

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        self._keep_alive = bool(self._parser.should_keep_alive())

    def on_body(self, body: bytes) -> None:
        if self._status == 200:
            self._new_chunks += self._stream.feed(body)
        elif len(self._error_body) < _MOST_ERROR_BYTES:
            self._error_body += body

    def on_message_complete(self) -> None:
        self._complete = True

    # ------------------------------------------------------------ the end

    def _failure(self) -> str | None:
        if self._status != 200:
            return failure_of(self._status, self._error_body)
        if self._stream.failure is None and not self._stream.finished:
            return "stream ended without [DONE]"
        return self._stream.failure

    def _expire(self) -> None:
        self._keep_alive = False
        self._end("timeout")
        self.abort()

    def _end(self, failure: str | None) -> None:
        outcome, self._outcome, self._complete = self._outcome, None, False
        if self._timer is not None:
            self._timer.cancel()
        if outcome is not None:
            outcome.completion_tokens = self._stream.completion_tokens if self._status == 200 else None
            outcome.end(time.perf_counter(), failure)
            self._on_end(self)
