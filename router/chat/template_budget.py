"""The count of what a chat template makes: characters, entries of lists, digits. Pure.

A character of a text counts 1, an entry of a list, tuple or mapping `ENTRY`. What is counted is spent from a
budget and never given back, so that the budget bounds what a template can hold at any moment.
"""

import re
from collections.abc import Callable, ItemsView, Iterable, KeysView, Mapping, ValuesView
from itertools import islice
from typing import Any

import jinja2
from jinja2.utils import Namespace

MAX_MADE = 128 << 20
"""All that one render may make. Known templates copy a conversation some ten times."""
MAX_VALUE = 16 << 20
"""One text or list that is made."""
ENTRY = 64
"""About the bytes of a small object and of the place that points to it."""
MAX_ENTRIES = MAX_VALUE // ENTRY
MAX_NUMBER = 1 << 20
"""Given to a function that makes so many characters, entries or digits."""
MAX_PADDING = 1 << 12
PIECES = 64
"""Of an output, joined at one time."""
_DIGITS = re.compile(r"\d+")
_PERCENT = re.compile(r"%(?:\([^)]*\))?([-+ #0-9.*]*)")
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_SEVERAL = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)


class TemplateTooLarge(jinja2.TemplateError):
    """A template makes more than it may."""


class Budget:
    """The characters that a render may still make. Every method that counts raises TemplateTooLarge."""

    __slots__ = ("_left",)

    def renew(self) -> None:
        self._left = MAX_MADE

    def spend(self, size: int, most: int = MAX_VALUE) -> None:
        if size > most:
            raise TemplateTooLarge(f"a value of more than {most} characters")
        self._left -= size
        if self._left < 0:
            raise TemplateTooLarge(f"more than {MAX_MADE} characters, with those that it dropped again")

    def made(self, value: Any) -> Any:
        """Counts a text or container that was just made, without what is inside. Returns it."""
        if type(value) is str and len(value) <= self._left and len(value) <= MAX_VALUE:
            self._left -= len(value)
        elif isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, (*_SEVERAL, Mapping)):
            self.spend(ENTRY * len(value))
        return value

    def held(self, value: Any) -> Any:
        """Counts a container that was just made, to the bottom: without this, two of a list in a list, two of
        that in a list and so on would be long to print and to compare. Returns it."""
        self.spend(size_of(value))
        return value

    def added(self, left: Any, right: Any) -> Any:
        """`left + right`. Of two lists the shorter is counted to the bottom: so what any list holds was
        either counted or given."""
        if isinstance(left, list | tuple) and isinstance(right, list | tuple):
            self.spend(size_of(min(left, right, key=len)))
        return self.made(left + right)

    def text(self, value: Any) -> str:
        """As `str`, but counted first."""
        if not isinstance(value, str):
            self.spend(size_of(value))
            value = str(value)
        self.spend(len(value))
        return value  # type: ignore[no-any-return]

    def concatenated(self, *values: Any) -> str:
        texts = [self.text(value) for value in values]
        self.spend(sum(map(len, texts)))
        return "".join(texts)

    def concat(self, pieces: Iterable[str]) -> str:
        """The pieces of an output that is kept as one text. Jinja calls this."""
        text = joined_pieces(pieces, MAX_VALUE)
        self.spend(len(text))
        return text


def joined_pieces(pieces: Iterable[str], most: int) -> str:
    """One text. Raises TemplateTooLarge as soon as it is of more than so many characters."""
    texts: list[str] = []
    length, stream = 0, iter(pieces)
    while some := list(islice(stream, PIECES)):
        texts.append(text := "".join(some))
        length += len(text)
        if length > most:
            raise TemplateTooLarge(f"a text of more than {most} characters")
    return "".join(texts)


def size_of(value: Any) -> int:
    """The characters and entries of a value at all depths, which is about what it takes when it is printed.

    Raises TemplateTooLarge as soon as that is over `MAX_VALUE`, also for what contains itself.
    """
    size, waiting = 0, [value]
    for one in waiting:  # which grows
        kind = type(one)
        size += ENTRY
        if kind is str:
            size += len(one)
        elif kind is dict:
            waiting.extend(one)
            waiting.extend(one.values())
        elif isinstance(one, int):
            size += one.bit_length() // 3
        elif isinstance(one, str):
            size += len(one)
        elif isinstance(one, Namespace):
            waiting.append(object.__getattribute__(one, "_Namespace__attrs"))
        elif isinstance(one, Mapping):
            waiting.append(dict(one))
        elif isinstance(one, _SEVERAL):
            waiting.extend(one)
        if size > MAX_VALUE or len(waiting) > 2 * MAX_ENTRIES:
            raise TemplateTooLarge(f"a value of more than {MAX_VALUE} characters")
    return size


# ------------------------------------------------------------ before something is made


def check_numbers(name: str, values: Iterable[Any]) -> None:
    if any(isinstance(one, int) and abs(one) > MAX_NUMBER for one in values):
        raise TemplateTooLarge(f"{name} with a number that is too large")


def _replaced(text: str, old: str, new: str, count: int = -1) -> int:
    found = text.count(old)
    return len(text) + len(new) * (found if count < 0 else min(found, count))


def _joined(separator: str, texts: Any) -> int:
    if not isinstance(texts, str | list | tuple | Mapping):
        raise TemplateTooLarge("a join of what cannot be counted; use the filter")
    return len(separator) * len(texts) + sum(len(one) for one in texts if isinstance(one, str))


def _split(text: str, sep: str | None = None, maxsplit: int = -1) -> int:
    found = sum(map(text.count, (sep,) if sep else " \t" + _LINE_ENDS)) if len(text) > MAX_ENTRIES else 0
    return ENTRY * (found if maxsplit < 0 else min(found, maxsplit))


SIZES_OF_METHODS: dict[str, Callable[..., int]] = {
    "replace": _replaced,
    "join": _joined,
    "split": _split,
    "rsplit": _split,
    "splitlines": lambda text, keepends=False: ENTRY * sum(map(text.count, _LINE_ENDS)),
}
"""About what a text's method makes, by the text and the method's arguments."""


def formatted(pattern: str, given: Any) -> int:
    """About what `pattern % given` makes: every mark as the largest of the values, with the widest padding.

    Raises TemplateTooLarge for a padding that nobody needs.
    """
    several = given.values() if isinstance(given, Mapping) else given
    values = list(several) if isinstance(given, Mapping | tuple) else [several]
    marks = _PERCENT.findall(pattern)
    check_padding("".join(f"{mark} " for mark in marks))
    if any("*" in mark for mark in marks):
        check_padding(" ".join(str(one) for one in values if isinstance(one, int)))
    largest = max((size_of(one) for one in values), default=0)
    return len(pattern) + pattern.count("%") * (largest + MAX_PADDING)


def check_padding(spec: str) -> None:
    padding = max((int(digits[:9]) for digits in _DIGITS.findall(spec)), default=0)
    if padding > MAX_PADDING:
        raise TemplateTooLarge(f"a padding of {padding} characters")
