"""The prompt of a chat: what `/v1/chat/completions` runs and `/tokenize` counts. Pure.

1. Names for the template are put together: tools, documents, reasoning effort, the request's own.
2. The messages get the template's form and are rendered.
3. A final message that is to be continued is left open.
4. What users, tools and all others but the assistant said must be in the prompt, or the request is refused.
"""

from collections.abc import Sequence
from typing import Any

from router.chat.chat_template import ChatTemplate
from router.chat.content_form import Study, mark
from router.chat.conversation import conversation, marked
from router.chat.lost_text import first_lost
from router.chat.template_budget import TemplateTooLarge
from router.chat.template_sandbox import TemplateTimeout
from router.errors import ApiError, invalid
from router.openai.requests import ChatBody, Message, TokenizeBody

REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
MAX_DEPTH = 32
"""Of JSON that goes to the template as it is."""
MAX_ENTRIES = 1 << 16
_OPEN_END = "MkOpenEndzq "
"""Put at the end of a message that is continued; its space shows whether the template strips."""


def chat_prompt(template: ChatTemplate, body: ChatBody | TokenizeBody, messages: Sequence[Message]) -> str:
    """Raises ApiError 400."""
    found = template.program(bool(body.tools)).study
    names = _names(template, body, found)
    made, said = conversation(messages, found)
    open_end = bool(body.continue_final_message)
    if open_end and body.add_generation_prompt:
        raise invalid(
            "'continue_final_message' and 'add_generation_prompt' cannot both be true.",
            "continue_final_message",
        )
    add_generation_prompt = body.add_generation_prompt is not False and not open_end
    if open_end:
        _mark_end(made[-1])
    prompt = template.render(made, add_generation_prompt, names)
    if open_end:
        prompt = _left_open(prompt)
    lost, sure = first_lost(said, prompt, found.faithful)
    if not sure:
        marks = [mark(number) for number in range(len(said))]
        try:
            shown = template.render(marked(made, said, marks), add_generation_prompt, names)
        except ApiError as error:
            if isinstance(error.__cause__, TemplateTimeout | TemplateTooLarge):
                raise
            return prompt  # it refuses the marks, and not what was said
        gone = (one for one, text in zip(said, marks, strict=True) if any(one.texts) and text not in shown)
        lost = next(gone, None)
    if lost is not None:
        raise invalid(
            f"This model's chat template leaves out '{lost.path}', of a message of role {lost.role!r}.",
            lost.path,
            "template_lost_text",
        )
    return prompt


# ------------------------------------------------------------ names


def _names(template: ChatTemplate, body: ChatBody | TokenizeBody, found: Study) -> dict[str, Any]:
    names: dict[str, Any] = {}
    effort = body.reasoning_effort
    if effort is not None:
        if effort not in REASONING_EFFORTS:
            raise invalid(
                f"'reasoning_effort' must be one of {', '.join(REASONING_EFFORTS)}.", "reasoning_effort"
            )
        names["enable_thinking"] = effort != "none"
    for name, value in (body.chat_template_kwargs or {}).items():
        path = f"chat_template_kwargs.{name}"
        if name in template.own_names:
            raise invalid(f"'{path}' cannot be set: the name is the template's own.", path)
        _check_json(value, path)
        names[name] = value
    if effort is not None:
        names["reasoning_effort"] = effort
    for name, given in (("tools", _tools(body.tools)), ("documents", body.documents)):
        if given:
            if name not in found.reads:
                if name == "tools" and body.tool_choice == "none":
                    continue  # the model is to call none of them
                raise invalid(
                    f"'{name}' is not supported by this server: this model's chat template does not read it.",
                    name,
                    "unsupported_parameter",
                )
            _check_json(given, name)
            names[name] = given
    return names


def _tools(given: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    tools: list[dict[str, Any]] = []
    for index, tool in enumerate(given or ()):
        kind = tool.get("type", "function")
        if kind != "function":
            raise invalid(
                f"'tools[{index}].type' can only be 'function'.",
                f"tools[{index}].type",
                "unsupported_parameter",
            )
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise invalid(
                f"'tools[{index}].function.name' must be a string.", f"tools[{index}].function.name"
            )
        tools.append({"type": kind, **tool})
    return tools


def _check_json(value: Any, path: str) -> None:
    """Raises ApiError 400 for what is too deep or too large for a template to go through."""
    level, entries = [value], 0
    for _ in range(MAX_DEPTH):
        inside: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inside.extend(one.values())
            elif isinstance(one, list):
                inside.extend(one)
        entries += len(inside)
        if not inside:
            return
        if entries > MAX_ENTRIES:
            raise invalid(f"'{path}' holds more than {MAX_ENTRIES} values.", path)
        level = inside
    raise invalid(f"'{path}' is nested more than {MAX_DEPTH} deep.", path)


# ------------------------------------------------------------ an open end


def _mark_end(message: dict[str, Any]) -> None:
    content = message["content"]
    if isinstance(content, str):
        message["content"] = content + _OPEN_END
    elif content:
        content[-1]["text"] += _OPEN_END
    else:
        content.append({"type": "text", "text": _OPEN_END})


def _left_open(prompt: str) -> str:
    """The prompt up to where the final message ends, without its last spaces where the template strips."""
    at = prompt.rfind(_OPEN_END.rstrip())
    if at < 0:
        raise invalid(
            "'continue_final_message': the chat template does not end with the final message.",
            "continue_final_message",
        )
    return prompt[:at] if prompt.startswith(_OPEN_END, at) else prompt[:at].rstrip()
