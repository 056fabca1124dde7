"""Jinja for chat templates: immutable, without attributes that lead out, and with an end.

A template is a program that came with a checkpoint, and the router renders it in the event loop that serves
everybody. Jinja has no `while`, but loops and macros nest: so each of their bodies begins with a look at the
clock, and a render that is out of time ends with TemplateTimeout. Between two looks only single expressions
run; those of them that can be long by themselves, `*` and `**`, are bounded.
"""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

MAX_REPEATED = 1 << 20
"""Characters or entries that one `*` may make."""
MAX_POWER_BITS = 1 << 12
MAX_FACTOR_BITS = 1 << 16


class TemplateRefusal(jinja2.TemplateError):
    """What a template's own `raise_exception` raises."""


class TemplateTimeout(jinja2.TemplateError):
    """A template ran for longer than it may."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; for serving its body is just text."""

    tags = {"generation"}  # noqa: RUF012 - the base class's attribute

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """`begin` starts the clock of one render. Renders do not overlap: each runs to its end in one thread."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self, time_limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
        self._time_limit_s, self._clock = time_limit_s, clock
        self._until_s = float("inf")
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception

    def begin(self) -> None:
        self._until_s = self._clock() + self._time_limit_s

    def look_at_clock(self) -> str:
        """Raises TemplateTimeout."""
        if self._clock() > self._until_s:
            raise TemplateTimeout(f"it ran for more than {self._time_limit_s:g} s")
        return ""

    def compiled(self, source: str) -> jinja2.Template:
        """Raises TemplateError for a source that does not compile."""
        tree = self.parse(source)
        bodies = [loop.body for loop in tree.find_all(jinja2.nodes.For)]
        bodies += [macro.body for macro in tree.find_all(jinja2.nodes.Macro)]
        bodies += [block.body for block in tree.find_all(jinja2.nodes.CallBlock)]
        for body in bodies:
            look = jinja2.nodes.Call(jinja2.nodes.EnvironmentAttribute("look_at_clock"), [], [], None, None)
            body.insert(0, jinja2.nodes.ExprStmt(look).set_lineno(1).set_environment(self))
        code = self.compile(tree)
        return self.template_class.from_code(self, code, self.make_globals(None))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, int) and isinstance(other, Sequence) and one * len(other) > MAX_REPEATED:
                    raise TemplateRefusal(f"it repeats something {one} times")
            if _bits(left) + _bits(right) > MAX_FACTOR_BITS:
                raise TemplateRefusal("it multiplies numbers that are too large")
        elif _bits(left) * (abs(right) if isinstance(right, int) else 1) > MAX_POWER_BITS:
            raise TemplateRefusal("it raises a number to a power that is too large")
        return super().call_binop(context, operator, left, right)


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _raise_exception(message: str) -> None:
    raise TemplateRefusal(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Unlike Jinja's own filter this does not escape for HTML: the result is a prompt, not a page.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
