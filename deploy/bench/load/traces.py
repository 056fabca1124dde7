"""Published traces of real services: when requests came, how long they were, and what of them repeats.

Two formats, told apart by their first line, each also gzipped:

- Azure (2023): CSV with `TIMESTAMP,ContextTokens,GeneratedTokens`, times like `2023-11-16 18:15:46.6805900`;
- Mooncake: one JSON object a line with `timestamp` in ms, `input_length`, `output_length` and `hash_ids`, one
  for each started block of 512 prompt tokens. Two prompts with the same id have the same block there and the
  same tokens before it.
"""

import gzip
import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec

BLOCK_TOKENS = 512
AZURE_HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens"
MOST_TOKENS = 1 << 24
_GZIP = b"\x1f\x8b"


class TraceError(ValueError):
    """One line: the file, the line's number, and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """`block_ids` is empty where the trace does not say what repeats: then nothing does."""

    at_s: float
    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...] = ()


class _MooncakeLine(msgspec.Struct, frozen=True):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def read_trace(path: Path, most: int) -> list[TracedRequest]:
    """The first `most` requests, in the order of the file. Raises TraceError."""
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == _GZIP
        with gzip.open(path, "rb") if zipped else path.open("rb") as stream:
            return list(_requests(path, _lines(stream, path), most))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TraceError(f"{path} is not a whole gzip file: {error}") from None
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}") from None


def _lines(stream: Iterator[bytes], path: Path) -> Iterator[tuple[int, str]]:
    for number, raw in enumerate(stream, 1):
        try:
            line = raw.decode().strip().removeprefix("\ufeff")
        except UnicodeDecodeError:
            raise TraceError(f"{path}, line {number}: not UTF-8") from None
        if line:
            yield number, line


def _requests(path: Path, lines: Iterator[tuple[int, str]], most: int) -> Iterator[TracedRequest]:
    number, first = next(lines, (1, ""))
    azure = first == AZURE_HEAD
    if not azure and not first.startswith("{"):
        raise TraceError(
            f"{path}, line {number}: neither Azure's head ({AZURE_HEAD}) nor one of Mooncake's JSON objects"
        )
    found = 0
    last_s = float("-inf")
    if not azure:
        lines = itertools.chain([(number, first)], lines)
    for at, line in lines:
        if found == most:
            return
        try:
            request = _azure(line) if azure else _mooncake(line)
        except ValueError as error:
            raise TraceError(f"{path}, line {at}: {error}") from None
        if request.at_s < last_s:
            raise TraceError(f"{path}, line {at}: earlier than the request before it")
        last_s = request.at_s
        found += 1
        yield request
    if not found:
        raise TraceError(f"{path} holds no request")


def _azure(line: str) -> TracedRequest:
    fields = line.split(",")
    if len(fields) != 3:
        raise ValueError(f"{len(fields)} fields, not 3")
    # Seven digits of a second; datetime takes six.
    whole, _, parts = fields[0].partition(".")
    if parts and not (parts.isascii() and parts.isdigit()):
        raise ValueError(f"{fields[0]!r} is not a time")
    try:
        moment = datetime.fromisoformat(whole + "+00:00")
    except ValueError:
        raise ValueError(f"{fields[0]!r} is not a time") from None
    at_s = moment.timestamp() + float(f"0.{parts or 0}")
    return TracedRequest(at_s, _tokens(fields[1], "ContextTokens"), _tokens(fields[2], "GeneratedTokens"))


def _mooncake(line: str) -> TracedRequest:
    try:
        given = msgspec.json.decode(line, type=_MooncakeLine)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from None
    input_tokens = _tokens(given.input_length, "input_length")
    output_tokens = _tokens(given.output_length, "output_length")
    blocks = -(-input_tokens // BLOCK_TOKENS)
    if len(given.hash_ids) != blocks:
        raise ValueError(f"{len(given.hash_ids)} hash_ids for {blocks} blocks of {BLOCK_TOKENS} tokens")
    if min(given.hash_ids) < 0:
        raise ValueError("a negative hash id")
    return TracedRequest(given.timestamp / 1e3, input_tokens, output_tokens, tuple(given.hash_ids))


def _tokens(given: str | int, name: str) -> int:
    try:
        tokens = int(given)
    except ValueError:
        raise ValueError(f"{name}: {given!r} is not a whole number") from None
    if not 1 <= tokens <= MOST_TOKENS:
        raise ValueError(f"{name}: {tokens} is out of range; allowed are 1 to {MOST_TOKENS}")
    return tokens
