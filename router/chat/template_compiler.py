"""Jinja's compiler with counts and looks at the clock where a chat template can grow or go on.

The syntax tree says where: `+` and `~`, literals, slices, copies of texts, loops. Texts of fewer than `SHORT`
characters are not counted where they are printed, or kept in a variable, of which there are few: then the
check is a comparison in the template's own code. Pure.
"""

from typing import Any, cast

import jinja2.compiler
import jinja2.visitor
from jinja2 import nodes
from jinja2.compiler import Frame

MAX_TERMS = 4
"""Of a sum of texts that is counted as a whole."""
SHORT = 1 << 12
COPYING = frozenset(("capitalize", "lower", "trim", "upper"))
"""Filters that make about what they are given."""


def _terms(node: nodes.Expr) -> list[nodes.Expr]:
    return [*_terms(node.left), *_terms(node.right)] if isinstance(node, nodes.Add) else [node]


def is_short_text(node: nodes.Expr) -> bool:
    """Whether an expression is a text for sure, and about as long as a few others: a sum of few terms with a
    text among them, or the copy of a text."""
    if not isinstance(node, nodes.Add):
        return isinstance(node, nodes.Filter) and node.name in COPYING and node.node is not None
    fixed = [one.value for one in _terms(node) if isinstance(one, nodes.Const)]
    return any(isinstance(one, str) for one in fixed) and len(_terms(node)) - len(fixed) <= MAX_TERMS


class Rewriter(jinja2.visitor.NodeTransformer):
    """Puts the sandbox's counts and looks at the clock into a template's syntax tree."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self._environment = environment

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self._call("watched", cast(nodes.Expr, node.iter))
        if node.recursive or any(name.name == "loop" for name in node.find_all(nodes.Name)):
            # Its turns may come from elsewhere: `loop` calls, and reads ahead.
            look = nodes.ExprStmt(self._call("look_at_clock"))
            node.body.insert(0, look.set_lineno(node.lineno).set_environment(self._environment))
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        node.nodes = [self._uncounted(one) if is_short_text(one) else self.visit(one) for one in node.nodes]
        return node

    def _uncounted(self, node: nodes.Expr) -> nodes.Expr:
        if isinstance(node, nodes.Add):
            node.left, node.right = self._uncounted(node.left), self._uncounted(node.right)
            return node
        made = self.generic_visit(node) if is_short_text(node) else self.visit(node)
        return cast(nodes.Expr, made)

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        return self._call("made", self._uncounted(node)) if is_short_text(node) else self.generic_visit(node)

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        if is_short_text(node):
            return self._call("made", self._uncounted(node))
        if any(isinstance(one, nodes.Const) and not isinstance(one.value, str) for one in _terms(node)):
            return self.generic_visit(node)  # of numbers
        return self._call("added", self.visit(node.left), self.visit(node.right))

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("concatenated", *node.nodes)

    def visit_List(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        items = [one.value if isinstance(one, nodes.Pair) else one for one in node.items]
        fixed = all(isinstance(one, nodes.Const) for one in items) or getattr(node, "ctx", "load") != "load"
        return node if fixed else self._call("held", node)

    visit_Tuple = visit_Dict = visit_List

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self._call("made", node) if isinstance(node.arg, nodes.Slice) else node

    def _call(self, name: str, *arguments: nodes.Expr) -> nodes.Expr:
        call = nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)
        call.set_lineno(1).set_environment(self._environment)
        return call


class CodeGenerator(jinja2.compiler.CodeGenerator):
    """Calls what the rewriter put in, without asking the sandbox, and only where a text is not short."""

    def visit_Call(self, node: nodes.Call, frame: Frame, forward_caller: bool = False) -> None:
        if not isinstance(node.node, nodes.EnvironmentAttribute):
            super().visit_Call(node, frame, forward_caller=forward_caller)
            return
        short = node.node.name == "made" and is_short_text(node.args[0])
        self.write("(out if len(out := " if short else f"environment.{node.node.name}(")
        for argument in node.args:
            self.visit(argument, frame)
            self.write("" if short else ", ")
        self.write(f") < {SHORT} else environment.made(out))" if short else ")")

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, nodes.Const | nodes.TemplateData):
            raise nodes.Impossible  # nothing is made before there is a count
        return super()._output_child_to_const(node, frame, finalize)

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        if _is_kept(frame):
            super()._output_child_pre(node, frame, finalize)
            self.write("environment.text(")
        else:
            self.write("(out if len(out := " if is_short_text(node) else "(out if type(out := ")

    def _output_child_post(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        if _is_kept(frame):
            super()._output_child_post(node, frame, finalize)
            self.write(")")
        else:
            self.write(")" if is_short_text(node) else ") is str and len(out)")
            self.write(f" < {SHORT} else environment.text(out))")


def _is_kept(frame: Frame) -> bool:
    """Whether an output is not handed on at once, or not as it is."""
    return frame.buffer is not None or bool(frame.eval_ctx.volatile or frame.eval_ctx.autoescape)
