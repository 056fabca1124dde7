"""The answer to a streamed completion, from the bytes of its body: chunks, usage, errors. Pure."""

import msgspec
from msgspec import Struct


class _Choice(Struct):
    text: str = ""
    finish_reason: str | None = None


class _Usage(Struct):
    completion_tokens: int | None = None


class _Error(Struct):
    code: str | int | None = None
    type: str | None = None


class _Chunk(Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | str | None = None


class _ErrorBody(Struct):
    error: _Error | str | None = None


_CHUNKS = msgspec.json.Decoder(_Chunk)
_ERRORS = msgspec.json.Decoder(_ErrorBody)
MOST_LINE_BYTES = 1 << 22


class EventStream:
    """Server-sent events, one `data:` line each, in whatever pieces they come.

    A chunk brings a token if it has text, or none but does not end a choice either (a token whose characters
    are not whole yet, as some servers send it). The chunk that only gives a finish reason brings none.
    """

    __slots__ = ("_rest", "completion_tokens", "failure", "finished")

    def __init__(self) -> None:
        self._rest = b""
        self.completion_tokens: int | None = None
        self.failure: str | None = None
        self.finished = False

    def feed(self, data: bytes) -> int:
        """How many chunks with tokens are complete now. What cannot be read becomes `failure`."""
        found = 0
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > MOST_LINE_BYTES:
            self.failure = "unreadable answer"
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                self.finished = True
                continue
            try:
                chunk = _CHUNKS.decode(payload)
            except msgspec.MsgspecError:
                self.failure = "unreadable answer"
                continue
            if chunk.error is not None:
                self.failure = f"error in the stream: {_name(chunk.error)}"
            if chunk.usage is not None:
                self.completion_tokens = chunk.usage.completion_tokens
            found += any(choice.text or choice.finish_reason is None for choice in chunk.choices)
        return found


def failure_of(status: int, body: bytes) -> str:
    """The failure of an answer that is no stream: its status, and the error's code where it has one."""
    try:
        error = _ERRORS.decode(body).error
    except msgspec.MsgspecError:
        error = None
    return f"http {status}" if error is None else f"http {status} {_name(error)}"


def _name(error: _Error | str) -> str:
    if isinstance(error, str):
        return "unnamed"
    return str(error.code or error.type or "unnamed")
