"""The form of content that a chat template takes: a string, a list of parts, or both. Pure.

The template's syntax tree proposes (`proposed_form`): content that is looped over, filtered as a list or
indexed is a list of parts, unless a test asks first what it is. Renderings of marked texts confirm (`study`):
a form is right if what was put in comes out, and not as the printed form of a list. Where no rendering says
anything, the proposal stands.
"""

import enum
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2 import nodes

Message = dict[str, Any]
Render = Callable[[list[Message], dict[str, Any]], str | None]
"""Messages and further names to a prompt; None where the template refuses or fails."""


class Form(enum.Enum):
    STRING = "string"
    PARTS = "parts"
    ONE_PART = "one part"
    """Of a list only one entry is read."""
    EITHER = "either"


def as_form(form: Form, texts: Sequence[str], sent_parts: bool) -> str | list[dict[str, str]]:
    """The texts of one message's parts, or its only text, as the template takes them."""
    if form is Form.PARTS or (form is Form.EITHER and sent_parts):
        return [{"type": "text", "text": text} for text in texts]
    joined = "\n".join(texts)
    return [{"type": "text", "text": joined}] if form is Form.ONE_PART else joined


# ------------------------------------------------------------ the syntax tree

_KIND_TESTS = frozenset(("string", "iterable", "sequence", "mapping"))
_OF_LISTS = frozenset(("selectattr", "rejectattr", "map", "first", "last", "select", "reject", "join"))


def proposed_form(tree: nodes.Template) -> Form:
    known = _content_names(tree)

    def is_content(node: nodes.Node | None) -> bool:
        return _is_content(node, known)

    listed = any(is_content(loop.iter) for loop in tree.find_all(nodes.For))
    listed |= any(is_content(one.node) and one.name in _OF_LISTS for one in tree.find_all(nodes.Filter))
    listed |= any(
        is_content(one.node) and isinstance(one.arg, nodes.Const) and isinstance(one.arg.value, int)
        for one in tree.find_all(nodes.Getitem)
    )
    tested = any(is_content(one.node) and one.name in _KIND_TESTS for one in tree.find_all(nodes.Test))
    if not listed:
        return Form.STRING
    return Form.EITHER if tested else Form.PARTS


def _is_content(node: nodes.Node | None, known: frozenset[str]) -> bool:
    match node:
        case nodes.Name():
            return node.name in known
        case nodes.Getattr(node=nodes.Name(name=owner), attr=attribute):
            return attribute == "content" or f"{owner}.{attribute}" in known
        case nodes.Getattr():
            return node.attr == "content"
        case nodes.Getitem(arg=nodes.Const(value="content")):
            return True
        case nodes.Getitem(arg=nodes.Slice()) | nodes.Filter():
            return _is_content(node.node, known)
        case nodes.Call(node=nodes.Getattr(attr="get"), args=[nodes.Const(value="content"), *_]):
            return True
        case nodes.CondExpr():
            return _is_content(node.expr1, known) or _is_content(node.expr2, known)
        case nodes.Or() | nodes.And():
            return _is_content(node.left, known) or _is_content(node.right, known)
    return False


def _content_names(tree: nodes.Template) -> frozenset[str]:
    """Names that somewhere stand for a message's content: set to it, or a macro's parameter for it."""
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    known: frozenset[str] = frozenset()
    while True:
        targets = [one.target for one in tree.find_all(nodes.Assign) if _is_content(one.node, known)]
        found = {target.name for target in targets if isinstance(target, nodes.Name)}
        found |= {f"{target.name}.{target.attr}" for target in targets if isinstance(target, nodes.NSRef)}
        for call in tree.find_all(nodes.Call):
            macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
            if macro is not None:
                pairs = zip(macro.args, call.args, strict=False)
                found |= {parameter.name for parameter, given in pairs if _is_content(given, known)}
                found |= {one.key for one in call.kwargs if _is_content(one.value, known)}
        if found <= known:
            return known
        known |= found


def _mentions(tree: nodes.Template, key: str) -> bool:
    """Whether an attribute or a key of this name is read."""
    return any(one.attr == key for one in tree.find_all(nodes.Getattr)) or any(
        one.value == key for one in tree.find_all(nodes.Const)
    )


# ------------------------------------------------------------ marked renderings

ROLES = ("user", "system", "developer", "assistant", "tool")
_PRINTED = ("'text': '{}", '"text": "{}', '"text":"{}')
"""How a part looks that was not read but printed as it is."""
_TOOL = {
    "type": "function",
    "function": {
        "name": "marktool",
        "description": "A tool.",
        "parameters": {"type": "object", "properties": {"markkey": {"type": "string"}}},
    },
}


def mark(number: int) -> str:
    """A text that is in no template."""
    return f"Mk{number}zq"


def _shapes(role: str, subject: Message, filler: Callable[[int], Any]) -> list[list[Message]]:
    """Conversations with the subject in them: some templates want a system prompt, some want none."""
    user: Message = {"role": "user", "content": filler(90)}
    answer: Message = {"role": "assistant", "content": filler(91)}
    system: Message = {"role": "system", "content": filler(92)}
    if role in ("system", "developer"):
        return [[subject, user], [subject, user, answer, user]]
    if role == "user":
        shapes = [[subject], [user, answer, subject], [subject, answer, user]]
    elif role == "assistant":
        shapes = [[user, subject], [user, subject, user]]
    else:
        call = {"id": "mark12345", "type": "function", "function": {"name": "marktool", "arguments": {}}}
        asking = {"role": "assistant", "content": "", "tool_calls": [call]}
        answered = {**subject, "tool_call_id": "mark12345", "name": "marktool"}
        shapes = [[user, asking, answered], [user, answer, subject]]
    return shapes + [[system, *shape] for shape in shapes]


@dataclass(frozen=True, slots=True)
class Study:
    """What a template was found to take.

    `faithful`: no rendering of several users' turns lost one. `reads` are the variables that it mentions;
    `calls` says whether calls in the history come out, `mapping` whether their arguments are to be an object.
    """

    forms: dict[str, Form]
    faithful: bool
    reads: frozenset[str]
    calls: bool
    mapping: bool

    def form_of(self, role: str) -> Form:
        return self.forms.get(role, self.forms["user"])


def study(tree: nodes.Template, render: Render) -> Study:
    """`render` raises whatever ends the study: then the syntax tree alone decides."""
    reads = frozenset(one.name for one in tree.find_all(nodes.Name))
    proposal, mentioned = proposed_form(tree), _mentions(tree, "tool_calls")
    forms = dict.fromkeys(ROLES, proposal)
    try:
        for role in ROLES:
            forms[role] = _form_of(role, render) or proposal
        mapping, text = (_is_call_shown(render, forms, arguments) for arguments in _ARGUMENTS)
        faithful = _is_faithful(render, forms)
    except jinja2.TemplateError:
        return Study(forms, False, reads, mentioned, True)
    calls = mentioned if mapping is text is None else bool(mapping or text)
    return Study(forms, faithful, reads, calls, bool(mapping) or not text)


def _form_of(role: str, render: Render) -> Form | None:
    """None: no form was seen to come out whole."""
    string = _kept(role, render, Form.STRING, (mark(1),))
    parts = _kept(role, render, Form.PARTS, (mark(1), mark(2)))
    if string:
        return Form.EITHER if parts else Form.STRING
    if parts:
        return Form.PARTS
    return Form.ONE_PART if _kept(role, render, Form.ONE_PART, (mark(1),)) else None


def _kept(role: str, render: Render, form: Form, texts: Sequence[str]) -> bool:
    """Whether the texts came out of all renderings that there were, and there was one."""
    subject: Message = {"role": role, "content": as_form(form, texts, True)}
    kept: list[bool] = []
    for messages in _shapes(role, subject, lambda number: as_form(form, (mark(number),), True)):
        prompt = render(messages, {})
        if prompt is not None:
            printed = any(one.format(text) in prompt for one in _PRINTED for text in texts)
            kept.append(all(text in prompt for text in texts) and not printed)
    return bool(kept) and all(kept)


_ARGUMENTS: tuple[Any, ...] = ({"markkey": mark(1)}, f'{{"markkey": "{mark(1)}"}}')


def _said(role: str, number: int, forms: dict[str, Form]) -> Message:
    return {"role": role, "content": as_form(forms[role], (mark(number),), False)}


def _is_call_shown(render: Render, forms: dict[str, Form], arguments: Any) -> bool | None:
    """Whether a call in the history comes out with its arguments. None: nothing was rendered."""
    call = {"id": "mark12345", "type": "function", "function": {"name": "markcall", "arguments": arguments}}
    asked, asking = _said("user", 90, forms), {"role": "assistant", "content": "", "tool_calls": [call]}
    answered = {**_said("tool", 91, forms), "tool_call_id": "mark12345", "name": "markcall"}
    shapes = [[asked, asking, answered], [asked, asking]]
    shapes += [[_said("system", 92, forms), *shape] for shape in shapes]
    prompts = [render(shape, {"tools": [_TOOL]}) for shape in shapes]
    shown = [
        "markcall" in prompt and mark(1) in prompt and "'markkey'" not in prompt
        for prompt in prompts
        if prompt is not None
    ]
    return any(shown) if shown else None


def _is_faithful(render: Render, forms: dict[str, Form]) -> bool:
    turns = [_said(("user", "assistant")[number % 2], number, forms) for number in range(7)]
    in_a_row = [_said("user", number, forms) for number in (0, 2, 4, 6)]
    with_system = [_said("system", 50, forms), *turns]
    prompts = [render(messages, {}) for messages in (turns, with_system, in_a_row)]
    rendered = [prompt for prompt in prompts if prompt is not None]
    return bool(rendered) and all(_has_all(prompt, (0, 2, 4, 6)) for prompt in rendered)


def _has_all(prompt: str, numbers: Iterable[int]) -> bool:
    return all(mark(number) in prompt for number in numbers)
