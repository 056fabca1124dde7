"""Jinja for chat templates: immutable, without attributes that lead out, with an end, and with a size.

A template is a program that came with a checkpoint, and the router renders it in the event loop that serves
everybody. Jinja has no `while`, but loops and macros nest: so each of their bodies begins with a look at the
clock, and a render that is out of time ends with TemplateTimeout. Between two looks only single expressions
run; those of them that can be long by themselves, `*` and `**`, are bounded.

What expressions make is counted (template_budget.py): operators, calls, literals, slices, filters, and what
is printed. What can be large at one blow, such as `replace` or a padding, is counted before it is made.
Filters that no chat needs and that are hard to count are not there (`DROPPED`).
"""

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.visitor

from router.chat import template_budget
from router.chat.template_budget import Budget, TemplateTooLarge

MAX_REPEATED = 1 << 20
"""Characters or entries that one `*` may make."""
MAX_POWER_BITS = 1 << 12
MAX_FACTOR_BITS = 1 << 16
MAX_INDENT = 1 << 6
DROPPED = ("pprint", "urlize", "wordwrap", "xmlattr")


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


class _Counted(jinja2.visitor.NodeTransformer):
    """Puts a call around what Jinja's sandbox does not ask about: `~`, literals of several, and slices."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self._environment = environment

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return self._call("concatenated", node.nodes)

    def visit_List(self, node: jinja2.nodes.List) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return self._call("held", [node]) if node.items else node

    def visit_Tuple(self, node: jinja2.nodes.Tuple) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return self._call("held", [node]) if node.items and node.ctx == "load" else node

    def visit_Dict(self, node: jinja2.nodes.Dict) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return self._call("held", [node]) if node.items else node

    def visit_Getitem(self, node: jinja2.nodes.Getitem) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return self._call("charged", [node]) if isinstance(node.arg, jinja2.nodes.Slice) else node

    def _call(self, name: str, arguments: list[jinja2.nodes.Expr]) -> jinja2.nodes.Node:
        call = jinja2.nodes.Call(jinja2.nodes.EnvironmentAttribute(name), arguments, [], None, None)
        return call.set_lineno(1).set_environment(self._environment)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """`begin` starts the clock and the count of one render. Renders do not overlap: each runs to its end in
    one thread."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self, time_limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing is made before there is a count
            finalize=self._printed,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
        )
        self.budget = Budget()
        self._time_limit_s, self._clock = time_limit_s, clock
        self._until_s = float("inf")
        self.filters |= {
            "tojson": self._tojson,
            "join": self._joined,
            "replace": self._replaced,
            "indent": self._indented,
            "sum": _sum,
            "format": lambda value, *args, **names: self.call_binop(None, "%", str(value), names or args),
        }
        self.filters["string"] = self.budget.text
        for name in DROPPED:
            del self.filters[name]
        self.filters = {name: self._counting(one) for name, one in self.filters.items()}
        self.globals["raise_exception"] = _raise_exception
        del self.globals["lipsum"]

    def begin(self, at_least_s: float = 0.0) -> None:
        self._until_s = self._clock() + max(self._time_limit_s, at_least_s)
        self.budget.renew()

    def look_at_clock(self, plain: int = 0) -> str:
        """`plain` characters of the template itself are to come. Raises TemplateTimeout, TemplateTooLarge."""
        self.budget.spend(plain)
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
            plain = sum(len(one.data) for node in body for one in _plain_texts(node))
            arguments: list[jinja2.nodes.Expr] = [jinja2.nodes.Const(plain)]
            name = jinja2.nodes.EnvironmentAttribute("look_at_clock")
            look = jinja2.nodes.Call(name, arguments, [], None, None)
            body.insert(0, jinja2.nodes.ExprStmt(look).set_lineno(1).set_environment(self))
        _Counted(self).visit(tree)
        code = self.compile(tree)
        return self.template_class.from_code(self, code, self.make_globals(None))

    # ------------------------------------------------------------ what is made

    def concatenated(self, *values: Any) -> str:
        return "".join([self.budget.text(value) for value in values])

    def charged(self, value: Any) -> Any:
        return self.budget.charge(value)

    def held(self, value: Any) -> Any:
        return self.budget.charge_deep(value)

    @jinja2.pass_context
    def _printed(self, context: jinja2.runtime.Context, value: Any) -> str:
        return self.budget.text(value)

    # As in Jinja: the parameters' own names must not be among those that a template can pass.
    def call(
        __self,
        __context: jinja2.runtime.Context,
        __called: Any,
        *arguments: Any,
        **names: Any,
    ) -> Any:
        owner = getattr(__called, "__self__", None)
        if owner is __self:
            return __called(*arguments)  # the names are Jinja's own
        if isinstance(owner, str | bytes | int) and not isinstance(__called, type):
            __self._before_method(owner, __called.__name__, arguments, names)
        made = super().call(__context, __called, *arguments, **names)
        return __self.budget.charge_deep(made) if isinstance(__called, type) else __self.budget.charge(made)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        inner = super().wrap_str_format(value)
        if inner is None:
            return None

        def checked(*arguments: Any, **names: Any) -> str:
            values = [*arguments, *names.values()]
            if value.__name__ == "format_map" and arguments and isinstance(arguments[0], Mapping):
                values = list(arguments[0].values())
            self.budget.spend(template_budget.formatted(value.__self__, "{", values))
            return inner(*arguments, **names)

        return checked

    def _before_method(
        self, owner: str | bytes | int, name: str, arguments: tuple[Any, ...], names: dict[str, Any]
    ) -> None:
        _check_numbers(name, (*arguments, *names.values()))
        if isinstance(owner, int):
            return
        if name == "expandtabs":
            widths = [one for one in (*arguments, *names.values(), 8) if isinstance(one, int)]
            tabs = owner.count("\t") if isinstance(owner, str) else owner.count(b"\t")
            self.budget.spend(len(owner) + tabs * widths[0])
        elif name == "replace" and len(arguments) > 1:
            self.budget.spend(template_budget.replaced(owner, *arguments[:2]))
        elif name == "translate" and arguments:
            self.budget.spend(template_budget.translated(owner, arguments[0]))
        elif name == "join" and arguments:
            if not isinstance(arguments[0], str | bytes | list | tuple | Mapping):
                raise TemplateTooLarge("a join of what cannot be counted; use the filter")
            self.budget.spend(template_budget.joined(owner, arguments[0]))

    def _counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose result is charged. What it is given by Jinja itself stays the same."""

        @functools.wraps(function)
        def counting(*arguments: Any, **names: Any) -> Any:
            _check_numbers(function.__name__, (*arguments[1:], *names.values()))
            return self.budget.charge(function(*arguments, **names))

        return counting

    def _joined(self, value: Any, d: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            value = map(jinja2.filters.make_attrgetter(self, attribute), value)
        texts = [self.budget.text(one) for one in value]
        self.budget.spend(template_budget.joined(str(d), texts))
        return str(d).join(texts)

    def _replaced(self, value: Any, old: str, new: str, count: int | None = None) -> str:
        text = self.budget.text(value)
        self.budget.spend(template_budget.replaced(text, old, new))
        return text.replace(old, new, -1 if count is None else count)

    def _indented(self, value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        text = self.budget.text(value)
        step = len(width) if isinstance(width, str) else width
        self.budget.spend(len(text) + (text.count("\n") + 1) * step)
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
        if max([len(one) for one in separators or ()] + [indent or 0]) > MAX_INDENT:
            raise TemplateTooLarge(f"an indent of more than {MAX_INDENT}")
        self.budget.spend(template_budget.size_of(value))
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def call_binop(self, context: jinja2.runtime.Context | None, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            return self.budget.charge(left + right)
        if operator == "%":
            if isinstance(left, str | bytes):
                several = tuple(right.values()) if isinstance(right, Mapping) else right
                values = several if isinstance(several, tuple) else (several,)
                self.budget.spend(template_budget.formatted(left, "%", values))
            return left % right
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, int) and isinstance(other, Sequence) and one * len(other) > MAX_REPEATED:
                    raise TemplateRefusal(f"it repeats something {one} times")
            if _bits(left) + _bits(right) > MAX_FACTOR_BITS:
                raise TemplateRefusal("it multiplies numbers that are too large")
        elif _bits(left) * (abs(right) if isinstance(right, int) else 1) > MAX_POWER_BITS:
            raise TemplateRefusal("it raises a number to a power that is too large")
        return self.budget.charge(self.binop_table[operator](left, right))


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _raise_exception(message: str) -> None:
    raise TemplateRefusal(str(message))


def _check_numbers(name: str, values: Sequence[Any]) -> None:
    if any(isinstance(one, int) and abs(one) > MAX_REPEATED for one in values):
        raise TemplateTooLarge(f"{name} with a number that is too large")


def _plain_texts(node: jinja2.nodes.Node) -> list[jinja2.nodes.TemplateData]:
    found = list(node.find_all(jinja2.nodes.TemplateData))
    return [*found, node] if isinstance(node, jinja2.nodes.TemplateData) else found


def _sum(value: Any, attribute: str | int | None = None, start: float = 0) -> float:
    """Of numbers only: a sum of lists would copy them again and again."""
    if attribute is not None:
        raise TemplateRefusal("sum: 'attribute' is not supported; use map(attribute=...)")
    return sum(value, start + 0)
