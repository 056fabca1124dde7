"""Time to render a chat template in the router and in jinja's plain sandbox: `python -m
deploy.bench.router.templates`.

The router's event loop renders the template of every small chat, so that its time is everybody's. Three
templates are rendered over conversations of several lengths: the demo model's, one that does what the
templates of thinking models do (reasoning is cut out of earlier answers, tools are listed, calls are
written), and one that does what the templates of the header-and-end-mark family do (a system message is
taken out first, every text is trimmed, the date is printed). Both sides must make the same text. Rounds of
the two alternate, the processor's time is taken and the fastest round counts, so that a busy machine harms
neither.
"""

import argparse
import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2.ext
import jinja2.sandbox
from rich.console import Console
from rich.table import Table

from router.chat.chat_template import ChatTemplate

DEMO_TEMPLATE = Path(__file__).parents[2] / "demo" / "model" / "chat_template.jinja"
THINKING = """\
{%- macro turn(role, text) -%}
    {{ '<|im_start|>' + role + '\\n' + text + '<|im_end|>\\n' }}
{%- endmacro %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- 'You may call these functions:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- turn('system', messages[0].content) }}
{%- endif %}
{%- set last = namespace(query=messages | length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- if not last.found and message.role == 'user' and message.content is string
           and not message.content.startswith('<tool_response>') %}
        {%- set last.found = true %}
        {%- set last.query = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set thoughts = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thoughts = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > last.query and (loop.last or thoughts) %}
            {{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments if call.function.arguments is string
                else call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
HEADERS = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set instructions = messages[0]['content'] | trim %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set instructions = '' %}
    {%- set turns = messages %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + strftime_now('%d %b %Y') + '\\n\\n' }}
{%- for tool in tools or [] %}
    {{- tool | tojson(indent=4) + '\\n\\n' }}
{%- endfor %}
{{- instructions + '<|eot_id|>' }}
{%- for message in turns %}
    {%- if 'tool_calls' in message %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {%- for call in message.tool_calls %}
            {{- '{"name": "' + call.function.name + '", "parameters": ' }}
            {{- call.function.arguments | tojson + '}' }}
        {%- endfor %}
        {{- '<|eot_id|>' }}
    {%- elif message.role in ['tool', 'ipython'] %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + message.content + '<|eot_id|>' }}
    {%- else %}
        {%- set text = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'
            + message['content'] | trim + '<|eot_id|>' %}
        {{- text }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
BOS = "<|begin_of_text|>"
SIZES = (20, 200, 2000)
ROUNDS = 7
ROUND_S = 0.05
AIM = 1.3
"""Of the router's time to plain jinja's."""
NOW = datetime.datetime(2026, 1, 2)


def conversation(count: int) -> list[dict[str, Any]]:
    """A system message, then users and an assistant that thinks aloud and now and then calls a function."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": "You answer briefly, and kindly."}]
    for number in range(1, count):
        kind = number % 6
        if kind == 4:
            function = {"name": "look_up", "arguments": {"place": f"shelf {number}", "exact": True}}
            calls = [{"type": "function", "function": function}]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
        elif kind == 5:
            messages.append({"role": "tool", "content": f"On shelf {number - 1} there are nine books."})
        elif kind in (1, 3):
            messages.append({"role": "user", "content": f"Question {number}: what is on the next shelf? "})
        else:
            text = f"<think>\nIt was asked for {number}.\n</think>\n\nThere are some books, as far as I know."
            messages.append({"role": "assistant", "content": text})
    return messages


TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Says what is on a shelf.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}


def plain(source: str) -> Callable[[list[dict[str, Any]]], str]:
    """The template in jinja's sandbox as it is, with the names that chat templates expect."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals["strftime_now"] = NOW.strftime
    template = environment.from_string(source)
    return lambda messages: template.render(
        messages=messages, tools=[TOOL], add_generation_prompt=True, bos_token=BOS
    )


def ours(directory: Path, source: str) -> Callable[[list[dict[str, Any]]], str]:
    (directory / "chat_template.jinja").write_text(source)
    template = ChatTemplate(directory, special_tokens={"bos_token": BOS}, now=lambda: NOW)
    return lambda messages: template.render(messages, True, {"tools": [TOOL]})


def times_us(sides: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Microseconds of the processor for each side: the mean of its fastest round."""
    found: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, times in zip(sides, found, strict=True):
            count, started_s = 0, time.thread_time()
            while count == 0 or time.thread_time() - started_s < ROUND_S:
                side()
                count += 1
            times.append((time.thread_time() - started_s) / count * 1e6)
    return [min(times) for times in found]


def main() -> None:
    parser = argparse.ArgumentParser(description="Chat templates in the router and in plain jinja's sandbox")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each side; the fastest counts")
    rounds = parser.parse_args().rounds
    sources = {"demo": DEMO_TEMPLATE.read_text(), "thinking": THINKING, "headers": HEADERS}
    table = Table(title=f"one rendering, µs; the aim is at most {AIM} times jinja's")
    for column in ("template", "messages", "jinja", "router", "ratio"):
        table.add_column(column, justify="right" if column != "template" else "left")
    ratios: list[float] = []
    for name, source in sources.items():
        with tempfile.TemporaryDirectory() as directory:
            theirs, own = plain(source), ours(Path(directory), source)
            for size in SIZES:
                messages = conversation(size)
                if theirs(messages) != own(messages):
                    raise SystemExit(f"{name}: the two made different texts of {size} messages")
                jinja_us, router_us = times_us([partial(theirs, messages), partial(own, messages)], rounds)
                ratios.append(router_us / jinja_us)
                cells = (str(size), f"{jinja_us:.0f}", f"{router_us:.0f}", f"{ratios[-1]:.2f}")
                table.add_row(name, *cells)
    Console().print(table)
    print(f"ratio: mean {statistics.fmean(ratios):.2f}, largest {max(ratios):.2f}")


if __name__ == "__main__":
    main()
