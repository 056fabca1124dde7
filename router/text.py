"""Tokens to text, incrementally, and the watch for stop strings. Pure.

Two detokenizers with one meaning: after `push` of any split of the same tokens and a final `flush`, the
pieces concatenate to what decoding all tokens at once gives. Byte-level vocabularies (nearly all current
models), and those of sentencepiece with bytes for what they lack, take a table of bytes and an incremental
UTF-8 decoder; all others `tokenizers`' `DecodeStream`.
"""

import codecs
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer(Protocol):
    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete; bytes of an unfinished character are held back."""

    def flush(self) -> str:
        """What is still held back, with U+FFFD for bytes that never became a character."""


class ByteDetokenizer:
    """`pieces[token]` are the bytes a token stands for (empty for special tokens). `strip`: a space that
    begins the text is not part of it.

    For bytes that are no UTF-8 `tokenizers`' ByteFallback takes back the whole characters before them, which
    may have been streamed; here only those bytes are replaced.
    """

    __slots__ = ("_held", "_pieces", "_strip")

    def __init__(self, pieces: list[bytes], strip: bool = False) -> None:
        self._pieces, self._strip = pieces, strip
        self._held = b""
        """The beginning of a character whose end has not come."""

    def push(self, tokens: Sequence[int]) -> str:
        pieces = self._pieces
        size = len(pieces)
        # A model's vocabulary is often padded beyond the tokenizer's; such tokens have no text.
        data = self._held + b"".join([pieces[token] for token in tokens if token < size])
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._held = data[used:]
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text

    def flush(self) -> str:
        held, self._held = self._held, b""
        return codecs.utf_8_decode(held, "replace", True)[0]


class StreamDetokenizer:
    """Any tokenizer. `DecodeStream` keeps a trailing incomplete character to itself, so the tokens since its
    last output are remembered here for `flush`."""

    __slots__ = ("_context", "_held", "_size", "_stream", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self._tokenizer, self._size = tokenizer, size
        self._stream = DecodeStream(skip_special_tokens=True)
        self._context: list[int] = []
        self._held: list[int] = []

    def push(self, tokens: Sequence[int]) -> str:
        parts: list[str] = []
        for token in tokens:
            if token >= self._size:
                continue
            self._held.append(token)
            part = self._stream.step(self._tokenizer, token)
            if part is not None:
                self._context, self._held = self._held, []
                parts.append(part)
        return "".join(parts)

    def flush(self) -> str:
        if not self._held:
            return ""
        before: str = self._tokenizer.decode(self._context)
        after: str = self._tokenizer.decode(self._context + self._held)
        self._context, self._held = self._held, []
        return after[len(before) :] if after.startswith(before) else ""


class StopScanner:
    """Finds the first stop string in a text that comes in pieces.

    "First" is the one that is complete first; of two that are complete at the same character, the longer.
    This does not depend on how the text is cut into pieces. Text that could still turn out to be the
    beginning of a stop string is held back.
    """

    __slots__ = ("_held", "_include", "_stops")

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """`(text to pass on, whether a stop string was hit)`. After a hit nothing more may be pushed."""
        if not text:
            return "", False
        window = self._held + text
        best: tuple[int, int] | None = None
        for stop in self._stops:
            start = window.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best):
                best = (start + len(stop), start)
        if best is not None:
            end, start = best
            self._held = ""
            return window[: end if self._include else start], True
        keep = self._longest_beginning(window)
        self._held = window[len(window) - keep :]
        return window[: len(window) - keep], False

    def _longest_beginning(self, window: str) -> int:
        """Length of the longest end of `window` that begins a stop string."""
        keep = 0
        for stop in self._stops:
            at = window.find(stop[0], max(0, len(window) - len(stop) + 1))
            while at >= 0 and len(window) - at > keep:
                if stop.startswith(window[at:]):
                    keep = len(window) - at
                    break
                at = window.find(stop[0], at + 1)
        return keep

    def flush(self) -> str:
        """What is held back: the text has ended, so it was no stop string."""
        held, self._held = self._held, ""
        return held
