"""Frames and bodies: prebuilt bytes must be the JSON they stand for."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from router.api.call import Call, ChoiceStream, ResponseBuilder
from router.api.openai_format import Echo, Usage, prompt_logprobs
from router.api.responses import ResponseHeader, StreamBuilder, WholeBuilder
from router.openai.requests import CompletionBody
from router.prepare.parameters import options_of
from router.routing.limits import RequestLimits
from router.routing.metrics import Histogram, Metrics, Snapshot, TokenRate, exposition
from router.text.choice import LogprobEntry
from router.text.tokenizer import TextTokenizer
from services.protocol.messages import TokenLogprob, TopLogprob
from tests.checkpoints import write_tokenizer

HEADER = ResponseHeader("cmpl-1", 123, 'a "model"\n')
NASTY = 'quote " back \\ line \n tab \t é 🙂 \x01 \u2028 data: [DONE]\n\n'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return TextTokenizer(directory)


def choice_of(builder: ResponseBuilder, tokenizer: TextTokenizer, index: int, echo: Echo) -> ChoiceStream:
    options = options_of(CompletionBody(prompt="a"), RequestLimits(320, 1024, 1024, 8, 8, 8), 1)
    call = Call(options, builder, tokenizer, Metrics())
    return builder.choice(call, index, tokenizer.detokenizer(), echo)


def frames(builder: StreamBuilder) -> list[Any]:
    whole = b"".join(builder.frames)
    assert whole.endswith(b"\n\n")
    lines = whole.decode().removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line[6:] == "[DONE]" else json.loads(line[6:]) for line in lines]


@pytest.mark.parametrize("with_usage", [True, False])
def test_chat_frames(tokenizer: TextTokenizer, with_usage: bool) -> None:
    builder = StreamBuilder(HEADER, tokenizer, chat=True, logprobs=None, with_usage=with_usage)
    choice = choice_of(builder, tokenizer, 2, Echo())
    choice.write(NASTY, (), None)
    choice.write("", (), "stop")
    builder.finish(Usage(3, 2, 1))
    found = frames(builder)
    assert found.pop() == "[DONE]"
    if with_usage:
        last = found.pop()
        assert last["choices"] == []
        assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
        assert (last["usage"]["prompt_tokens"], last["usage"]["total_tokens"]) == (3, 5)
        assert all(frame["usage"] is None for frame in found)
    else:
        assert all("usage" not in frame for frame in found)
    for frame in found:
        assert (frame["id"], frame["object"], frame["created"]) == ("cmpl-1", "chat.completion.chunk", 123)
        assert frame["model"] == HEADER.model
    choices = [frame["choices"][0] for frame in found]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": ""},
        {"content": NASTY},
        {},
    ]
    assert [choice["finish_reason"] for choice in choices] == [None, None, "stop"]
    assert {choice["index"] for choice in choices} == {2}


def test_an_echo_comes_once_before_the_text(tokenizer: TextTokenizer) -> None:
    first = prompt_logprobs([65, 66], [TokenLogprob(-0.5, [TopLogprob(67, -0.1)])], tokenizer, 1)
    assert first["token_logprobs"] == [None, -0.5]
    assert first["top_logprobs"][0] is None
    entry = LogprobEntry(68, TokenLogprob(-math.inf, []), 0, 1)
    echoed = Echo("ab", first)
    builder = StreamBuilder(HEADER, tokenizer, chat=False, logprobs=1, with_usage=False)
    whole = WholeBuilder(HEADER, tokenizer, chat=False, logprobs=1)
    for one in (builder, whole):
        written = choice_of(one, tokenizer, 0, echoed)
        written.write("c", [entry], None)
        written.write("d", [], "length")
    texts = [frame["choices"][0]["text"] for frame in frames(builder)]
    assert texts == ["abc", "d"]
    choice = json.loads(whole.body(Usage()))["choices"][0]
    assert choice["text"] == "abcd"
    streamed = frames(builder)[0]["choices"][0]["logprobs"]
    assert streamed == choice["logprobs"]
    assert streamed["token_logprobs"] == [None, -0.5, -9999.0]
    assert streamed["text_offset"] == [0, 1, 2]


def test_chat_logprobs_have_bytes_and_alternatives(tokenizer: TextTokenizer) -> None:
    half = next(token for token in range(tokenizer.size) if tokenizer.token_bytes(token) == b"\xc3")
    entry = LogprobEntry(half, TokenLogprob(-1.5, [TopLogprob(65, -0.5)]), 0, 0)
    whole = WholeBuilder(HEADER, tokenizer, chat=True, logprobs=1)
    choice_of(whole, tokenizer, 0, Echo()).write("", [entry], "length")
    content = json.loads(whole.body(Usage()))["choices"][0]["logprobs"]["content"]
    assert content[0]["bytes"] == [0xC3]
    assert content[0]["token"] == "\N{REPLACEMENT CHARACTER}"
    assert content[0]["top_logprobs"][0]["logprob"] == -0.5


def test_choices_are_in_order_whatever_ends_first(tokenizer: TextTokenizer) -> None:
    whole = WholeBuilder(HEADER, tokenizer, chat=False, logprobs=None)
    for index, text, finish in ((1, "b", "stop"), (0, "a", "length")):
        choice_of(whole, tokenizer, index, Echo()).write(text, (), finish)
    body = json.loads(whole.body(Usage(1, 2, 0)))
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(0, "a"), (1, "b")]


def test_histograms_count_each_value_once() -> None:
    histogram = Histogram("baton_x_seconds", "X", [0.1, 1.0])
    for value_s in (0.05, 0.1, 0.5, 2.0):
        histogram.observe(value_s)
    assert histogram.counts == [2, 1, 1]
    metrics = Metrics()
    for value_s in (0.05, 0.1, 0.5, 20.0):
        metrics.inter_token.observe(value_s)
    metrics.count_outcome("completed")
    text = exposition(metrics, Snapshot(1, 2, [("ipc:///a", "ready", True)], [], 5.0)).decode()
    assert 'baton_inter_token_latency_seconds_bucket{le="0.1"} 2.0' in text
    assert 'baton_inter_token_latency_seconds_bucket{le="10.0"} 3.0' in text
    assert 'baton_inter_token_latency_seconds_bucket{le="+Inf"} 4.0' in text
    assert 'baton_requests_total{outcome="completed"} 1.0' in text
    assert 'baton_worker_ready{connection="ready",endpoint="ipc:///a"} 1.0' in text


def test_the_token_rate_forgets() -> None:
    rate = TokenRate()
    rate.add(50, 100.2)
    rate.add(50, 101.9)
    assert rate.per_second(102.0) == 20.0
    assert rate.per_second(105.5) == 20.0 or rate.per_second(105.5) == 100 / 5
    assert rate.per_second(106.0) == 10.0
    assert rate.per_second(500.0) == 0.0
