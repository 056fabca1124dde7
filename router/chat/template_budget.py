"""How much a chat template may make: characters, entries of lists, digits, counted before they are made.

A character of a text counts 1, an entry of a list, tuple, set or dict `ENTRY`. Whatever an expression makes
is spent from a budget that is never given back, so that it bounds what can be held at any moment. Pure.
"""

import re
from collections.abc import Collection, ItemsView, Iterable, KeysView, Mapping, ValuesView
from typing import Any

import jinja2
from jinja2.utils import Namespace

MAX_MADE = 128 << 20
"""All that one render may make. Known templates copy a conversation some ten times."""
MAX_VALUE = 16 << 20
"""One text or list that is made."""
ENTRY = 64
"""About the bytes of a small object and of the place that points to it."""
MAX_PADDING = 1 << 12
_DIGITS = re.compile(r"\d+")
_PERCENT = re.compile(r"%(?:\([^)]*\))?([-+ #0-9.*]*)")
_FIELD = re.compile(r"\{[^{}]*:([^{}]*\{?)")
_LOOKS_INTO = re.compile(r"\{[^{}]*[.\[]")
_SEVERAL = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)
_ATTRIBUTES = "_Namespace__attrs"


class TemplateTooLarge(jinja2.TemplateError):
    """A template makes more than it may."""


class Budget:
    """What is left of `most`. Every method that counts raises TemplateTooLarge."""

    def __init__(self, most: int = MAX_MADE) -> None:
        self._most = self._left = most

    def renew(self) -> None:
        self._left = self._most

    def spend(self, size: int) -> None:
        if size > MAX_VALUE:
            raise TemplateTooLarge(f"a value of more than {MAX_VALUE} characters")
        self._left -= size
        if self._left < 0:
            raise TemplateTooLarge(f"more than {self._most} characters, with those that it dropped again")

    def charge(self, value: Any) -> Any:
        """For something that was just made. Returns it."""
        if isinstance(value, str | bytes):
            self.spend(len(value))
        elif isinstance(value, (*_SEVERAL, Mapping)):
            self.spend(ENTRY * len(value))
        return value

    def charge_deep(self, value: Any) -> Any:
        """For what holds others. To the bottom: twice a list in a list, twice that in a list and so on takes
        no room to make, but is long to print, and to compare."""
        self.spend(size_of(value, texts=False))
        return value

    def text(self, value: Any) -> str:
        """As `str`, but counted first."""
        if not isinstance(value, str):
            self.spend(size_of(value))
            value = str(value)
        self.spend(len(value))
        return str(value)


def size_of(value: Any, texts: bool = True) -> int:
    """What `value` takes when it is printed; without `texts`, how many entries it has at all depths.

    Raises TemplateTooLarge as soon as that is over `MAX_VALUE`, also for what contains itself.
    """
    size, waiting = 0, [value]
    while waiting:
        one = waiting.pop()
        size += ENTRY
        if isinstance(one, (str, bytes)):
            size += len(one) if texts else 0
        elif isinstance(one, int):
            size += one.bit_length() // 3
        else:
            inside = _inside(one)
            size += len(inside)
            if size <= MAX_VALUE:
                waiting.extend(inside)
        if size > MAX_VALUE:
            raise TemplateTooLarge(f"a value of more than {MAX_VALUE} characters")
    return size


def _inside(value: Any) -> list[Any] | tuple[Any, ...]:
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, Namespace):
        value = object.__getattribute__(value, _ATTRIBUTES)
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, _SEVERAL) else ()


# ------------------------------------------------------------ before something is made


def joined(separator: str | bytes, texts: Collection[Any]) -> int:
    if isinstance(texts, str | bytes):
        return len(texts) * (1 + len(separator))
    return sum(len(one) for one in texts if isinstance(one, str | bytes)) + len(separator) * len(texts)


def replaced(text: str | bytes, old: Any, new: Any) -> int:
    if type(old) is not type(new) or not isinstance(old, str | bytes):
        return len(text)
    found = text.count(old) if isinstance(text, type(old)) else 0  # type: ignore[arg-type]
    return len(text) + found * len(new)


def translated(text: str | bytes, table: Any) -> int:
    values = table.values() if isinstance(table, Mapping) else ()
    return len(text) * max((len(one) for one in values if isinstance(one, str)), default=1)


def formatted(pattern: str | bytes, mark: str, values: Iterable[Any]) -> int:
    """Of `%` and of `str.format`: every mark as the largest of the values, with the widest padding.

    Raises TemplateTooLarge for a padding that nobody needs, and for fields that look into their values.
    """
    shown = pattern.decode("latin-1") if isinstance(pattern, bytes) else pattern
    if mark == "{" and _LOOKS_INTO.search(shown):
        raise TemplateTooLarge("a format that looks into its values")
    values = list(values)
    parts = _PERCENT.findall(shown) if mark == "%" else _FIELD.findall(shown)
    paddings = [int(digits[:9]) for part in parts for digits in _DIGITS.findall(part)]
    if any("*" in part or "{" in part for part in parts):
        paddings += [abs(one) for one in values if isinstance(one, int)]
    padding = max(paddings, default=0)
    if padding > MAX_PADDING:
        raise TemplateTooLarge(f"a padding of {padding} characters")
    largest = max((size_of(one) for one in values), default=0)
    return len(shown) + shown.count(mark) * (largest + padding)
