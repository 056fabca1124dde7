"""Every error a client can get, as one tree; each has OpenAI's shape on the wire.

{"error": {"message": str, "type": str, "param": str | null, "code": str | null}}
"""

import re

import msgspec

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer with `status` instead of a result.

    `retry_after_s` becomes a `retry-after` header. `committed` says that a worker had begun: the client
    library must not repeat the work by itself (`x-should-retry: false`). `retry_reason` is why the router may
    run the request again by itself, as a label of its metrics; None: it may not.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        committed: bool = False,
        retry_reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s, self.committed = retry_after_s, committed
        self.retry_reason = retry_reason

    def body(self) -> bytes:
        """The JSON body."""
        return msgspec.json.encode(
            {
                "error": {
                    "message": self.message,
                    "type": _TYPES.get(self.status) or _general_type(self.status),
                    "param": self.param,
                    "code": self.code,
                }
            }
        )

    def headers(self) -> list[tuple[bytes, bytes]]:
        headers: list[tuple[bytes, bytes]] = []
        if self.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % self.retry_after_s))
        if self.committed:
            headers.append((b"x-should-retry", b"false"))
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if self.code == "unsupported_content_encoding":
            headers.append((b"accept-encoding", b"identity"))
        if self.status in (408, 413, 417):
            # What is left of the body is never read, so the connection cannot be used again.
            headers.append((b"connection", b"close"))
        return headers


def _general_type(status: int) -> str:
    return "invalid_request_error" if status < 500 else "internal_server_error"


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def crashed(committed: bool = False) -> ApiError:
    """For what nobody foresaw; the log says more."""
    return ApiError(500, "The server failed on this request.", code="internal_error", committed=committed)


_AT_PATH = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_MISSING = re.compile(r"missing required field `(?P<name>\w+)`$")


def from_decoding(error: Exception) -> ApiError:
    """A body that msgspec could not decode; `param` is the path of the field it stumbled over."""
    text = str(error)
    found = _AT_PATH.search(text)
    path = found["path"].replace("[...]", "") if found else ""
    reason = text[: found.start()] if found else text
    missing = _MISSING.search(reason)
    if missing is not None:
        param = f"{path}.{missing['name']}".lstrip(".")
        return invalid(f"'{param}' is missing.", param)
    if path:
        return invalid(f"'{path}': {reason[:1].lower()}{reason[1:]}.", path)
    if isinstance(error, msgspec.ValidationError):
        return invalid(f"The request body is not valid: {reason}.")
    return invalid(f"The request body is not valid JSON: {reason}.", code="invalid_json")
