"""Jinja's immutable sandbox for chat templates, with an end and a size.

A template is a program that came with a checkpoint, and the router renders it in the event loop that serves
everybody. Jinja has no `while`, but loops and macros nest: so loops and calls look at the clock now and then,
and a render that is out of time ends with TemplateTimeout. Between two looks only single expressions run.

What can grow is counted (template_budget.py) where the compiler says so (template_compiler.py), and in calls
and filters. What can be large at one blow, such as `*`, `replace` or a padding, is counted before it is made.
"""

import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import jinja2.ext
import jinja2.filters
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import markupsafe
from jinja2 import nodes

from router.chat import template_budget
from router.chat.template_budget import MAX_ENTRIES, Budget, TemplateTooLarge
from router.chat.template_compiler import COPYING, CodeGenerator, Rewriter

MAX_POWER_BITS = 1 << 12
MAX_FACTOR_BITS = 1 << 16
MAX_INDENT = 1 << 6
TURNS, MAX_TURNS = 8, 64
"""Further ones of a loop between two looks, at first and at most."""
QUICK_S = 1e-4
"""The longest time between two looks of a loop after which the next one is put off further."""
DROPPED = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
"""Filters that no chat needs, and that are long to run or hard to count."""
UNCOUNTED = COPYING | {"abs", "attr", "count", "d", "default", "first", "float", "last", "length", "random"}
LINEAR = frozenset(
    ("e", "escape", "forceescape", "format", "indent", "int", "join", "replace", "reverse", "safe", "string")
) | {"tojson"}
"""They may be given texts of any length."""
LAZY = frozenset(("map", "reject", "rejectattr", "select", "selectattr"))
UNSAFE_METHODS = frozenset(("encode", "expandtabs", "maketrans", "striptags", "to_bytes", "translate"))


class TemplateRefusal(jinja2.TemplateError):
    """What a template's own `raise_exception` raises."""


class TemplateTimeout(jinja2.TemplateError):
    """A template ran for longer than it may."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; for serving its body is just text."""

    tags = {"generation"}  # noqa: RUF012 - the base class's attribute

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Formatter(jinja2.sandbox.SandboxedFormatter):
    """`str.format`, of which each field is counted."""

    def convert_field(self, value: Any, conversion: Any) -> Any:
        self._env.text(value)  # type: ignore[attr-defined]
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> Any:
        template_budget.check_padding(format_spec)
        return super().format_field(value, format_spec)


class _EscapeFormatter(_Formatter, markupsafe.EscapeFormatter):
    pass


class Sandbox(Budget, jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Compiles and runs templates. `begin` starts the clock and the count of one render. Renders do not
    overlap: each runs to its end in one thread."""

    __slots__ = ("_clock", "_time_limit_s", "_until_s")  # past 30 attributes Python looks longer for all
    code_generator_class = CodeGenerator
    intercepted_binops = frozenset(("*", "**", "%"))

    def __init__(self, time_limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        jinja2.sandbox.ImmutableSandboxedEnvironment.__init__(
            self,
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
        )
        self._time_limit_s, self._clock = time_limit_s, clock
        self._until_s = float("inf")
        self.renew()
        self.globals["raise_exception"] = _raise_exception
        del self.globals["lipsum"]
        self.filters |= {"tojson": self._tojson, "join": self._joined, "replace": self._replaced}
        self.filters |= {"indent": self._indented, "sum": _sum, "string": self.text}
        self.filters["format"] = lambda value, *args, **names: self.call_binop(
            None, "%", str(value), names or args
        )
        for name in DROPPED:
            del self.filters[name]
        for name in self.filters.keys() - UNCOUNTED:
            self.filters[name] = self._bounded(name, self.filters[name])

    def begin(self, at_least_s: float = 0.0) -> None:
        self._until_s = self._clock() + max(self._time_limit_s, at_least_s)
        self.renew()

    def look_at_clock(self) -> float:
        """The time. Raises TemplateTimeout."""
        now_s = self._clock()
        if now_s > self._until_s:
            raise TemplateTimeout(f"it ran for more than {self._time_limit_s:g} s")
        return now_s

    def watched(self, several: Iterable[Any]) -> Iterator[Any]:
        """The same, with looks at the clock: at each turn while turns are slow, more seldom while they are
        quick."""
        if type(several) is list and len(several) <= TURNS:
            self.look_at_clock()
            return iter(several)
        return chain.from_iterable(self._turns(iter(several)))

    def _turns(self, several: Iterator[Any]) -> Iterator[Iterable[Any]]:
        count, last_s = TURNS, self.look_at_clock()
        for one in several:
            yield (one,)
            yield islice(several, count)
            now_s = self.look_at_clock()
            count = min(2 * count + 1, MAX_TURNS) if now_s - last_s < QUICK_S else 0
            last_s = now_s

    def compiled(self, source: str) -> jinja2.Template:
        """Raises TemplateError for a source that does not compile."""
        tree = Rewriter(self).visit(self.parse(source))
        return self.template_class.from_code(self, self.compile(tree), self.make_globals(None))

    # ------------------------------------------------------------ what Jinja asks

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if attr in UNSAFE_METHODS:
            return False
        return not attr.startswith("_") if type(obj) is str else super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        pattern = value.__self__
        escape = getattr(pattern, "escape", None)
        formatter = _EscapeFormatter(self, escape=escape) if escape else _Formatter(self)
        if value.__name__ == "format_map":
            return lambda names: type(pattern)(formatter.vformat(pattern, (), names))
        return lambda *arguments, **names: type(pattern)(formatter.vformat(pattern, arguments, names))

    # As in Jinja: the parameters' own names must not be among those that a template can pass.
    def call(
        __self,
        __context: jinja2.runtime.Context,
        __called: Any,
        *arguments: Any,
        **names: Any,
    ) -> Any:
        owner = getattr(__called, "__self__", None)
        if not isinstance(owner, str) or isinstance(__called, type):
            __self.look_at_clock()
            made = super().call(__context, __called, *arguments, **names)
            return (__self.held if isinstance(__called, type) or isinstance(owner, type) else __self.made)(
                made
            )
        names.pop("_loop_vars", None)
        names.pop("_block_vars", None)
        return __self._of_text(__called, *arguments, **names)

    def _of_text(self, method: Callable[..., Any], *arguments: Any, **names: Any) -> Any:
        template_budget.check_numbers(method.__name__, (*arguments, *names.values()))
        if method.__name__ in template_budget.SIZES_OF_METHODS:
            size_of_made = template_budget.SIZES_OF_METHODS[method.__name__]
            self.spend(size_of_made(getattr(method, "__self__", ""), *arguments, **names))
        return self.made(method(*arguments, **names))

    def call_binop(self, context: jinja2.runtime.Context | None, operator: str, left: Any, right: Any) -> Any:
        if operator == "%":
            if isinstance(left, str):
                self.spend(template_budget.formatted(left, right))
        elif operator == "*":
            for count, several in ((left, right), (right, left)):
                if isinstance(count, int) and isinstance(several, Sequence):
                    template_budget.check_numbers("*", (count * len(several),))
                    each = len(several) if isinstance(several, str) else template_budget.size_of(several)
                    self.spend(count * each)
            if _bits(left) + _bits(right) > MAX_FACTOR_BITS:
                raise TemplateRefusal("it multiplies numbers that are too large")
        elif _bits(left) * (abs(right) if isinstance(right, int) else 1) > MAX_POWER_BITS:
            raise TemplateRefusal("it raises a number to a power that is too large")
        return self.binop_table[operator](left, right)

    # ------------------------------------------------------------ filters

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose result is counted. What it is given by Jinja itself stays the same."""
        linear, lazy = name in LINEAR, name in LAZY

        @functools.wraps(function)
        def bounded(*arguments: Any, **names: Any) -> Any:
            if names or len(arguments) > 1:
                template_budget.check_numbers(name, (*arguments[1:], *names.values()))
            if not linear and any(isinstance(one, str) and len(one) > MAX_ENTRIES for one in arguments[:2]):
                raise TemplateTooLarge(f"{name} of a text of more than {MAX_ENTRIES} characters")
            if lazy:
                arguments = (arguments[0], self.watched(arguments[1]), *arguments[2:])
            if name == "map":
                return map(self.made, function(*arguments, **names))
            return self.made(function(*arguments, **names))

        return bounded

    def _joined(self, value: Any, d: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            value = map(jinja2.filters.make_attrgetter(self, attribute), value)
        made: str = self._of_text(str(d).join, [self.text(one) for one in self.watched(value)])
        return made

    def _replaced(self, value: Any, old: str, new: str, count: int | None = None) -> str:
        made: str = self._of_text(self.text(value).replace, old, new, -1 if count is None else count)
        return made

    def _indented(self, value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        text = self.text(value)
        step = len(width) if isinstance(width, str) else width
        self.spend(len(text) + (text.count("\n") + 1) * step)
        made: str = jinja2.filters.do_indent(text, width, first, blank)
        return made

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """Unlike Jinja's own this does not escape for HTML: the result is a prompt, not a page."""
        encoder = _encoder(ensure_ascii, indent, tuple(separators) if separators else None, sort_keys)
        self.spend(template_budget.size_of(value))
        # An indent takes as much as the value is deep, for each of its entries.
        return encoder.encode(value) if indent is None else self.concat(encoder.iterencode(value))


@functools.lru_cache(16)
def _encoder(
    ensure_ascii: bool, indent: int | None, separators: tuple[str, str] | None, sort_keys: bool
) -> json.JSONEncoder:
    if max([len(one) for one in separators or ()] + [indent or 0]) > MAX_INDENT:
        raise TemplateTooLarge(f"an indent of more than {MAX_INDENT}")
    return json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _raise_exception(message: str) -> None:
    raise TemplateRefusal(str(message))


def _sum(value: Any, attribute: str | int | None = None, start: float = 0) -> float:
    """Of numbers only: a sum of lists would copy them again and again."""
    if attribute is not None:
        raise TemplateRefusal("sum: 'attribute' is not supported; use map(attribute=...)")
    return sum(value, start + 0)
