"""The decoders of a `tokenizer.json`, one stage each, fed with tokens as they come. Pure.

`tokenizers` knows ten decoders, each a function from a list of strings, the items, to another. Every one of
them can be followed item by item, as long as what later items may still change is held back; so the text
that has been passed on is always how the text of all tokens begins. What depends on one item alone is asked
of the library and remembered. After `Fuse` or `ByteLevel` there is one item only, and what follows sees
its pieces.
"""

import codecs
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

REMEMBERED = 1 << 18
"""Items of which a stage knows what they become; then it forgets them all."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

Made = TypeVar("Made")
Decode = Callable[[Sequence[str]], str]


class DecoderStage(Protocol):
    def push(self, items: list[str]) -> list[str]:
        """What these items make certain."""

    def end(self) -> list[str]:
        """What is held back, now that nothing follows."""

    def fork(self) -> "DecoderStage": ...

    def skip(self) -> None:
        """More items have come than were pushed, and nothing is held of them."""

    def middle(self, item: str) -> str:
        """What an item is amid others."""

    @property
    def held(self) -> int:
        """Items, bytes or characters that are held back."""


class Memo(dict[str, Made]):
    """What a function makes of each item."""

    def __init__(self, function: Callable[[str], Made]) -> None:
        super().__init__()
        self._function = function

    def __missing__(self, item: str) -> Made:
        if len(self) >= REMEMBERED:
            self.clear()
        made = self[item] = self._function(item)
        return made


class _Stateless:
    """Holds nothing back."""

    held = 0

    def end(self) -> list[str]:
        return []

    def skip(self) -> None:
        """One item says nothing about another."""


class Each(_Stateless):
    """Replace and Strip, where each item is changed by itself."""

    def __init__(self, function: Callable[[str], str]) -> None:
        self._made = Memo(function)

    def push(self, items: list[str]) -> list[str]:
        made = self._made
        return [made[item] for item in items]

    def fork(self) -> "Each":
        return self

    def middle(self, item: str) -> str:
        return self._made[item]


class FirstDiffers:
    """Metaspace, WordPiece, and no decoder at all: the first item is another thing than the others."""

    __slots__ = ("_begun", "_first", "_rest")
    held = 0

    def __init__(self, first: Callable[[str], str], rest: Mapping[str, str], begun: bool = False) -> None:
        self._first, self._rest, self._begun = first, rest, begun

    def push(self, items: list[str]) -> list[str]:
        rest = self._rest
        if self._begun or not items:
            return [rest[item] for item in items]
        self._begun = True
        return [self._first(items[0]), *(rest[item] for item in items[1:])]

    def end(self) -> list[str]:
        return []

    def fork(self) -> "FirstDiffers":
        return FirstDiffers(self._first, self._rest, self._begun)

    def skip(self) -> None:
        self._begun = True

    def middle(self, item: str) -> str:
        return self._rest[item]


class LastDiffers:
    """BPEDecoder: an item is held back until it is known not to be the last."""

    __slots__ = ("_last", "_made", "_rest")

    def __init__(self, last: Callable[[str], str], rest: Mapping[str, str], item: str | None = None) -> None:
        self._last, self._rest, self._made = last, rest, item

    @property
    def held(self) -> int:
        return self._made is not None

    def push(self, items: list[str]) -> list[str]:
        if not items:
            return []
        passed = items[:-1] if self._made is None else [self._made, *items[:-1]]
        self._made = items[-1]
        return [self._rest[item] for item in passed]

    def end(self) -> list[str]:
        item, self._made = self._made, None
        return [] if item is None else [self._last(item)]

    def fork(self) -> "LastDiffers":
        return LastDiffers(self._last, self._rest, self._made)

    def skip(self) -> None:
        self._made = None

    def middle(self, item: str) -> str:
        return self._rest[item]


class Collapse(_Stateless):
    """CTC: of equal neighbours one is left, and those that come to nothing are no items any more."""

    __slots__ = ("_before", "_made")

    def __init__(self, made: Mapping[str, str], before: str | None = None) -> None:
        self._made, self._before = made, before

    def push(self, items: list[str]) -> list[str]:
        passed: list[str] = []
        for item in items:
            if item != self._before:
                self._before = item
                made = self._made[item]
                if made:
                    passed.append(made)
        return passed

    def skip(self) -> None:
        self._before = None

    def fork(self) -> "Collapse":
        return Collapse(self._made, self._before)

    def middle(self, item: str) -> str:
        return self._made[item]


def byte_of(item: str) -> int | None:
    """The byte that an item like `<0x0A>` stands for."""
    if len(item) == 6 and item.startswith("<0x") and item[5] == ">":
        try:
            return bytes.fromhex(item[3:5])[0]
        except ValueError:
            # The library's parser takes a sign before one digit, and so do we.
            return int(item[4], 16) if item[3] == "+" and item[4] in "0123456789abcdefABCDEF" else None
    return None


class Bytes:
    """ByteFallback: a run of bytes is text if all of it is, else each is replaced; so a run is held back
    until it ends."""

    __slots__ = ("_run",)

    def __init__(self, run: bytes | bytearray = b"") -> None:
        self._run = bytearray(run)

    @property
    def held(self) -> int:
        return len(self._run)

    def push(self, items: list[str]) -> list[str]:
        passed: list[str] = []
        for item in items:
            byte = byte_of(item)
            if byte is not None:
                self._run.append(byte)
                continue
            if self._run:
                passed += self.end()
            passed.append(item)
        return passed

    def end(self) -> list[str]:
        run, self._run = self._run, bytearray()
        if not run:
            return []
        try:
            return [run.decode()]
        except UnicodeDecodeError:
            return [REPLACEMENT] * len(run)

    def fork(self) -> "Bytes":
        return Bytes(self._run)

    def skip(self) -> None:
        self._run.clear()

    def middle(self, item: str) -> str:
        byte = byte_of(item)
        return item if byte is None else bytes((byte,)).decode("utf-8", "replace")


class Utf8:
    """ByteLevel: every character of an item stands for a byte, unless one of them does not."""

    __slots__ = ("_bytes", "_held")

    def __init__(self, pieces: Mapping[str, bytes], held: bytes = b"") -> None:
        self._bytes, self._held = pieces, held

    @property
    def held(self) -> int:
        return len(self._held)

    def push(self, items: list[str]) -> list[str]:
        data = self._held + b"".join([self._bytes[item] for item in items])
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._held = data[used:]
        return [text]

    def end(self) -> list[str]:
        held, self._held = self._held, b""
        return [codecs.utf_8_decode(held, "replace", True)[0]]

    def fork(self) -> "Utf8":
        return Utf8(self._bytes, self._held)

    def skip(self) -> None:
        self._held = b""

    def middle(self, item: str) -> str:
        return self._bytes[item].decode("utf-8", "replace")


class Trim:
    """Strip, on the pieces of one item: up to `start` leading and `stop` trailing characters are dropped."""

    __slots__ = ("_content", "_ending", "_start", "_stop")

    def __init__(self, content: str, start: int, stop: int, ending: str = "") -> None:
        self._content, self._start, self._stop, self._ending = content, start, stop, ending

    @property
    def held(self) -> int:
        return len(self._ending)

    def push(self, items: list[str]) -> list[str]:
        if not self._start and not self._stop:
            return items
        text = "".join(items)
        while self._start and text:
            if not text.startswith(self._content):
                self._start = 0
                break
            self._start -= 1
            text = text[1:]
        if not self._stop:
            return [text]
        text = self._ending + text
        whole = len(text)
        while whole and len(text) - whole < self._stop and text[whole - 1] == self._content:
            whole -= 1
        self._ending = text[whole:]
        return [text[:whole]]

    def end(self) -> list[str]:
        self._ending = ""
        return []

    def fork(self) -> "Trim":
        return Trim(self._content, self._start, self._stop, self._ending)

    def skip(self) -> None:
        self._start, self._ending = 0, ""

    def middle(self, item: str) -> str:
        return item


class Substitute:
    """Replace of one string by another, on the pieces of one item. Where a match begins may depend on all
    that came before."""

    __slots__ = ("_by", "_pattern", "_tail")

    def __init__(self, pattern: str, by: str, tail: str = "") -> None:
        self._pattern, self._by, self._tail = pattern, by, tail

    @property
    def held(self) -> int:
        return len(self._tail)

    def push(self, items: list[str]) -> list[str]:
        *whole, rest = (self._tail + "".join(items)).split(self._pattern)
        keep = min(len(rest), len(self._pattern) - 1)
        while keep and not self._pattern.startswith(rest[len(rest) - keep :]):
            keep -= 1
        self._tail = rest[len(rest) - keep :]
        return [self._by.join([*whole, rest[: len(rest) - keep]])]

    def end(self) -> list[str]:
        tail, self._tail = self._tail, ""
        return [tail]

    def fork(self) -> "Substitute":
        return Substitute(self._pattern, self._by, self._tail)

    def skip(self) -> None:
        self._tail = ""

    def middle(self, item: str) -> str:
        return item.replace(self._pattern, self._by)


class Hoard:
    """Whatever else is done to one whole item: its text comes at the end."""

    __slots__ = ("_decode", "_parts", "held")

    def __init__(self, decode: Decode, text: str = "") -> None:
        self._decode, self._parts = decode, [text]
        self.held = len(text)

    def push(self, items: list[str]) -> list[str]:
        self._parts += items
        self.held += sum(map(len, items))
        return []

    def end(self) -> list[str]:
        text, self._parts, self.held = "".join(self._parts), [], 0
        return [self._decode([text])]

    def fork(self) -> "Hoard":
        return Hoard(self._decode, "".join(self._parts))

    def skip(self) -> None:
        self._parts, self.held = [], 0

    def middle(self, item: str) -> str:
        return self._decode([item])
