"""Templates of every make, and the form of content that each of them takes. transformers is the reference."""

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from router.chat.chat_prompt import chat_prompt
from router.chat.chat_template import ChatTemplate
from router.chat.content_form import Form, proposed_form
from router.errors import ApiError
from router.openai.requests import BodyDecoder, ChatBody

DECODER = BodyDecoder()

LOOP = "{% for c in @ %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
READERS: dict[str, tuple[str, Form]] = {
    "string": ("{{ @ }}", Form.STRING),
    "concatenated": ("{{ 'x' + @ + 'y' }}", Form.STRING),
    "trimmed": ("{{ @ | trim }}", Form.STRING),
    "json": ("{{ @ | tojson }}", Form.STRING),
    "split": ("{{ @.split('</think>')[-1] }}", Form.STRING),
    "loop": (LOOP, Form.PARTS),
    "loop by attribute": ("{% for c in @ %}{{ c.text }}{% endfor %}", Form.PARTS),
    "loop with a condition": (
        "{% for c in @ if c.type == 'text' %}{{ c.text | trim }}{% endfor %}",
        Form.PARTS,
    ),
    "filters": (
        "{% for c in @ | selectattr('type', 'equalto', 'text') %}{{ c.text }}{% endfor %}",
        Form.PARTS,
    ),
    "joined": ("{{ @ | map(attribute='text') | join('') }}", Form.PARTS),
    "joined by attribute": ("{{ @ | join('|', attribute='text') }}", Form.PARTS),
    "first": ("{{ @[0]['text'] }}", Form.ONE_PART),
    "first by filter": ("{{ (@ | first).text }}", Form.ONE_PART),
    "set": ("{% set parts = @ %}{% for c in parts %}{{ c.text }}{% endfor %}", Form.PARTS),
    "namespace": (
        "{% set ns = namespace() %}{% set ns.p = @ %}{% for c in ns.p %}{{ c.text }}{% endfor %}",
        Form.PARTS,
    ),
    "either": ("{% if @ is string %}{{ @ }}{% else %}" + LOOP + "{% endif %}", Form.EITHER),
    "either by sequence": (
        "{% if @ is sequence and @ is not string %}" + LOOP + "{% else %}{{ @ }}{% endif %}",
        Form.EITHER,
    ),
    "either by mapping": (
        "{% for c in ([@] if @ is string else @) %}{{ c if c is string else c.text }}{% endfor %}",
        Form.EITHER,
    ),
    "string or the first": ("{{ @ if @ is string else @[0]['text'] }}", Form.STRING),
    "macro": ("{{ show(@) }}", Form.EITHER),
    "parts in a macro": ("{{ each(@) }}", Form.PARTS),
}
MACROS = (
    "{% macro show(c) %}{% if c is string %}{{ c }}{% else %}{% for p in c %}{{ p.text }}{% endfor %}"
    "{% endif %}{% endmacro %}{% macro each(list) %}{% for p in list %}{{ p.text }}{% endfor %}{% endmacro %}"
)
CONTENTS = ("m['content']", "m.content", "m.get('content')")
FRAMES = {
    "plain": "{% for m in messages %}<{{ m.role }}>#</>{% endfor %}",
    "by role": (
        "{% for m in messages %}{% if m.role == 'user' %}U:#{% elif m.role == 'assistant' %}A:#{% else %}O:#"
        "{% endif %}{% endfor %}"
    ),
    "alternating": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('they alternate') }}"
        "{% endif %}[#]{% endfor %}"
    ),
    "system first": (
        "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
        "{% for m in messages %}<{{ m.role }}>#{% endfor %}"
    ),
    "renamed": "{% set turns = messages %}{% for turn in turns %}{% set m = turn %}#{% endfor %}",
}


def write(directory: Path, source: str) -> ChatTemplate:
    (directory / "chat_template.jinja").write_text(source)
    return ChatTemplate(directory)


def source_of(frame: str, reader: str, content: str) -> str:
    return MACROS + FRAMES[frame].replace("#", READERS[reader][0].replace("@", content))


def theirs(source: str, messages: list[dict[str, Any]]) -> str:
    rendered, _ = render_jinja_template([messages], chat_template=source, add_generation_prompt=True)
    made: str = rendered[0]
    return made


def ours(template: ChatTemplate, messages: list[dict[str, Any]]) -> str:
    body = DECODER.decode(ChatBody, json.dumps({"messages": messages}).encode())
    return chat_prompt(template, body, body.messages)


def in_form(form: Form, texts: list[str], sent_parts: bool) -> Any:
    """What transformers' users would send for this template."""
    if form is Form.PARTS or (form is Form.EITHER and sent_parts):
        return [{"type": "text", "text": text} for text in texts]
    return [{"type": "text", "text": "\n".join(texts)}] if form is Form.ONE_PART else "\n".join(texts)


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("reader", READERS)
def test_the_form_is_found(reader: str, frame: str, tmp_path: Path) -> None:
    content = CONTENTS[len(reader + frame) % len(CONTENTS)]
    found = write(tmp_path, source_of(frame, reader, content)).program().study
    assert found.form_of("user") is found.form_of("assistant") is READERS[reader][1]
    assert found.faithful


@pytest.mark.parametrize("reader", READERS)
def test_the_tree_proposes_a_form_that_loses_nothing(reader: str) -> None:
    """Without any rendering. Of a list that is indexed, the tree cannot say whether more is read."""
    tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
        source_of("plain", reader, "m.content")
    )
    expected = READERS[reader][1]
    proposed = {Form.ONE_PART: Form.PARTS}.get(expected, expected)
    if reader == "string or the first":
        proposed = Form.EITHER
    assert proposed_form(tree) is proposed


TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
CONTENT = st.one_of(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    reader=st.sampled_from(sorted(READERS)),
    frame=st.sampled_from(sorted(FRAMES)),
    access=st.sampled_from(CONTENTS),
    contents=st.lists(CONTENT, min_size=1, max_size=4),
    with_system=st.booleans(),
)
def test_prompts_are_those_of_transformers(
    reader: str, frame: str, access: str, contents: list[Any], with_system: bool, tmp_path: Path
) -> None:
    source, form = source_of(frame, reader, access), READERS[reader][1]
    roles = [("user", "assistant")[at % 2] for at in range(len(contents))]
    if with_system:
        roles, contents = ["system", *roles], ["Be brief.", *contents]
    sent: list[dict[str, Any]] = []
    wanted: list[dict[str, Any]] = []
    for role, content in zip(roles, contents, strict=True):
        texts = content if isinstance(content, list) else [content]
        as_parts = [{"type": "text", "text": text} for text in texts]
        sent.append({"role": role, "content": as_parts if isinstance(content, list) else content})
        wanted.append({"role": role, "content": in_form(form, texts, isinstance(content, list))})
        if content == "" and form in (Form.PARTS, Form.ONE_PART):
            wanted[-1]["content"] = [] if form is Form.PARTS else ""
    try:
        expected = theirs(source, wanted)
    except Exception:
        with pytest.raises(ApiError):
            ours(write(tmp_path, source), sent)
        return
    assert ours(write(tmp_path, source), sent) == expected


def test_roles_may_have_forms_of_their_own(tmp_path: Path) -> None:
    source = (
        "{% if messages[0].role == 'system' %}{{ messages[0].content if messages[0].content is string "
        "else messages[0].content[0].text }}|{% endif %}{% for m in messages if m.role != 'system' %}" + LOOP
    ).replace("@", "m.content") + "{% endfor %}"
    template = write(tmp_path, source)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "system", "content": parts}, {"role": "user", "content": parts}]
    assert ours(template, messages) == "a\nb|ab"
    assert ours(template, [{"role": "user", "content": "c"}]) == "c"


def test_users_in_parts_and_assistants_in_strings(tmp_path: Path) -> None:
    """Without a variable, loop or test from which the tree could tell."""
    in_parts = "{% if m.role == 'user' %}{{ m.content | map(attribute='text') | join }}"
    reader = in_parts + "{% else %}{{ m.content }}{% endif %}"
    template = write(tmp_path, "{% for m in messages %}" + reader + "|{% endfor %}")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": role, "content": parts} for role in ("user", "assistant", "user")]
    assert ours(template, messages) == "ab|a\nb|ab|"
    assert template.program().study.form_of("assistant") is Form.STRING


def test_a_template_that_takes_too_long_is_left_to_its_tree(tmp_path: Path) -> None:
    source = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    ticks = iter(range(10**9))
    (tmp_path / "chat_template.jinja").write_text(
        source + FRAMES["plain"].replace("#", LOOP.replace("@", "m.content"))
    )
    template = ChatTemplate(tmp_path, clock=lambda: next(ticks) * 1e-2)
    assert template.program().study.form_of("user") is Form.PARTS
    assert next(ticks) < 200
