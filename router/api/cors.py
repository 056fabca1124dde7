"""The server's side of CORS (the Fetch standard): which web pages may use it.

By default none may: a browser then keeps every answer from pages of other origins. With `allowed_origins` the
server answers preflights of those pages before it looks at a key, since a browser sends none with them, and
every answer says that the page may read it. The server never asks for a browser's own credentials (cookies).

A page of any origin can still make a browser send a POST, without asking first, as long as its content type
is one that a form may have. From a page of a foreign origin the server therefore demands JSON's, which no
form has.
"""

import re
from collections.abc import MutableMapping, Sequence
from typing import Any

from router.api.asgi import Header, Response, Scope, Send, header
from router.api.content_headers import Headers, media_type
from router.errors import ApiError

MAX_AGE_S = 600
_ASKED = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z, \t-]{0,4096}\Z")
_ALWAYS = b"authorization, content-type, x-api-key, x-request-id"
_READABLE = b"x-request-id, retry-after, x-should-retry"
_DEFAULT_PORTS = {b"http": b":80", b"https": b":443"}


class Origins:
    """The origins whose pages may use the server. `allowed` has them as browsers write them, in lower case
    and without a default port; or `*` alone."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self._allowed = frozenset(origin.encode() for origin in allowed)
        self._all = b"*" in self._allowed

    def let_through(self, origin: bytes, send: Send) -> Send:
        """A `send` that adds the headers by which the browser knows what it may do with the answer."""
        if not self._allowed:
            return send
        shared = self._shared(origin)

        async def sharing(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *shared]}
            await send(message)

        return sharing

    async def answer_preflight(self, scope: Scope, origin: bytes, send: Send) -> bool:
        """Answers a preflight from an allowed origin. False: the request is something else."""
        wanted = header(scope, b"access-control-request-method")
        if scope["method"] != "OPTIONS" or wanted is None or not self._allows(origin):
            return False
        asked = header(scope, b"access-control-request-headers") or b""
        names = _ALWAYS + (b", " + asked.strip() if asked.strip() and _ASKED.match(asked) else b"")
        fields = [
            (b"access-control-allow-methods", b"GET, HEAD, POST, OPTIONS"),
            (b"access-control-allow-headers", names),
            (b"access-control-max-age", b"%d" % MAX_AGE_S),
            (b"vary", b"access-control-request-method, access-control-request-headers"),
        ]
        if header(scope, b"access-control-request-private-network") == b"true":
            fields.append((b"access-control-allow-private-network", b"true"))
        await Response(scope, send).empty(fields)
        return True

    def check(self, headers: Headers, host: bytes | None) -> None:
        """Checks a POST's headers. Raises ApiError 415 for one that a page of a foreign origin can have sent
        without the browser having asked."""
        origins = [value.strip() for name, value in headers if name == b"origin"]
        is_foreign = len(origins) > 1 or any(self._is_foreign(origin, host) for origin in origins)
        if not origins:
            sites = [value.strip().lower() for name, value in headers if name == b"sec-fetch-site"]
            is_foreign = b"cross-site" in sites and not self._all
        if is_foreign and media_type(headers) != b"application/json":
            raise ApiError(
                415,
                "From a page of another origin the content type must be application/json.",
                code="unsupported_media_type",
            )

    def _is_foreign(self, origin: bytes, host: bytes | None) -> bool:
        scheme, separator, authority = origin.lower().partition(b"://")
        if self._allows(origin):
            return False
        port = _DEFAULT_PORTS.get(scheme)
        own = (host or b"").strip().lower()
        if port is not None:
            own, authority = own.removesuffix(port), authority.removesuffix(port)
        return not separator or port is None or not own or own != authority

    def _allows(self, origin: bytes) -> bool:
        return self._all or origin.lower() in self._allowed

    def _shared(self, origin: bytes) -> list[Header]:
        fields: list[Header] = [] if self._all else [(b"vary", b"origin")]
        if self._allows(origin):
            fields.append((b"access-control-allow-origin", b"*" if self._all else origin))
            fields.append((b"access-control-expose-headers", _READABLE))
        return fields
