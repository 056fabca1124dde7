"""HTTP/1 framing: where a request begins and ends in a stream of bytes. Pure.

llhttp parses a head, which it gets whole: it joins no piece of a name or value to another, and it never sees
a body, so an offer to upgrade cannot cut one off. This module decides what a head means for the bytes behind
it, by the strict reading of RFC 9112, sections 2 to 7.
"""

import re
import urllib.parse

import httptools
from msgspec import Struct

from router.errors import ApiError

MAX_HEAD_BYTES = 64 << 10
"""Of the request line and all headers; and of all chunk extensions and trailers of one body."""
MAX_HEADERS = 256
MAX_CHUNK_LINE_BYTES = 4 << 10
CHUNKS_A_TURN = 512
"""Other connections wait for so many chunks of one: about a millisecond."""

_HEAD_END = re.compile(rb"\n\r?\n")
_BEGINS = re.compile(rb"[A-Z][A-Z-]{0,31}(?: |\Z)")
_HTTP2 = b"PRI * HTTP/2.0\r\n"
_HOST = re.compile(rb"[A-Za-z0-9._~%!$&'()*+,;=:\[\]-]*\Z")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(;[^\r\n\0]*)?\r\n")
_TRAILER = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*\r\Z")


class Head(Struct, frozen=True, gc=False):
    """A request's line and headers, whose names are in lower case. `body_bytes` None: the body is chunked."""

    method: str
    path: str
    raw_path: bytes
    query: bytes
    version: str
    headers: list[tuple[bytes, bytes]]
    body_bytes: int | None
    keep_alive: bool
    expects_continue: bool


class _ParserCallbacks:
    """What llhttp found in a head, kept by its callbacks."""

    __slots__ = ("headers", "url")

    def __init__(self) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))


def malformed(reason: str) -> ApiError:
    return ApiError(400, f"The HTTP request is not valid: {reason}.", code="invalid_http")


def _too_large(buffer: bytearray) -> ApiError:
    if b"\n" not in buffer[:MAX_HEAD_BYTES]:
        return ApiError(
            414, f"The request line is over the limit of {MAX_HEAD_BYTES} bytes.", code="head_too_large"
        )
    return ApiError(
        431, f"The request's head is over the limit of {MAX_HEAD_BYTES} bytes.", code="head_too_large"
    )


def take_head(buffer: bytearray, searched: int) -> Head | None:
    """Removes a head from the front of `buffer`, of which `searched` bytes were looked at in vain; None while
    it is not whole. Raises ApiError for one that cannot be served; the connection ends with it."""
    found = _HEAD_END.search(buffer, max(0, searched - 2))
    if (len(buffer) if found is None else found.end()) > MAX_HEAD_BYTES:
        raise _too_large(buffer)
    if found is None:
        if not searched and _BEGINS.match(buffer[:33]) is None:
            raise malformed("it does not begin with a method")
        return None
    raw = bytes(buffer[: found.end()])
    del buffer[: found.end()]
    return _read_head(raw)


def _read_head(raw: bytes) -> Head:
    if raw.startswith(_HTTP2):
        raise ApiError(505, "This server speaks HTTP/1.1, not HTTP/2.", code="http_version")
    if raw.count(b"\n") > MAX_HEADERS + 2:
        raise ApiError(431, f"The request has more than {MAX_HEADERS} headers.", code="head_too_large")
    pieces = _ParserCallbacks()
    parser = httptools.HttpRequestParser(pieces)
    try:
        parser.feed_data(raw)
    except httptools.HttpParserUpgrade as offer:
        if parser.get_method() == b"CONNECT":
            raise ApiError(501, "This server is no proxy: CONNECT is not supported.") from offer
        # Nobody has to take an offer (RFC 9110, 7.8): the request is what it is without it.
    except httptools.HttpParserError as error:
        _check_coding(pieces.headers)
        raise malformed(str(error).rstrip(".")) from None
    version = parser.get_http_version()
    if version not in ("1.0", "1.1"):
        raise ApiError(505, f"This server speaks HTTP/1.1, not HTTP/{version}.", code="http_version")
    path, raw_path, query = _target(pieces.url)
    body_bytes, expects_continue = _body_of(pieces.headers, version)
    method, keep_alive = parser.get_method().decode("ascii"), parser.should_keep_alive()
    return Head(
        method, path, raw_path, query, version, pieces.headers, body_bytes, keep_alive, expects_continue
    )


def _check_coding(headers: list[tuple[bytes, bytes]]) -> None:
    for name, value in headers:
        if name == b"transfer-encoding" and value.strip().lower() != b"chunked":
            raise ApiError(
                501, "The only Transfer-Encoding that this server knows is chunked.", code="transfer_encoding"
            )


def _target(url: bytes) -> tuple[str, bytes, bytes]:
    """Path, raw path and query of a request's target in any of its forms."""
    try:
        parsed = httptools.parse_url(url)
    except httptools.HttpParserError:
        raise malformed("its target is no URL") from None
    raw_path = parsed.path or b"/"
    path = raw_path.decode("ascii")
    return urllib.parse.unquote(path) if "%" in path else path, raw_path, parsed.query or b""


def _body_of(headers: list[tuple[bytes, bytes]], version: str) -> tuple[int | None, bool]:
    """How many bytes follow (None: chunks), and whether the client waits for leave to send them. llhttp has
    refused lengths that are not one number, and a length beside chunks."""
    given = dict(headers)
    host = given.get(b"host")
    hosts = 0 if host is None else 1
    if len(given) < len(headers):
        hosts = sum(name == b"host" for name, _ in headers)
    if hosts > 1 or (not hosts and version == "1.1"):
        raise malformed(f"it has {hosts} Host headers, and needs one")
    if host is not None and _HOST.match(host) is None:
        raise malformed("its Host is no name of a host")
    expects = version == "1.1" and given.get(b"expect", b"").strip().lower() == b"100-continue"
    if b"transfer-encoding" not in given:
        return int(given.get(b"content-length", b"0")), expects
    _check_coding(headers)
    if version == "1.0":
        raise malformed("HTTP/1.0 has no Transfer-Encoding")
    return None, expects


class ChunkedBody:
    """The decoder of one chunked body. It drops extensions and trailers, and bounds them."""

    __slots__ = ("_extra_bytes", "_is_last", "_left", "_needs_end", "done")

    def __init__(self) -> None:
        self.done = False
        self._left = self._extra_bytes = 0
        self._needs_end = self._is_last = False

    def take(self, buffer: bytearray) -> bytes:
        """The data of at most CHUNKS_A_TURN chunks, removed from the front of `buffer` with what is around
        it. If the buffer is then as long as before, more has to arrive. Raises ApiError."""
        parts: list[bytearray] = []
        at = 0
        for _ in range(CHUNKS_A_TURN):
            if self._left:
                parts.append(buffer[at : at + self._left])
                at += len(parts[-1])
                self._left -= len(parts[-1])
                self._needs_end = not self._left
            if self._left:
                break
            if self._needs_end and buffer.startswith(b"\r\n", at):
                self._needs_end = False
                at += 2
            found = None if self._needs_end or self._is_last else _CHUNK.match(buffer, at)
            if found is not None:
                self._on_size(found)
                at = found.end()
                continue
            end = buffer.find(b"\n", at, at + MAX_CHUNK_LINE_BYTES)
            if end < 0:
                if len(buffer) - at >= MAX_CHUNK_LINE_BYTES:
                    raise self._too_much()
                break
            self._on_line(buffer[at:end])
            at = end + 1
            if self.done:
                break
        del buffer[:at]
        return b"".join(parts)

    def _on_line(self, line: bytearray) -> None:
        if self._needs_end:
            raise malformed("a chunk is longer than it says")
        if not self._is_last:
            raise malformed("a chunk does not begin with its size")
        if line == b"\r":
            self.done = True
        elif _TRAILER.match(line) is None:
            raise malformed("a trailer is no header")
        else:
            self._count(len(line))

    def _on_size(self, found: re.Match[bytes]) -> None:
        self._left = int(found[1], 16)
        self._is_last = not self._left
        if found[2] is not None:
            if len(found[2]) > MAX_CHUNK_LINE_BYTES:
                raise self._too_much()
            self._count(len(found[2]))

    def _count(self, extra_bytes: int) -> None:
        self._extra_bytes += extra_bytes
        if self._extra_bytes > MAX_HEAD_BYTES:
            raise self._too_much()

    @staticmethod
    def _too_much() -> ApiError:
        return ApiError(
            431,
            f"A line between chunks is over the limit of {MAX_CHUNK_LINE_BYTES} bytes, or all extensions "
            f"and trailers over that of {MAX_HEAD_BYTES}.",
            code="head_too_large",
        )
