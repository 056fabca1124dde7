"""What of a chat's body reaches the template, what is left open, and what may not be lost."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from router.chat.chat_prompt import MAX_DEPTH, MAX_ENTRIES, REASONING_EFFORTS, chat_prompt
from router.chat.chat_template import ChatTemplate
from router.errors import ApiError
from router.openai.requests import BodyDecoder, ChatBody, TokenizeBody

DECODER = BodyDecoder()
PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{{ '<a>' if add_generation_prompt }}"
)
USER = {"role": "user", "content": "hi"}
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "look", "arguments": '{"at": "the \\"sky\\"", "n": 2}'},
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Looks.",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]


def write(directory: Path, source: str, **settings: Any) -> ChatTemplate:
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": source, **settings}))
    return ChatTemplate(directory)


def prompt(template: ChatTemplate, **fields: Any) -> str:
    """As a chat has it; `/tokenize` must have the same."""
    raw = json.dumps({"messages": [USER], **fields}).encode()
    body = DECODER.decode(ChatBody, raw)
    made = chat_prompt(template, body, body.messages)
    counted = DECODER.decode(TokenizeBody, raw)
    assert counted.messages is not None
    assert chat_prompt(template, counted, counted.messages) == made
    return made


def refused(template: ChatTemplate, **fields: Any) -> ApiError:
    errors = []
    for kind in (ChatBody, TokenizeBody):
        with pytest.raises(ApiError) as caught:
            body = DECODER.decode(kind, json.dumps({"messages": [USER], **fields}).encode())
            chat_prompt(template, body, body.messages or [])
        errors.append(caught.value)
    assert errors[0].body() == errors[1].body()
    assert errors[0].status == 400
    return errors[0]


# ------------------------------------------------------------ names


@pytest.mark.parametrize("effort", REASONING_EFFORTS)
def test_the_effort_reaches_the_template(effort: str, tmp_path: Path) -> None:
    template = write(tmp_path, "{{ reasoning_effort }} {{ enable_thinking }} {{ messages[0].content }}")
    assert prompt(template, reasoning_effort=effort) == f"{effort} {effort != 'none'} hi"
    assert prompt(template) == "  hi"
    given = {"enable_thinking": "mine", "reasoning_effort": "not this"}
    assert prompt(template, reasoning_effort=effort, chat_template_kwargs=given) == f"{effort} mine hi"


@pytest.mark.parametrize("effort", [5, "banana", "", [], True, "HIGH"])
def test_an_effort_that_nobody_knows_is_refused(effort: Any, tmp_path: Path) -> None:
    assert refused(write(tmp_path, PLAIN), reasoning_effort=effort).param == "reasoning_effort"


def test_any_json_reaches_the_template(tmp_path: Path) -> None:
    template = write(tmp_path, "{{ a | tojson }} {{ b is none }} {{ messages[0].content }}")
    value = {"list": [1, 2.5, None, [True]], "text": "é"}
    made = prompt(template, chat_template_kwargs={"a": value, "b": None, "unread": 1})
    assert made == json.dumps(value, ensure_ascii=False) + " True hi"


@pytest.mark.parametrize(
    "name", ["messages", "tools", "documents", "add_generation_prompt", "chat_template", "bos_token"]
)
def test_names_of_the_template_are_not_replaced(name: str, tmp_path: Path) -> None:
    error = refused(write(tmp_path, PLAIN, bos_token="<s>"), chat_template_kwargs={name: "x"})
    assert error.param == f"chat_template_kwargs.{name}"


def test_json_for_the_template_is_bounded(tmp_path: Path) -> None:
    deep: Any = "x"
    for _ in range(MAX_DEPTH):
        deep = [deep]
    template = write(tmp_path, PLAIN)
    assert "deep" in refused(template, chat_template_kwargs={"a": deep}).message
    assert "values" in refused(template, chat_template_kwargs={"a": [0] * (MAX_ENTRIES + 1)}).message
    assert prompt(template, chat_template_kwargs={"a": deep[0], "b": [0] * 1000}) == "<user>hi</><a>"


# ------------------------------------------------------------ tools

TOOL_TEMPLATE = (
    "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}<{{ m.role }}{{ ' ' + m.tool_call_id if m.tool_call_id }}"
    "{{ ' ' + m.name if m.name }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "[{{ c.id }} {{ c.function.name }} #]{% endfor %}</>{% endfor %}"
)
HISTORY = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "name": "look", "content": "blue"},
]


@pytest.mark.parametrize(
    ("reads", "shown"),
    [
        ("{{ c.function.arguments | tojson }}", '{"at": "the \\"sky\\"", "n": 2}'),
        ("{% for k, v in c.function.arguments | items %}{{ k }}={{ v }} {% endfor %}", 'at=the "sky" n=2 '),
        ("{{ '(' + c.function.arguments + ')' }}", '({"at": "the \\"sky\\"", "n": 2})'),
        ("{{ c.function.arguments }}", '{"at": "the \\"sky\\"", "n": 2}'),
    ],
)
def test_tools_and_their_history_reach_the_template(reads: str, shown: str, tmp_path: Path) -> None:
    template = write(tmp_path, TOOL_TEMPLATE.replace("#", reads))
    made = prompt(template, messages=HISTORY, tools=TOOLS)
    assert made == json.dumps(TOOLS[0]) + f"<user>hi</><assistant>[c1 look {shown}]</><tool c1 look>blue</>"


@pytest.mark.parametrize("arguments", ["", None, {}, "{}"])
def test_no_arguments_are_an_empty_object(arguments: Any, tmp_path: Path) -> None:
    template = write(tmp_path, TOOL_TEMPLATE.replace("#", "{{ c.function.arguments | tojson }}"))
    call = {"id": "c", "function": {"name": "look", "arguments": arguments}}
    assert "[c look {}]" in prompt(template, messages=[USER, {"role": "assistant", "tool_calls": [call]}])


@pytest.mark.parametrize("arguments", ["{not json", "[1]", "3"])
def test_what_a_model_wrote_badly_stays_as_it_is(arguments: str, tmp_path: Path) -> None:
    template = write(tmp_path, TOOL_TEMPLATE.replace("#", "{{ c.function.arguments }}"))
    call = {"id": "c", "function": {"name": "look", "arguments": arguments}}
    made = prompt(template, messages=[USER, {"role": "assistant", "tool_calls": [call]}])
    assert f"[c look {arguments}]" in made


def test_a_template_of_its_own_for_tools(tmp_path: Path) -> None:
    named = [
        {"name": "default", "template": "plain {{ messages[0].content }}"},
        {"name": "tool_use", "template": "with {{ tools | length }} {{ messages[0].content }}"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = ChatTemplate(tmp_path)
    assert (prompt(template), prompt(template, tools=TOOLS)) == ("plain hi", "with 1 hi")
    (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].content }}")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(
        "tools {{ tools[0].function.name }} {{ messages[0].content }}"
    )
    template = ChatTemplate(tmp_path)
    assert (prompt(template), prompt(template, tools=TOOLS)) == ("file hi", "tools look hi")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"tools": TOOLS}, "tools", "unsupported_parameter"),
        ({"tools": TOOLS, "tool_choice": "auto"}, "tools", "unsupported_parameter"),
        ({"documents": [{"text": "x"}]}, "documents", "unsupported_parameter"),
        ({"messages": HISTORY}, "messages[1].tool_calls", "unsupported_parameter"),
        ({"tool_choice": "required"}, "tool_choice", "unsupported_parameter"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "look"}}},
            "tool_choice",
            "unsupported_parameter",
        ),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type", "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, "tools[0].function.name", None),
        ({"tools": [3]}, "tools[0]", None),
        ({"messages": [{**USER, "tools": TOOLS}]}, "messages[0].tools", "unsupported_parameter"),
        ({"messages": [{**USER, "audio": {"id": "x"}}]}, "messages[0].audio", "unsupported_parameter"),
        ({"messages": [{**USER, "function_call": {}}]}, "messages[0].function_call", "unsupported_parameter"),
    ],
)
def test_what_the_template_does_not_read_is_refused(
    fields: dict[str, Any], param: str, code: str | None, tmp_path: Path
) -> None:
    error = refused(write(tmp_path, PLAIN), **fields)
    assert (error.param, error.code) == (param, code)


def test_values_that_ask_for_no_tool(tmp_path: Path) -> None:
    template = write(tmp_path, PLAIN)
    for fields in (
        {"tools": []},
        {"tools": None, "tool_choice": "auto"},
        {"tools": TOOLS, "tool_choice": "none"},
        {"documents": []},
        {"messages": [{**USER, "tool_calls": [], "tools": []}]},
    ):
        assert prompt(template, **fields) == "<user>hi</><a>"


# ------------------------------------------------------------ messages


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_has_all_its_names(name: str, tmp_path: Path) -> None:
    shown = "{{ m.content }}{{ m.reasoning }}{{ m.reasoning_content }}{{ m.thinking }}"
    source = "{% for m in messages %}" + shown + "{% endfor %}"
    messages = [USER, {"role": "assistant", "content": "a", name: "R"}]
    made = prompt(write(tmp_path, source), messages=messages, add_generation_prompt=False)
    assert made == "hiaRRR"
    theirs, _ = render_jinja_template([messages], chat_template=source.replace("{{ m.reasoning }}", "R"))
    assert theirs[0].removeprefix("hiR").startswith("aR")


def test_any_role_reaches_the_template(tmp_path: Path) -> None:
    messages = [
        {"role": role, "content": "x"} for role in ("my-custom-role", "developer", "function", "critic")
    ]
    made = prompt(write(tmp_path, PLAIN), messages=messages)
    assert made == "<my-custom-role>x</><developer>x</><function>x</><critic>x</><a>"
    strict = write(
        tmp_path,
        "{% for m in messages %}{{ raise_exception('unknown role') if m.role != 'user' }}{% endfor %}",
    )
    assert "unknown role" in refused(strict, messages=messages).message


@pytest.mark.parametrize(
    ("role", "part", "text"),
    [
        ("user", {"type": "text", "text": "a"}, "a"),
        ("user", {"type": "input_text", "text": "a"}, "a"),
        ("user", "a", "a"),
        ("assistant", {"type": "output_text", "text": "a"}, "a"),
        ("assistant", {"type": "refusal", "refusal": "no"}, "no"),
        ("assistant", {"type": "thinking", "thinking": "hm"}, "hm"),
    ],
)
def test_parts_that_are_text(role: str, part: Any, text: str, tmp_path: Path) -> None:
    messages = [{"role": role, "content": [part, {"type": "text", "text": "b"}]}]
    assert prompt(write(tmp_path, PLAIN), messages=messages) == f"<{role}>{text}\nb</><a>"


@pytest.mark.parametrize(
    ("role", "part", "path"),
    [
        ("user", {"type": "image_url", "image_url": {"url": "x"}}, "type"),
        ("user", {"type": "input_audio", "input_audio": {}}, "type"),
        ("user", {"type": "file", "file": {}}, "type"),
        ("user", {"type": "refusal", "refusal": "no"}, "type"),
        ("user", {"type": "thinking", "thinking": "hm"}, "type"),
        ("tool", {"type": "tool_reference", "name": "x"}, "type"),
        ("user", {"text": "a"}, "type"),
        ("user", {"type": ["text"], "text": "a"}, "type"),
        ("user", {"type": "text"}, "text"),
        ("user", {"type": "text", "text": None}, "text"),
        ("assistant", {"type": "refusal", "text": "no"}, "refusal"),
    ],
)
def test_parts_that_are_not(role: str, part: Any, path: str, tmp_path: Path) -> None:
    messages = [USER, {"role": role, "content": [{"type": "text", "text": "a"}, part]}]
    error = refused(write(tmp_path, PLAIN), messages=messages)
    assert error.param == f"messages[1].content[1].{path}"
    assert error.code == ("unsupported_content" if path == "type" else None)


def test_a_refusal_is_what_was_said(tmp_path: Path) -> None:
    messages = [USER, {"role": "assistant", "content": None, "refusal": "I will not."}]
    assert "<assistant>I will not.</>" in prompt(write(tmp_path, PLAIN), messages=messages)


# ------------------------------------------------------------ an open end


@pytest.mark.parametrize("tail", ["", " ", "\n"])
@pytest.mark.parametrize(
    "content",
    ["{{ m.content }}", "{{ m.content | trim }}", "{% for c in m.content %}{{ c.text }}{% endfor %}"],
)
def test_a_final_message_is_continued(content: str, tail: str, tmp_path: Path) -> None:
    source = "{% for m in messages %}<{{ m.role }}>" + content + "</>{% endfor %}"
    messages = [USER, {"role": "assistant", "content": f"The answer is{tail}"}]
    template = write(tmp_path, source)
    form = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    theirs, _ = render_jinja_template(
        [form if "for c in" in content else messages], chat_template=source, continue_final_message=True
    )
    for given in ({"add_generation_prompt": False}, {}):
        assert prompt(template, messages=messages, continue_final_message=True, **given) == theirs[0]


def test_what_cannot_be_continued_is_refused(tmp_path: Path) -> None:
    both = refused(write(tmp_path, PLAIN), continue_final_message=True, add_generation_prompt=True)
    assert both.param == "continue_final_message"
    dropped = write(tmp_path, "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    messages = [USER, {"role": "assistant", "content": "x"}]
    assert refused(dropped, messages=messages, continue_final_message=True).param == "continue_final_message"


# ------------------------------------------------------------ nothing is lost

EACH = "{% for m in messages %}{{ m.content }}{% endfor %}"
LAST_ONLY = "{{ messages[-1].content }}<assistant user a b c>"
PARTS = [{"type": "text", "text": text} for text in ("one", "two", "three")]
TURNS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "What is prefill?"},
]


@pytest.mark.parametrize(
    ("source", "messages", "path"),
    [
        ("nothing", [USER], "messages[0].content"),
        ("{{ messages | length }}", TURNS, "messages[0].content"),
        (LAST_ONLY, TURNS, "messages[0].content"),
        (LAST_ONLY, [USER, USER, USER], "messages[0].content"),
        ("{{ messages[0].content }}", TURNS, "messages[2].content"),
        ("{% for m in messages[-2:] %}{{ m.content }}{% endfor %}", TURNS, "messages[0].content"),
        ("{% for m in messages %}{{ m.content[:5] }}{% endfor %}", TURNS, "messages[2].content"),
        ("{% for m in messages %}{{ m.content.split('?')[0] }}{% endfor %}", TURNS, "messages[2].content"),
        (EACH.replace("messages", "messages if m.role == 'user'"),
         [USER, {"role": "x", "content": "lost words"}], "messages[1].content"),
        (EACH.replace("messages", "messages if m.role != 'tool'"),
         [USER, {"role": "tool", "content": "lost words"}], "messages[1].content"),
        (EACH.replace("content", "text"), [{"role": "user", "content": PARTS}], "messages[0].content"),
        (EACH.replace("m.content", "m.content[0].text ~ m.content[1].text"),
         [{"role": "user", "content": PARTS}], "messages[0].content"),
    ],
)  # fmt: skip
def test_a_prompt_without_what_was_said_is_refused(
    source: str, messages: list[dict[str, Any]], path: str, tmp_path: Path
) -> None:
    error = refused(write(tmp_path, source), messages=messages)
    assert (error.code, error.param) == ("template_lost_text", path)


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        (PLAIN, TURNS),
        (PLAIN, [{"role": "user", "content": ""}]),
        (PLAIN, [{"role": "user"}]),
        (PLAIN, [{"role": "user", "content": " \n\t "}]),
        (PLAIN, [USER] * 5),
        (EACH.replace("m.content", "m.content | trim"), [{"role": "user", "content": " x \n"}]),
        (EACH.replace("m.content", "m.content | tojson"), [{"role": "user", "content": 'é "q"\n\\'}]),
        (EACH.replace("m.content", "m.content | e"), [{"role": "user", "content": "<b> & 'c'"}]),
        (EACH.replace("messages", "messages | reverse"), TURNS),
        (EACH.replace("m.content", "m.content.split('</think>')[-1] if m.role == 'assistant' else m.content"),
         [USER, {"role": "assistant", "content": "x</think>y"}, USER]),
        (EACH.replace("messages", "messages if m.role != 'system'"),
         [{"role": "system", "content": "lost"}, USER]),
        ("{{ messages[0].content }}", [USER]),
    ],
)  # fmt: skip
def test_a_prompt_with_it_is_not(source: str, messages: list[dict[str, Any]], tmp_path: Path) -> None:
    prompt(write(tmp_path, source), messages=messages)


@pytest.mark.parametrize(
    "source",
    [
        PLAIN,
        "{% for m in messages %}{{ m.content | tojson }}{% endfor %}",
        "{% for m in messages | reverse %}{{ m.content }}|{% endfor %}",
    ],
)
def test_looking_for_lost_texts_is_linear(source: str, tmp_path: Path) -> None:
    """Four thousand turns, two megabytes: a search from the beginning for each would read gigabytes."""
    text = 'a "b" ' * 80
    messages = [{"role": ("user", "assistant")[at % 2], "content": f"{text}{at}"} for at in range(4095)]
    body = DECODER.decode(ChatBody, json.dumps({"messages": messages}).encode())
    (tmp_path / "chat_template.jinja").write_text(source)
    template = ChatTemplate(tmp_path, clock=lambda: 0.0)  # its own time limit is not what is tested
    template.learn()
    begun_s = time.process_time()
    template.render(messages, True)
    rendered_s = time.process_time() - begun_s
    begun_s = time.process_time()
    chat_prompt(template, body, body.messages)
    assert time.process_time() - begun_s < 10 * rendered_s + 0.5
