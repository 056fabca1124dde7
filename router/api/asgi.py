"""ASGI without a framework: reading a request's body up to a limit, and writing its answer."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping, Sequence
from typing import Any, TypeVar

from router.errors import ApiError
from router.ids import draw_name

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Header = tuple[bytes, bytes]
Body = bytes | bytearray
Result = TypeVar("Result")

JSON = b"application/json"
TEXT = b"text/plain; charset=utf-8"
EVENT_STREAM = b"text/event-stream; charset=utf-8"

_NOT_IN_A_LABEL = re.compile(r"[^A-Za-z0-9._:@/+=-]")
MAX_LABEL_CHARACTERS = 128


class ClientGone(Exception):
    """The client closed the connection: nobody is there to be answered."""


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of this name, in lower case."""
    for key, value in scope["headers"]:
        if key == name:
            found: bytes = value
            return found
    return None


def label_of(given: bytes | None) -> str:
    """The client's name for its request (`x-request-id`) without unsafe characters, or a new one where there
    is none. It is a label, and never a key."""
    text = _NOT_IN_A_LABEL.sub("", given.decode("latin-1"))[:MAX_LABEL_CHARACTERS] if given else ""
    return text or f"req-{draw_name()}"


def label_header(scope: Scope) -> Header:
    """The header that every answer carries; the gate has put the label into the scope."""
    return (b"x-request-id", scope["baton.label"])


async def attended(
    work: Coroutine[Any, Any, Result], receive: Receive, timeout_s: float, limit_s: float
) -> Result:
    """The result of `work`, which is cancelled if the client goes away (ClientGone) or after `timeout_s`, the
    rest of `limit_s` (ApiError 504)."""
    loop = asyncio.get_running_loop()
    task, gone = loop.create_task(work), loop.create_task(until_gone(receive))
    try:
        await asyncio.wait((task, gone), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ClientGone
        raise overdue(limit_s)
    finally:
        task.cancel()
        gone.cancel()


async def until_gone(receive: Receive) -> None:
    """Waits until the client closes the connection."""
    # Anything else that the client sends now is of no interest.
    while (await receive())["type"] != "http.disconnect":
        pass


def overdue(limit_s: float, committed: bool = False) -> ApiError:
    return ApiError(
        504, f"The request was not done within {limit_s:g} s.", code="deadline_exceeded", committed=committed
    )


def _too_large(limit_bytes: int) -> ApiError:
    return ApiError(413, f"The request body is over the limit of {limit_bytes} bytes.", code="body_too_large")


async def read_body(scope: Scope, receive: Receive, limit_bytes: int, timeout_s: float) -> Body:
    """The request's body. Raises ApiError 413 as soon as it is known to be over the limit, with no more than
    that kept, and 408 for one that is not whole after `timeout_s`; ClientGone."""
    length = header(scope, b"content-length")
    if length is not None and length.isdigit() and int(length) > limit_bytes:
        raise _too_large(limit_bytes)
    try:
        async with asyncio.timeout(timeout_s):
            return await _read_parts(receive, limit_bytes)
    except TimeoutError:
        raise ApiError(
            408, f"The request body did not arrive within {timeout_s:g} s.", code="upload_too_slow"
        ) from None


async def _read_parts(receive: Receive, limit_bytes: int) -> Body:
    body: Body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        if len(body) + len(part) > limit_bytes:
            raise _too_large(limit_bytes)
        if not body:
            body = part
        else:
            # Grown as it comes: to join megabytes at the end takes milliseconds.
            body = bytearray(body) if isinstance(body, bytes) else body
            body += part
        if not message.get("more_body", False):
            return body


class Response:
    """The answer to one request, with the request's label in its head. `begun`: the status is out."""

    __slots__ = ("_label", "_send", "begun")

    def __init__(self, scope: Scope, send: Send) -> None:
        self._label, self._send = label_header(scope), send
        self.begun = False

    async def begin(self, status: int, headers: Sequence[Header]) -> None:
        self.begun = True
        fields = [*headers, self._label]
        await self._send({"type": "http.response.start", "status": status, "headers": fields})

    async def part(self, body: bytes, last: bool) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": not last})

    async def whole(
        self, status: int, body: bytes, content_type: bytes = JSON, headers: Sequence[Header] = ()
    ) -> None:
        fields = ((b"content-type", content_type), (b"content-length", b"%d" % len(body)), *headers)
        await self.begin(status, fields)
        await self.part(body, last=True)

    async def pieces(self, status: int, pieces: Sequence[bytes]) -> None:
        """A JSON body in pieces, which are too long to be joined."""
        size_bytes = sum(map(len, pieces))
        await self.begin(status, ((b"content-type", JSON), (b"content-length", b"%d" % size_bytes)))
        for piece in pieces:
            await self.part(piece, last=piece is pieces[-1])

    async def empty(self, headers: Sequence[Header]) -> None:
        await self.begin(204, headers)
        await self.part(b"", last=True)

    async def error(self, error: ApiError) -> None:
        await self.whole(error.status, error.body(), headers=error.headers())
