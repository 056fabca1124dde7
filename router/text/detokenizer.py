"""Incremental detokenizers: tokens become text as they come.

However tokens are cut into pushes, what `push` and the final `flush` give is what the library's `decode`
makes of all of them at once; nothing that was passed on is taken back, whatever follows. A byte-level
vocabulary, which nearly all current models have, takes a table of bytes and an incremental UTF-8 decoder;
every other one the stages of its decoder (decoders.py).

A completion begins where its prompt ends (`Continuation`): its text is what decoding the tokens of both
gives beyond decoding the prompt's.
"""

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

from tokenizers import Tokenizer

from router.text.decoders import REPLACEMENT, DecoderStage, byte_of

LOOK_AHEAD = 1024
"""What is held back is looked at before its time (for stop strings) up to this many bytes or characters."""
TAIL_TOKENS = 8
"""At the beginning and at the end of a prompt; more where the end would begin with bytes of a character."""


class Detokenizer(Protocol):
    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens make certain."""

    def flush(self) -> str:
        """What is still held back. Nothing may be pushed after it."""

    def ahead(self) -> str:
        """What `flush` would give, where that is text and not too much of it; changes nothing."""


class ByteDetokenizer:
    """`pieces[token]` are the bytes a token stands for (empty for those that are skipped)."""

    __slots__ = ("_held", "_pieces")

    def __init__(self, pieces: list[bytes], held: bytes = b"") -> None:
        self._pieces = pieces
        self._held = held
        """The beginning of a character whose end has not come."""

    def push(self, tokens: Sequence[int]) -> str:
        pieces = self._pieces
        size = len(pieces)
        # A model's vocabulary is often padded beyond the tokenizer's; such tokens have no text.
        data = self._held + b"".join([pieces[token] for token in tokens if token < size])
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._held = data[used:]
        return text

    def flush(self) -> str:
        held, self._held = self._held, b""
        return codecs.utf_8_decode(held, "replace", True)[0]

    def ahead(self) -> str:
        return ""

    def fork(self) -> "ByteDetokenizer":
        return ByteDetokenizer(self._pieces, self._held)

    def follow(self, prompt: Sequence[int]) -> None:
        """Begins where the prompt ends: in the middle of a character at most."""
        pieces = self._pieces
        end = b""
        for token in reversed(prompt):
            if len(end) >= 3:
                break
            end = (pieces[token] if token < len(pieces) else b"") + end
        self._held = end[codecs.utf_8_decode(end, "replace", False)[1] :]


class Pieces(dict[int, "str | None"]):
    """What the first stages, which look at each item by itself, make of a token's name; None for those that
    are skipped, or that the tokenizer does not have."""

    def __init__(
        self, tokenizer: Tokenizer, size: int, skipped: frozenset[str], stages: Sequence[DecoderStage]
    ) -> None:
        super().__init__()
        self._tokenizer, self._size, self._skipped = tokenizer, size, skipped
        self._stages = stages

    def __missing__(self, token: int) -> str | None:
        if not 0 <= token < self._size:
            return None
        name: str | None = self._tokenizer.id_to_token(token)
        if name in self._skipped:
            name = None
        if name is not None:
            for stage in self._stages:
                name = stage.middle(name)
        self[token] = name
        return name


class ChainDetokenizer:
    """Any decoder. `local`: what the last tokens of a text leave behind says all about it, except that there
    were others before."""

    __slots__ = ("_local", "_pieces", "_stages")

    def __init__(self, pieces: Pieces, stages: Sequence[DecoderStage], local: bool) -> None:
        self._pieces, self._local = pieces, local
        self._stages = [stage.fork() for stage in stages]

    def push(self, tokens: Sequence[int]) -> str:
        pieces = self._pieces
        items = [piece for token in tokens if (piece := pieces[token]) is not None]
        for stage in self._stages:
            items = stage.push(items)
        return "".join(items)

    def flush(self) -> str:
        items: list[str] = []
        for stage in self._stages:
            items = stage.push(items) + stage.end()
        return "".join(items)

    def ahead(self) -> str:
        if not 0 < sum(stage.held for stage in self._stages) <= LOOK_AHEAD:
            return ""
        text = self.fork().flush()
        return "" if REPLACEMENT in text else text

    def fork(self) -> "ChainDetokenizer":
        return ChainDetokenizer(self._pieces, self._stages, self._local)

    def follow(self, prompt: Sequence[int]) -> None:
        """Begins where the prompt ends. Where its last tokens say enough, the first ones and they are gone
        through."""
        pieces = self._pieces
        start, seen = (len(prompt) if self._local else 0), 0
        while start > TAIL_TOKENS:
            start -= 1
            piece = pieces[prompt[start]]
            if piece is not None:
                seen += 1
                if seen >= TAIL_TOKENS and byte_of(piece) is None:
                    break
        else:
            start = 0
        if start:
            self.push(prompt[:TAIL_TOKENS])
            for stage in self._stages:
                stage.skip()
        self.push(prompt[start:])


class Continuation:
    """A prompt, and detokenizers for what follows it."""

    def __init__(self, prompt: Sequence[int], detokenizer: ByteDetokenizer | ChainDetokenizer) -> None:
        self._detokenizer = detokenizer
        detokenizer.follow(prompt)
        self._shown = detokenizer.fork().flush()

    def detokenizer(self, take_back: Callable[[str], None]) -> Detokenizer:
        """One for each choice. Where the text of prompt and completion does not begin with that of the prompt
        (its last bytes are half a character, and the completion has the other half), `take_back` is called
        with the end of the prompt's text that is none any more, before any text is passed on."""
        own = self._detokenizer.fork()
        return Seam(own, self._shown, take_back) if self._shown else own


class Seam:
    """Passes on what comes after `shown`: text that the prompt ends with, and that the completion may still
    change."""

    __slots__ = ("_inner", "_shown", "_take_back", "_text")

    def __init__(self, inner: Detokenizer, shown: str, take_back: Callable[[str], None]) -> None:
        self._inner, self._shown, self._take_back = inner, shown, take_back
        self._text = ""
        """How what was shown begins, certain by now."""

    def push(self, tokens: Sequence[int]) -> str:
        text = self._inner.push(tokens)
        if not text or not self._shown:
            return text
        text = self._text + text
        if len(text) < len(self._shown) and self._shown.startswith(text):
            self._text = text
            return ""
        return self._beyond(text)

    def flush(self) -> str:
        text = self._inner.flush()
        return self._beyond(self._text + text) if self._shown else text

    def ahead(self) -> str:
        text = self._text + self._inner.ahead()
        return text[len(self._shown) :] if text.startswith(self._shown) else ""

    def _beyond(self, text: str) -> str:
        shown, self._shown, self._text = self._shown, "", ""
        same = next(
            (at for at, (old, new) in enumerate(zip(shown, text, strict=False)) if old != new),
            min(len(shown), len(text)),
        )
        if same < len(shown):
            self._take_back(shown[same:])
        return text[same:]
