"""Checks of the headers that change what a request's body means: the server honours them, or refuses the
request with the status that says so.
"""

import re
from collections.abc import Iterable

from router.errors import ApiError

Headers = Iterable[tuple[bytes, bytes]]

_CONCERNED = frozenset(
    (
        b"content-type",
        b"content-encoding",
        b"content-range",
        b"content-transfer-encoding",
        b"expect",
    )
)
_RARE = frozenset(
    (
        b"content-encoding",
        b"content-range",
        b"content-transfer-encoding",
        b"expect",
        b"origin",
        b"sec-fetch-site",
    )
)
_JSON = b"application/json"
_CHARSET = re.compile(rb";\s*charset\s*=\s*\"?([^\";,\s]*)", re.IGNORECASE)
_CHARSETS = frozenset((b"utf-8", b"utf8", b"us-ascii", b"ascii"))
_PLAIN = frozenset((b"7bit", b"8bit", b"binary"))


def is_plain(headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether nothing in a POST's headers needs a second look: so it is with nearly all of them."""
    given = dict(headers)
    return (
        len(given) == len(headers) and given.get(b"content-type", _JSON) == _JSON and _RARE.isdisjoint(given)
    )


def media_type(headers: Headers) -> bytes:
    """The content type in lower case, without its parameters; empty where there is none."""
    for name, value in headers:
        if name == b"content-type":
            return value.partition(b";")[0].strip().lower()
    return b""


def check_content(headers: Headers) -> None:
    """Raises ApiError 400 or 415 for a body that is not whole JSON in UTF-8, as its headers have it."""
    concerned = [(name, value.strip()) for name, value in headers if name in _CONCERNED]
    types = [value for name, value in concerned if name == b"content-type"]
    if len(types) > 1:
        raise ApiError(400, f"The request has {len(types)} Content-Type headers, and needs one.")
    for name, value in concerned:
        if name == b"content-type":
            _check_charset(value)
        elif name == b"content-encoding":
            _check_encoding(value)
        elif name == b"content-range":
            raise ApiError(400, "A POST's body is whole: Content-Range is not supported.")
        elif name == b"content-transfer-encoding" and value.lower() not in _PLAIN:
            raise ApiError(415, "Content-Transfer-Encoding is not supported: the body must be JSON.")


def check_expectations(headers: Headers) -> None:
    """Raises ApiError 417 for anything but the wait for leave to send a body (RFC 9110, 10.1.1)."""
    for name, value in headers:
        if name == b"expect" and value.strip().lower() not in (b"100-continue", b""):
            raise ApiError(417, "The only expectation that this server meets is 100-continue.")


def _check_charset(value: bytes) -> None:
    for charset in _CHARSET.findall(value):
        if charset.lower() not in _CHARSETS:
            raise ApiError(
                415,
                "The body must be JSON in UTF-8: another charset is not supported.",
                code="unsupported_media_type",
            )


def _check_encoding(value: bytes) -> None:
    codings = {coding.strip().lower() for coding in value.split(b",")}
    if not codings <= {b"identity", b""}:
        raise ApiError(
            415,
            "The body must come as it is: Content-Encoding other than identity is not supported.",
            code="unsupported_content_encoding",
        )
