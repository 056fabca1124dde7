"""The trace of one request, from the router's `GET /trace/{label}`."""

import urllib.error
import urllib.parse
import urllib.request

import msgspec

from router.routing.traces import RequestTrace

_TIMEOUT_S = 60.0
_MAX_BYTES = 64 << 20


class TraceUnavailable(Exception):
    """One line: who could not be asked, or does not know the request."""


def fetch_trace(url: str, label: str, api_key: str | None) -> RequestTrace:
    """Raises TraceUnavailable."""
    if not url.startswith(("http://", "https://")):
        raise TraceUnavailable(f"--url: {url!r} is not an http:// or https:// address")
    address = f"{url.rstrip('/')}/trace/{urllib.parse.quote(label, safe='')}"
    request = urllib.request.Request(address)
    if api_key is not None:
        request.add_header("Authorization", f"Bearer {api_key}")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            body = answer.read(_MAX_BYTES)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            raise TraceUnavailable(f"REQUEST_ID: {url} remembers no request {label!r}") from None
        hint = "; give --api-key" if error.code in (401, 403) else ""
        raise TraceUnavailable(f"--url: {address} answered {error.code}{hint}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise TraceUnavailable(f"--url: {address} cannot be reached: {reason}") from None
    try:
        return msgspec.json.decode(body, type=RequestTrace)
    except msgspec.MsgspecError as error:
        raise TraceUnavailable(f"--url: {address} did not answer with a trace: {error}") from None
