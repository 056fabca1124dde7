"""The conversation that a chat template gets: a request's messages in its form of content and calls. Pure."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from msgspec import Struct

from router.chat.content_form import Form, Study, as_form
from router.errors import invalid
from router.openai.request_fields import ASSISTANT_PARTS, TEXT_PARTS, Field, refuse, refused_on
from router.openai.requests import Message, ToolCall

UNCHECKED_ROLES = frozenset(("assistant", "system"))
"""Templates take the thinking out of old answers, and some know no system prompt."""

_REFUSED: tuple[tuple[str, Field], ...] = tuple(refused_on("chat", "messages[]").items())


class Said(Struct, frozen=True):
    """A text that must come out of the rendering, and where it came from."""

    path: str
    role: str
    texts: tuple[str, ...]
    message: int


def conversation(messages: Sequence[Message], found: Study) -> tuple[list[dict[str, Any]], list[Said]]:
    """The template's messages, and what must not be lost of them.

    Raises ApiError 400 for images, audio, files, and calls that the template does not know.
    """
    made: list[dict[str, Any]] = []
    said: list[Said] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        refuse(_REFUSED, message, f"{where}.")
        texts = _texts_of(message, where)
        content = _content(message, texts, found.form_of(message.role))
        made.append({"role": message.role, "content": content, **_extras(message, where, found)})
        if message.role not in UNCHECKED_ROLES:
            said.append(Said(f"{where}.content", message.role, texts, index))
    return made, said


def _content(message: Message, texts: tuple[str, ...], form: Form) -> str | list[dict[str, str]]:
    if not texts:
        return [] if form is Form.PARTS else ""
    return as_form(form, texts, isinstance(message.content, list))


def _texts_of(message: Message, where: str) -> tuple[str, ...]:
    content = message.content
    if not content:
        # What an assistant refused with is what it said.
        return (message.refusal,) if message.refusal else ()
    if isinstance(content, str):
        return (content,)
    return tuple([_text_of(part, message.role, where, at) for at, part in enumerate(content)])


def _text_of(part: str | dict[str, Any], role: str, where: str, at: int) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type")
    key = TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    text = part.get(key) if key is not None else None
    if isinstance(text, str) and (kind not in ASSISTANT_PARTS or role == "assistant"):
        return text
    path = f"{where}.content[{at}]"
    if key is None or (kind in ASSISTANT_PARTS and role != "assistant"):
        raise invalid(
            f"'{path}': this text model cannot read a part of type {str(kind)[:64]!r} in a message of role "
            f"{role!r}.",
            f"{path}.type",
            "unsupported_content",
        )
    raise invalid(f"'{path}.{key}' must be a string.", f"{path}.{key}")


def _extras(message: Message, where: str, found: Study) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    for name in ("name", "refusal", "tool_call_id"):
        value = getattr(message, name)
        if value is not None:
            extras[name] = value
    reasoning = _first_given(message.reasoning, message.reasoning_content, message.thinking)
    if reasoning is not None:
        # Templates know it by one of these names.
        extras |= {"reasoning": reasoning, "reasoning_content": reasoning, "thinking": reasoning}
    if message.tool_calls:
        if not found.calls:
            raise invalid(
                f"'{where}.tool_calls' is not supported by this server: this model's chat template leaves "
                "calls out.",
                f"{where}.tool_calls",
                "unsupported_parameter",
            )
        extras["tool_calls"] = [_call(call, found.mapping) for call in message.tool_calls]
    return extras


def _first_given(*values: str | None) -> str | None:
    return next((value for value in values if value is not None), None)


def _call(call: ToolCall, mapping: bool) -> dict[str, Any]:
    arguments = call.function.arguments
    function = {"name": call.function.name, "arguments": _arguments(arguments, mapping)}
    made: dict[str, Any] = {"type": call.type, "function": function}
    return made if call.id is None else {"id": call.id, **made}


def _arguments(given: str | dict[str, Any] | None, mapping: bool) -> str | dict[str, Any]:
    """Clients send the JSON text of an object. What is no such text stays as it is: a model wrote it."""
    if not mapping:
        return given if isinstance(given, str) else json.dumps(given or {}, ensure_ascii=False)
    if isinstance(given, str) and given.strip():
        try:
            parsed = json.loads(given)
        except (ValueError, RecursionError):
            return given
        return parsed if isinstance(parsed, dict) else given
    return given if isinstance(given, dict) else {}


def marked(
    messages: list[dict[str, Any]], said: Iterable[Said], marks: Sequence[str]
) -> list[dict[str, Any]]:
    """The same conversation with a mark in place of each of the texts, and no other text of any length."""
    made = [{**message, "content": _shortened(message["content"])} for message in messages]
    for mark, one in zip(marks, said, strict=True):
        message = made[one.message]
        if isinstance(message["content"], str):
            message["content"] = mark
        else:
            message["content"] = [{"type": "text", "text": mark} for _ in message["content"]]
    return made


SHORT_CHARACTERS = 64


def _shortened(content: Any) -> Any:
    if isinstance(content, str):
        return content[:SHORT_CHARACTERS]
    return [{**part, "text": part["text"][:SHORT_CHARACTERS]} for part in content]
