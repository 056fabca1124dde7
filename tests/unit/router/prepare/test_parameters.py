"""Bad bodies, each with the status, the field and the words a client gets; and what good ones become."""

import json
from typing import Any

import pytest

from router.errors import ApiError
from router.openai.requests import BodyDecoder, ChatBody, CompletionBody, GenerationBody
from router.prepare.parameters import (
    Options,
    check_model,
    check_tokens,
    check_total_choices,
    options_of,
    prompts_of,
    sampling_for,
)
from router.routing.limits import RequestLimits
from services.protocol.messages import Sampling

LIMITS = RequestLimits(
    vocab_size=320,
    max_model_len=64,
    max_sequence_tokens=100,
    max_choices=4,
    max_prompts=3,
    max_total_choices=6,
)
DECODER = BodyDecoder()


def run(kind: type[GenerationBody], raw: bytes) -> Options:
    """What the endpoint does with a body, without workers and tokenizer."""
    body = DECODER.decode(kind, raw)
    assert isinstance(body, ChatBody | CompletionBody)
    check_model(body.model, "m")
    options = options_of(body, LIMITS, random_seed=5)
    if isinstance(body, CompletionBody):
        prompts = prompts_of(body, LIMITS)
        check_total_choices(len(prompts), options.choices, LIMITS)
        for prompt in prompts:
            tokens = prompt if isinstance(prompt, list) else [1] * len(prompt)
            check_tokens(tokens, LIMITS.vocab_size, "prompt")
            sampling_for(options, len(tokens), LIMITS, "prompt")
    return options


def completion(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "prompt": "hello", **fields}).encode()


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}).encode()


def refused(kind: type[GenerationBody], raw: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        run(kind, raw)
    return caught.value


BAD_COMPLETIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": []}, "prompt", "length"),
    ({"prompt": [[]]}, "prompt", "empty"),
    ({"prompt": ["a", 1]}, "prompt", "either"),
    ({"prompt": [1, [2]]}, "prompt", "either"),
    ({"prompt": [1, True]}, "prompt", "expected"),
    ({"prompt": [1, 1.5]}, "prompt", "expected"),
    ({"prompt": [-1]}, "prompt", "vocabulary"),
    ({"prompt": [[-1]]}, "prompt", ">= 0"),
    ({"prompt": [320]}, "prompt", "vocabulary"),
    ({"prompt": [[1], [320]]}, "prompt", "vocabulary"),
    ({"prompt": ["a"] * 4}, "prompt", "at most 3"),
    ({"prompt": ["a"] * 3, "n": 3}, "n", "limit of 6"),
    ({"prompt": "x" * 64}, "prompt", "context"),
    ({"prompt": None}, "prompt", "expected"),
    ({"n": 0}, "n", ">= 1"),
    ({"n": 5}, "n", "at most 4"),
    ({"n": True}, "n", "expected"),
    ({"n": "2"}, "n", "expected"),
    ({"n": 2, "best_of": 3}, "best_of", "equal"),
    ({"temperature": -0.1}, "temperature", ">= 0"),
    ({"temperature": 2.1}, "temperature", "<= 2"),
    ({"temperature": "hot"}, "temperature", "expected"),
    ({"top_p": 0}, "top_p", "> 0"),
    ({"top_p": 1.01}, "top_p", "<= 1"),
    ({"top_k": -2}, "top_k", ">= -1"),
    ({"min_p": 1.5}, "min_p", "<= 1"),
    ({"presence_penalty": 3}, "presence_penalty", "<= 2"),
    ({"frequency_penalty": -3}, "frequency_penalty", ">= -2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "> 0"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"max_tokens": -1}, "max_tokens", ">= 0"),
    ({"max_tokens": 1.5}, "max_tokens", "expected"),
    ({"seed": 2**64}, "seed", ""),
    ({"stop": ""}, "stop", ">= 1"),
    ({"stop": ["a", ""]}, "stop", ">= 1"),
    ({"stop": ["x"] * 17}, "stop", "<= 16"),
    ({"stop": "x" * 1025}, "stop", "<= 1024"),
    ({"stop": [1]}, "stop", "expected"),
    ({"stop_token_ids": [320]}, "stop_token_ids", "below 320"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", ">= 0"),
    ({"logit_bias": {"320": 1}}, "logit_bias", "below 320"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "token id"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "token id"),
    ({"logit_bias": {"1" * 5000: 1}}, "logit_bias", "token id"),
    ({"logit_bias": {"0" * 11: 1}}, "logit_bias", "token id"),
    ({"logit_bias": {"1": 101}}, "logit_bias", "<= 100"),
    ({"logit_bias": {str(key): 1 for key in range(1025)}}, "logit_bias", "<= 1024"),
    ({"logprobs": 21}, "logprobs", "<= 20"),
    ({"logprobs": True}, "logprobs", "expected"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ({"suffix": "end"}, "suffix", "not supported"),
    ({"guided_json": {"type": "object"}}, "guided_json", "not supported"),
    ({"min_tokens": 3}, "min_tokens", "not supported"),
    ({"skip_special_tokens": False}, "skip_special_tokens", "true"),
    ({"response_format": {"type": "json_object"}}, "response_format", "json_object"),
    ({"model": 3}, "model", "expected"),
]


@pytest.mark.parametrize(("fields", "param", "words"), BAD_COMPLETIONS, ids=lambda value: str(value)[:40])
def test_bad_completions_are_refused_with_the_field_named(
    fields: dict[str, Any], param: str, words: str
) -> None:
    error = refused(CompletionBody, completion(**fields))
    assert error.status == 400
    assert (error.param or "").startswith(param)
    assert words in error.message, error.message


BAD_CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", ">= 1"),
    ({"messages": "hi"}, "messages", "expected"),
    ({"messages": [{"content": "x"}]}, "messages", "role' is missing"),
    ({"messages": [{"role": "", "content": "x"}]}, "messages", ">= 1"),
    ({"messages": [{"role": "r" * 65, "content": "x"}]}, "messages", "<= 64"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages", "expected"),
    ({"top_logprobs": 3}, "top_logprobs", "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "<= 20"),
    ({"logprobs": 1}, "logprobs", "expected"),
    ({"max_tokens": 0}, "max_tokens", ">= 1"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", ">= 1"),
    ({"functions": [{}]}, "functions", "not supported"),
    ({"tool_choice": "required"}, "tool_choice", "not supported"),
    ({"modalities": ["text", "audio"]}, "modalities", "text"),
    ({"audio": {"voice": "x"}}, "audio", "not supported"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "json_schema"),
    ({"chat_template": "{{ 1 }}"}, "chat_template", "not supported"),
    ({"echo": True}, "echo", "completions"),
    ({"chat_template_kwargs": {str(at): 1 for at in range(65)}}, "chat_template_kwargs", "<= 64"),
]


@pytest.mark.parametrize(("fields", "param", "words"), BAD_CHATS, ids=lambda value: str(value)[:40])
def test_bad_chats_are_refused_with_the_field_named(fields: dict[str, Any], param: str, words: str) -> None:
    error = refused(ChatBody, chat(**fields))
    assert error.status == 400
    assert (error.param or "").startswith(param)
    assert words in error.message, error.message


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"nonsense",
        b"[]",
        b'"text"',
        b'{"model":"m","prompt":"\xff"}',
        b'{"model":"m","prompt":"\xed\xa0\x80"}',
        b'{"model":"m","prompt":"a","temperature":NaN}',
        b'{"model":"m","prompt":"a","temperature":Infinity}',
        b'{"model":"m","prompt":"a","temperature":1e999}',
        b'{"model":"m","prompt":"a","logit_bias":{"1":1e999}}',
        b'{"model":"m","prompt":"\\ud800"}',
        b'{"model":"m"}',
        b"[" * 100_000,
        b'{"model":"m","prompt":' + b"[" * 100_000,
    ],
    ids=lambda raw: repr(raw[:50]),
)
def test_what_is_no_json_object_is_refused(raw: bytes) -> None:
    error = refused(CompletionBody, raw)
    assert error.status == 400
    assert json.loads(error.body())["error"]["type"] == "invalid_request_error"


def test_another_model_is_not_found() -> None:
    error = refused(CompletionBody, completion(model="gpt-9"))
    assert (error.status, error.param, error.code) == (404, "model", "model_not_found")


def test_defaults_and_unknown_fields() -> None:
    options = run(CompletionBody, completion(user="me", metadata={"a": 1}, store=False, unheard_of=[1]))
    assert options.sampling == Sampling(max_tokens=1, seed=5)
    assert (options.max_tokens, options.choices, options.stream) == (16, 1, False)
    assert run(ChatBody, chat()).max_tokens is None
    assert run(CompletionBody, json.dumps({"prompt": "a", "n": None, "stop": None, "seed": None}).encode())


def test_everything_reaches_the_sampling() -> None:
    raw = completion(
        temperature=0.5,
        top_p=0.9,
        top_k=-1,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=-0.3,
        logit_bias={"7": -100},
        logprobs=2,
        echo=True,
        ignore_eos=True,
        stop_token_ids=[9],
        seed=-1,
        n=2,
        best_of=2,
        stop=["a", "b"],
        include_stop_str_in_output=True,
        stream=True,
        stream_options={"include_usage": True},
    )
    options = run(CompletionBody, raw)
    assert options.sampling == Sampling(
        max_tokens=1,
        seed=2**63 - 1,
        temperature=0.5,
        top_p=0.9,
        top_k=0,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=-0.3,
        logit_bias={7: -100.0},
        logprobs=2,
        prompt_logprobs=2,
        ignore_eos=True,
        stop_token_ids=[9],
    )
    assert (options.stops, options.include_stop, options.include_usage) == (("a", "b"), True, True)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts_come_in_four_forms(prompt: object, expected: object) -> None:
    body = DECODER.decode(CompletionBody, completion(prompt=prompt))
    assert prompts_of(body, LIMITS) == expected


def test_max_tokens_is_clipped_to_the_context() -> None:
    options = run(CompletionBody, completion(max_tokens=1000))
    assert sampling_for(options, 60, LIMITS, "prompt").max_tokens == 4
    assert sampling_for(options, 63, LIMITS, "prompt").max_tokens == 1
    assert sampling_for(run(ChatBody, chat()), 10, LIMITS, "messages").max_tokens == 54
    assert (
        sampling_for(run(ChatBody, chat(max_completion_tokens=5, max_tokens=9)), 10, LIMITS, "x").max_tokens
        == 5
    )
    with pytest.raises(ApiError) as caught:
        sampling_for(options, 64, LIMITS, "prompt")
    assert caught.value.code == "context_length_exceeded"


def test_what_the_pool_can_never_hold_is_refused() -> None:
    small_pool = RequestLimits(320, 64, 20, 4, 3, 6)
    with pytest.raises(ApiError) as caught:
        sampling_for(run(ChatBody, chat()), 20, small_pool, "messages")
    assert "20 tokens" in caught.value.message


@pytest.mark.parametrize(("tokens", "tokenizer_size"), [([], 5), ([9], None), ([-1], None), ([9], 10)])
def test_ids_are_checked_unless_their_tokenizer_has_none_to_refuse(
    tokens: list[int], tokenizer_size: int | None
) -> None:
    with pytest.raises(ApiError):
        check_tokens(tokens, 9, "prompt", tokenizer_size)
    check_tokens([8], 9, "prompt", tokenizer_size)
