"""Chat templates: what they get, and what they cannot do."""

import datetime
import itertools
import json
import tracemalloc
from pathlib import Path
from typing import Any

import jinja2.sandbox
import pytest

from router.chat import template_budget
from router.chat.chat_template import ChatTemplate
from router.config import RouterConfigError
from router.errors import ApiError
from router.text.tokenizer import TextTokenizer

MESSAGES = [{"role": "user", "content": "<b> & é"}]


def template(directory: Path, source: str, **settings: Any) -> ChatTemplate:
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": source, **settings}))
    return ChatTemplate(directory, now=lambda: datetime.datetime(2026, 1, 2))


def test_names_filters_and_functions(tmp_path: Path) -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 5 %}{% break %}{% endif %}"
        "{{ m | tojson }}{% endfor %}{{ strftime_now('%Y') }}{{ tools is none }}{{ add_generation_prompt }}"
        "{% generation %}x{% endgeneration %}{{ enable_thinking }}"
    )
    made = template(tmp_path, source, bos_token={"content": "<s>"})
    text = made.render(MESSAGES, True, {"enable_thinking": False, "messages": "not these"})
    assert text == '<s>{"role": "user", "content": "<b> & é"}2026TrueTruexFalse'


def test_a_file_of_its_own_comes_first(tmp_path: Path) -> None:
    template(tmp_path, "settings")
    (tmp_path / "chat_template.jinja").write_text("file")
    assert ChatTemplate(tmp_path).render(MESSAGES, True) == "file"


def test_special_tokens_of_an_older_checkpoint(tmp_path: Path) -> None:
    source = "{{ bos_token }} {{ eos_token }} {{ pad_token }}"
    older = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "additional_special_tokens": ["x"]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(older))
    assert template(tmp_path, source, pad_token="<p>").render(MESSAGES, True) == "<s> </s> <p>"
    made = template(tmp_path, source, bos_token="<b>", added_tokens_decoder={})
    assert made.render(MESSAGES, True) == "<b>  "
    made = ChatTemplate(tmp_path, {"bos_token": "<converted>"})
    assert made.render(MESSAGES, True) == "<converted>  "


def test_the_default_of_named_templates(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate(tmp_path).render(MESSAGES, True) == "d"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ 'x'.replace('x', '\t').expandtabs(100000) | length }}",
        "{{ 'x'.translate({120: 'xx'}) | length }}",
        "{{ (5).to_bytes(2000000000, 'big') | length }}",
        "{% include 'tokenizer.json' %}",
        "{% for i in range(100000000) %}x{% endfor %}",
        "{{ messages.nothing.at_all }}",
        "{{ 1 + 'a' }}",
        "{{ 1 // 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 2 ** -100000 }}",
        "{{ 'x' * 2000000 }}",
        "{{ 2000000 * [1] }}",
        "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    ],
)
def test_what_a_template_may_not_do_is_a_client_error(tmp_path: Path, source: str) -> None:
    made = template(tmp_path, source)
    messages = [dict(message) for message in MESSAGES]
    with pytest.raises(ApiError) as caught:
        made.render(messages, True)
    assert (caught.value.status, caught.value.param) == (400, "messages")
    assert messages == MESSAGES


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(100) %}{% for b in range(100) %}{% for c in range(100) %}{% endfor %}"
        "{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(20) }}",
        "{% for a in [[1]] recursive %}{% for b in range(99999) if loop is defined %}{% endfor %}"
        "{% endfor %}" * 9,
        "{% for a in range(9999) %}{{ loop.length }}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        "{% for a in range(9999) %}{% for b in range(9999) if false %}{% endfor %}{% endfor %}",
        "{% for a in [1] recursive %}{{ loop([1, 2]) if loop.depth < 40 }}{% endfor %}",
        "{% set n = namespace(d=0) %}{% block x %}{% set n.d = n.d + 1 %}{% if n.d < 40 %}{{ self.x() }}"
        "{{ self.x() }}{% endif %}{% set n.d = n.d - 1 %}{% endblock %}",
        "{% macro f() %}{{ caller() }}{% endmacro %}{% for a in range(900) %}"
        "{% for b in range(900) %}{% call f() %}{% endcall %}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_that_does_not_end_is_ended(tmp_path: Path, source: str) -> None:
    ticks = itertools.count()
    settings = {"chat_template": source}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    made = ChatTemplate(tmp_path, clock=lambda: next(ticks) * 1e-3)
    for _ in range(2):  # each render has its own time
        with pytest.raises(ApiError, match=r"does not come to an end: it ran for more than 1 s") as caught:
            made.render(MESSAGES, True)
        assert caught.value.status == 400
    assert next(ticks) < 3e3


GROW = "{% set n = namespace(s='x' * 1000) %}{% for i in range(60) %}"
COLLECT = "{% set n = namespace(l=[]) %}{% for i in range(9999) %}"
MACRO = "{% macro f() %}{% for i in range(99999) %}"
MEGABYTE = "{% set s = 'x' * 1000000 %}"


@pytest.mark.parametrize(
    "source",
    [
        GROW + "{% set n.s = n.s + n.s %}{% endfor %}",
        GROW + "{% set n.s = n.s ~ n.s %}{% endfor %}",
        GROW + "{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
        GROW + "{% set n.s = {'a': n.s, 'b': n.s} %}{% endfor %}{{ n.s | tojson }}",
        GROW + "{% set n.s = (n.s, n.s) %}{% endfor %}{{ n.s | string }}",
        GROW + "{% set n.s = n.s | replace('x', 'xx') %}{% endfor %}",
        GROW + "{% set n.s = n.s.replace('x', 'xx') %}{% endfor %}",
        GROW + "{% set n.s = '%s%s' % (n.s, n.s) %}{% endfor %}",
        GROW + "{% set n.s = '%s%s' | format(n.s, n.s) %}{% endfor %}",
        GROW + "{% set n.s = '{0}{0}'.format(n.s) %}{% endfor %}",
        GROW + "{% set n.s = '{a}{a}'.format_map({'a': n.s}) %}{% endfor %}",
        GROW + "{% set n.s = ''.join([n.s, n.s]) %}{% endfor %}",
        GROW + "{% set n.s = [n.s, n.s] | join %}{% endfor %}",
        GROW + "{% set s %}{{ n.s }}{{ n.s }}{% endset %}{% set n.s = s %}{% endfor %}",
        "{% macro f(s) %}{{ s }}{{ s }}{% endmacro %}" + GROW + "{% set n.s = f(n.s) %}{% endfor %}",
        "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
        MEGABYTE + COLLECT + "{% set n.l = n.l + [s[i:]] %}{% endfor %}",
        MEGABYTE + COLLECT + "{% set n.l = n.l + [s | upper] %}{% endfor %}",
        MEGABYTE + "{{ ([s] * 1000000) | map('upper') | list | length }}",
        MEGABYTE + "{{ ([s] * 1000000) | join | length }}",
        MEGABYTE + "{{ ([{'a': s}] * 1000000) | join(attribute='a') | length }}",
        MEGABYTE + "{{ ([s] * 1000000) | string | length }}",
        MEGABYTE + "{{ ([s] * 1000000) | tojson | length }}",
        MEGABYTE + "{{ s.join(s) | length }}",
        MEGABYTE + "{{ s | replace('x', s) | length }}",
        MEGABYTE + "{{ s.replace('', s) | length }}",
        MEGABYTE + "{{ ('{0}' * 1000).format(s) | length }}",
        MEGABYTE + "{{ ('%(a)s' * 1000) % {'a': s} }}",
        MEGABYTE + "{{ s | replace('x', '\n') | indent(1000000) | length }}",
        MEGABYTE + "{{ s | replace('x', '\n') | indent(s) | length }}",
        MEGABYTE + MACRO + "{{ s }}{% endfor %}{% endmacro %}{{ f() | length }}",
        MACRO + "x" * 9999 + "{% endfor %}{% endmacro %}{{ f() | length }}",
        "{{ ([[1] * 1000000] * 1000000) | string | length }}",
        "{{ ([{'a': ['b'] * 1000000}] * 1000000) | tojson | length }}",
        "{{ 'x'.ljust(2000000000) | length }}",
        "{{ 'x'.zfill(width=2000000000) | length }}",
        "{{ 'x' | center(2000000000) | length }}",
        "{{ '%2000000000d' % 1 }}",
        "{{ '%*d' % (2000000000, 1) }}",
        "{{ '{:>2000000000}'.format(1) }}",
        "{{ '{:>{w}}'.format(1, w=2000000000) }}",
        "{{ '%2000000000d' | format(1) }}",
        "{{ [1] | tojson(indent=2000000000) }}",
        "{{ strftime_now('%2000000000d') }}",
        GROW + "{% set n.s = dict(a=n.s, b=n.s) %}{% endfor %}",
        GROW + "{% set n.s = n.s + 'x' + n.s %}{% endfor %}",
        GROW + "{% set n.s = '<' ~ n.s | e | upper ~ n.s %}{% endfor %}",
        MEGABYTE + "{{ 'x' in [s] * 200000 }}",
        MEGABYTE + "{{ ([s] * 200000) | select('eq', 'x') | list }}",
        MEGABYTE
        + "{% set n = namespace(l=[s]) %}{% for i in range(18) %}{% set n.l = n.l + n.l %}{% endfor %}",
        MEGABYTE + COLLECT + "{% set n.l = [s + 'x', n.l] %}{% endfor %}",
        MEGABYTE + COLLECT + "{{ s + 'x' }}{% endfor %}",
        MEGABYTE + COLLECT + "{{ s[:4000] + 'x' }}{{ s[:4000] }}{{ 'x' * 4000 }}{% endfor %}",
        MEGABYTE + COLLECT + "{% set n.l = dict(n.l, **{i | string: s[:4000] ~ i}) %}{% endfor %}",
        MEGABYTE + "{% set t %}{% for i in range(99999) %}{{ s[:4000] + 'x' }}{% endfor %}{% endset %}",
        MEGABYTE + "{% filter upper %}{% for i in range(99999) %}{{ s }}{% endfor %}{% endfilter %}",
        MEGABYTE + "{% macro f(s) %}{% set t = s | upper %}{{ f(t ~ 'x') }}{% endmacro %}{{ f(s) }}",
        MEGABYTE
        + "{% block b %}{{ s }}{{ s }}{% endblock %}{% for i in range(99) %}{{ self.b() }}{% endfor %}",
        MEGABYTE + "{% autoescape true %}{% for i in range(999) %}{{ s }}{% endfor %}{% endautoescape %}",
        MEGABYTE + "{{ ([s] * 9) | map('replace', 'x', 'y' * 99) | list | length }}",
        MEGABYTE + "{{ dict.fromkeys(range(100000), s) | length }}",
        MEGABYTE + "{{ s.split('x') }}",
        MEGABYTE + "{{ s.replace('x', 'a\n').splitlines() }}",
        MEGABYTE + "{{ s | list }}",
        MEGABYTE + "{{ s | title }}",
        "{% set n = namespace(l=range(100000) | list) %}{% for i in range(99) %}{% set n.l = [n.l] %}"
        "{% endfor %}{{ n.l | tojson(indent=64) | length }}",
        "{% set n = namespace(a=[1], b=[1]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}"
        "{% set n.b = [n.b, n.b] %}{% endfor %}{{ n.a == n.b }}",
        "{% for i in range(100000) if range(100000) | list | length < 0 %}{% endfor %}",
        "{% set n = namespace() %}{% set n.n = n %}{{ n }}",
    ],
)
def test_a_template_that_makes_too_much_is_ended(tmp_path: Path, source: str) -> None:
    """By what it makes, whatever the clock says."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
    made = ChatTemplate(tmp_path, clock=lambda: 0.0)
    with pytest.raises(ApiError, match=r"makes too much") as caught:
        made.render(MESSAGES, True)
    assert caught.value.status == 400


@pytest.mark.parametrize("start", [MEGABYTE, GROW + "{% endfor %}", COLLECT + "{% endfor %}"])
def test_what_those_begin_with_is_not_too_much(tmp_path: Path, start: str) -> None:
    assert template(tmp_path, start + "{{ s | length }}").render(MESSAGES, True) in ("0", "1000000")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ ('<' | e) + '<' }}{{ '<' | safe ~ '<' }}{{ ('{}' | e).format('<') }}", "&lt;&lt;<<&lt;"),
        ("{% set x = ['a', 'b'] | join('-') %}{{ 'a' + 'b' + x | string }}", "aba-b"),
        (
            "{% set x %}{{ 1 + 2 }}{{ none }}{% endset %}{{ x }}{{ [1, 'a'] }}{{ 2 + loop | default(3) }}",
            "3None[1, 'a']5",
        ),
        (
            "{% for a in 'abc' if a != 'b' %}{{ loop.index ~ a ~ loop.last }}{% else %}-{% endfor %}",
            "1aFalse2cTrue",
        ),
        ("{% for a in {'x': 1, 'y': 2}.items() %}{{ a[0] + '=' + a[1] | string }};{% endfor %}", "x=1;y=2;"),
        ("{% for a in [[1, [2]]] recursive %}{{ a if a is number else loop(a) }},{% endfor %}", "1,2,,,"),
        (
            "{{ 'a,b,c'.split(',', 1) }}{{ 'a b'.split(maxsplit=1)[1] }}{{ 'aa'.replace('a', 'b', 1) }}",
            "['a', 'b,c']bba",
        ),
        ("{% for a in nothing %}x{% else %}none{% endfor %}{{ nothing }}{{ nothing | trim }}", "none"),
        (
            "{% macro f(a, b='x' + 'y') %}{{ a + b }}{{ caller() if caller }}{% endmacro %}{{ f('z') }}"
            "{% call f('q', b='r') %}!{% endcall %}",
            "zxyqr!",
        ),
        (
            "{{ '%s-%05d' % ('a', 7) }}{{ '{:>{w}}|{a[0]}'.format(1, w=3, a=[2]) }}{{ 7 % 4 }}",
            "a-00007  1|23",
        ),
        ("{{ [1] + [2] }}{{ (1, 2) + (3,) }}{{ [3, 1] | sort | join('-') }}", "[1, 2](1, 2, 3)1-3"),
        ("{% autoescape true %}{{ '<' }}{{ '<b>' | safe }}{% endautoescape %}", "&lt;<b>"),
        ("{% block b %}{{ messages | length }}{% endblock %}{{ self.b() + 'x' }}", "11x"),
    ],
)
def test_text_is_that_of_jinja(tmp_path: Path, source: str, text: str) -> None:
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    assert plain.from_string(source).render(messages=MESSAGES) == text
    assert template(tmp_path, source).render(MESSAGES, True) == text


@pytest.mark.parametrize("grow", ["n.s + n.s", "[n.s | upper] + [n.s]", "n.s | replace('x', 'xx')"])
def test_too_much_is_never_held(tmp_path: Path, grow: str) -> None:
    made = template(tmp_path, GROW + "{% set n.s = " + grow + " %}{% endfor %}")
    tracemalloc.start()
    try:
        with pytest.raises(ApiError):
            made.render(MESSAGES, True)
        assert tracemalloc.get_traced_memory()[1] < template_budget.MAX_MADE
    finally:
        tracemalloc.stop()


def test_long_conversations_may_be_looked_through_for_each_message(tmp_path: Path) -> None:
    source = (
        "{% set ns = namespace(seen=[]) %}{% for m in messages %}{% set ns.seen = ns.seen + [m] %}"
        "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
        "{% if messages[loop.index0:] and users[-1] == m %}{{ loop.index }}{% endif %}{% endfor %}"
    )
    messages = [{"role": ("assistant", "user")[at % 2], "content": f"{at}"} for at in range(150)]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
    made = ChatTemplate(tmp_path, clock=lambda: 0.0)
    for _ in range(6):  # each has all of its own again
        assert made.render(messages, True) == "150"


def test_what_conversations_need_is_not_too_much(tmp_path: Path) -> None:
    """A long conversation in the ways of known templates, eight megabytes in all."""
    source = (
        "{% set ns = namespace(text='', last='') %}{% for m in messages[0:] %}"
        "{% set content = m.content.split('</think>')[-1].lstrip('\n') | trim %}"
        "{{ '<|im_start|>' + m.role + '\n' + content ~ '<|im_end|>\n' }}{% set ns.last = m['content'] %}"
        "{% endfor %}{{ [ns.last[:5], messages[0].role] | tojson(indent=4) | length }}"
        "{{ '{} and {:>4}'.format(1, 'b') }}{{ '%s costs 20000 dollars, %-5s|' % ('it', 'a') }}"
        "{{ messages | map(attribute='role') | unique | join(', ') }}{{ [1, 2] | sum }}"
        "{{ 'a\nb' | indent(2) }}{{ {'a': [1, 2.5, none, true]} | tojson(separators=(',', ':')) }}"
        "{{ 'aXbX' | replace('X', '--', 1) }}{{ 'ab'.join(['c', 'd']) }}{{ 'x'.ljust(3) }}|"
        "{{ namespace(a=1) }}"
    )
    messages = [{"role": ("user", "assistant")[at % 2], "content": "y" * 80_000} for at in range(100)]
    text = template(tmp_path, source).render(messages, True)
    end = "1 and    bit costs 20000 dollars, a    |user, assistant3a\n  b"
    end += "{\"a\":[1,2.5,null,true]}a--bXcabdx  |<Namespace {'a': 1}>"
    assert text.endswith(end)
    assert len(text) > 8_000_000


def test_operators_that_are_bounded_still_work(tmp_path: Path) -> None:
    source = "{{ 3 * 4 }} {{ 'ab' * 3 }} {{ 2 ** 10 }} {{ 1.5 * 2 }} {{ 2 ** 0.5 > 1 }} {{ '=' * 5 }}"
    assert template(tmp_path, source).render(MESSAGES, True) == "12 ababab 1024 3.0 True ====="


def test_no_template_is_said_when_one_is_needed(tmp_path: Path) -> None:
    made = ChatTemplate(tmp_path)
    assert not made.present
    with pytest.raises(ApiError) as caught:
        made.render(MESSAGES, True)
    assert caught.value.code == "no_chat_template"


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(RouterConfigError, match=r"tokenizer_config\.json.*does not compile"):
        template(tmp_path, "{% if %}")
    with pytest.raises(RouterConfigError, match=r"has no tokenizer: looked for tokenizer\.json"):
        TextTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(RouterConfigError, match=r"tokenizer\.json cannot be read"):
        TextTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(RouterConfigError, match=r"tokenizer\.json is not a tokenizer"):
        TextTokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(RouterConfigError, match=r"tokenizer_config\.json must hold"):
        ChatTemplate(tmp_path)
