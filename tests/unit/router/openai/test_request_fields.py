"""The table of request fields beside the lists of the three protocols, and each of its promises."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from openai.types import completion_create_params as text_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionFunctionMessageParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionToolMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import (
    completion_create_params as chat_params,
)

from router.errors import ApiError
from router.openai.request_fields import FIELDS, Endpoint, Field
from router.openai.requests import (
    BodyDecoder,
    ChatBody,
    CompletionBody,
    Message,
    StreamOptions,
    TokenizeBody,
)
from router.prepare.parameters import options_of
from router.routing.limits import RequestLimits

LIMITS = RequestLimits(320, 64, 100, 4, 3, 6)
DECODER = BodyDecoder()
KINDS: dict[Endpoint, type[Any]] = {"completions": CompletionBody, "chat": ChatBody, "tokenize": TokenizeBody}
PLAIN: dict[Endpoint, dict[str, Any]] = {
    "completions": {"prompt": "a"},
    "chat": {"messages": [{"role": "user", "content": "a"}]},
    "tokenize": {"messages": [{"role": "user", "content": "a"}]},
}

VLLM_BOTH = """
    add_special_tokens allowed_token_ids bad_words cache_salt ec_transfer_params echo
    frequency_penalty ignore_eos include_stop_str_in_output kv_transfer_params length_penalty
    logit_bias logprob_token_ids logprobs max_tokens min_p min_tokens model n presence_penalty
    priority prompt_logprobs repetition_detection repetition_penalty request_id response_format
    return_mm_kwargs return_token_ids return_token_offsets return_tokens_as_token_ids
    routed_experts_prompt_start seed session_id skip_special_tokens spaces_between_special_tokens
    stop stop_token_ids stream stream_interval stream_options structured_outputs temperature
    thinking_token_budget top_k top_p truncate_prompt_tokens truncation_side use_beam_search user
    vllm_xargs watermarking
"""
"""vLLM's main branch of November 2026."""
VLLM_CHAT = """
    add_generation_prompt chat_template chat_template_kwargs continue_final_message documents
    include_reasoning max_completion_tokens media_io_kwargs messages mm_processor_kwargs
    parallel_tool_calls reasoning_effort return_prompt_text tool_choice tools top_logprobs
"""
VLLM_COMPLETIONS = "prompt prompt_embeds suffix"
VLLM_OLDER = """
    best_of guided_choice guided_decoding_backend guided_grammar guided_json guided_regex
    guided_whitespace_pattern logits_processors structural_tag early_stopping
"""
"""What vLLM 0.5 to 0.10 had beside them."""
VLLM_TOKENIZE = """
    add_generation_prompt add_special_tokens chat_template chat_template_kwargs
    continue_final_message media_io_kwargs messages mm_processor_kwargs model prompt
    return_token_strs tools
"""
SGLANG_BOTH = """
    bootstrap_host bootstrap_port bootstrap_room cache_salt custom_logit_processor custom_params
    data_parallel_rank disagg_prefill_dp_rank ebnf extra_key frequency_penalty ignore_eos
    images_config logit_bias logprobs lora_path max_tokens min_p min_tokens model n ngram_corpus_id
    no_stop_trim presence_penalty priority regex repetition_penalty response_format
    return_cached_tokens_details return_hidden_states return_routed_experts return_token_ids rid
    routed_dp_rank routed_experts_start_len seed session_id session_params skip_special_tokens stop
    stop_regex stop_token_ids stream stream_options temperature top_k top_p user
"""
"""SGLang's main branch of November 2026."""
SGLANG_CHAT = """
    chat_template_kwargs continue_final_message input_ids max_completion_tokens max_dynamic_patch
    messages min_dynamic_patch parallel_tool_calls reasoning reasoning_effort return_meta_info
    return_prompt_token_ids separate_reasoning stream_reasoning task tool_choice tools top_logprobs
    use_audio_in_video
"""
SGLANG_COMPLETIONS = "best_of custom_labels echo json_schema prompt suffix"
SGLANG_TOKENIZE = """
    add_special_tokens chat_template_kwargs continue_final_message messages model prompt
    reasoning_effort tool_choice tools
"""
MESSAGES = (
    ChatCompletionAssistantMessageParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionFunctionMessageParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionToolMessageParam,
    ChatCompletionUserMessageParam,
)
LISTS: list[tuple[Endpoint, set[str]]] = [
    ("chat", {*chat_params.CompletionCreateParamsBase.__annotations__, "stream"}),
    ("completions", {*text_params.CompletionCreateParamsBase.__annotations__, "stream"}),
    ("chat", set((VLLM_BOTH + VLLM_CHAT + VLLM_OLDER).split())),
    ("completions", set((VLLM_BOTH + VLLM_COMPLETIONS + VLLM_OLDER).split())),
    ("tokenize", set(VLLM_TOKENIZE.split())),
    ("chat", set((SGLANG_BOTH + SGLANG_CHAT).split())),
    ("completions", set((SGLANG_BOTH + SGLANG_COMPLETIONS).split())),
    ("tokenize", set(SGLANG_TOKENIZE.split())),
    ("chat", {f"stream_options.{name}" for name in ChatCompletionStreamOptionsParam.__annotations__}),
    ("chat", {f"messages[].{name}" for kind in MESSAGES for name in kind.__annotations__}),
    ("chat", {"messages[].reasoning", "messages[].reasoning_content", "messages[].tools"}),
    ("completions", {"stream_options.include_usage", "stream_options.continuous_usage_stats"}),
]


@pytest.mark.parametrize(("endpoint", "names"), LISTS)
def test_every_field_of_the_protocols_has_its_place(endpoint: Endpoint, names: set[str]) -> None:
    assert names - {field.name for field in FIELDS if endpoint in field.on} == set()


@pytest.mark.parametrize("endpoint", KINDS)
def test_a_field_has_one_place(endpoint: Endpoint) -> None:
    names = [field.name for field in FIELDS if endpoint in field.on]
    assert sorted(names) == sorted(set(names))
    assert all(field.why for field in FIELDS if field.state != "done")


@pytest.mark.parametrize("endpoint", KINDS)
def test_what_is_done_is_read_and_nothing_else_is(endpoint: Endpoint) -> None:
    done = {field.name for field in FIELDS if endpoint in field.on and field.state == "done"}
    nested = {name for name in done if "." in name}
    read = {field.name for field in msgspec.structs.fields(KINDS[endpoint])} - {"tool_choice"}
    assert done - nested == read
    if endpoint == "chat":
        refused = {field.name for field in FIELDS if field.state == "refused"}
        harmless = {field.name for field in FIELDS if field.state == "harmless"}
        for prefix, kind in (("stream_options.", StreamOptions), ("messages[].", Message)):
            here = {f"{prefix}{field.name}" for field in msgspec.structs.fields(kind)}
            assert here - refused == {name for name in nested if name.startswith(prefix)}
            assert not here & harmless


def top_level(state: str) -> list[tuple[Endpoint, Field]]:
    found = [field for field in FIELDS if field.state == state and "." not in field.name]
    return [(endpoint, field) for field in found for endpoint in field.on]


def name_of(value: object) -> str:
    return value.name if isinstance(value, Field) else str(value)


def decode(endpoint: Endpoint, fields: dict[str, Any]) -> Any:
    return DECODER.decode(KINDS[endpoint], json.dumps({**PLAIN[endpoint], **fields}).encode())


SAMPLES: list[Any] = [
    None, {}, [], "", 0, False, True, 1, 0.5, -1, "x", [1], {"a": 1}, [None], ["text"], "none",
]  # fmt: skip


@pytest.mark.parametrize(("endpoint", "field"), top_level("refused"), ids=name_of)
def test_whatever_asks_for_something_is_refused_by_name(endpoint: Endpoint, field: Field) -> None:
    for value in SAMPLES:
        asks = value is not None and json.dumps(value) not in [json.dumps(one) for one in field.nothing]
        if not asks:
            decode(endpoint, {field.name: value})
            continue
        with pytest.raises(ApiError) as caught:
            decode(endpoint, {field.name: value})
        error = caught.value
        assert (error.status, error.param, error.code) == (400, field.name, "unsupported_parameter"), value
        assert f"'{field.name}' is not supported" in error.message
    for value in field.nothing:
        decode(endpoint, {field.name: value})


@pytest.mark.parametrize(("endpoint", "field"), top_level("harmless"), ids=name_of)
def test_what_is_harmless_changes_nothing(endpoint: Endpoint, field: Field) -> None:
    for value in SAMPLES:
        body = decode(endpoint, {field.name: value})
        assert msgspec.to_builtins(body) == msgspec.to_builtins(decode(endpoint, {}))


ASKS: list[tuple[Endpoint, str, list[Any]]] = [
    ("chat", "guided_json", [{}, "", {"type": "object"}]),
    ("chat", "structured_outputs", [{}]),
    ("completions", "prompt_logprobs", [0, 1]),
    ("chat", "web_search_options", [{}]),
    ("completions", "allowed_token_ids", [[], [5]]),
    ("completions", "truncate_prompt_tokens", [0, -1, 5]),
    ("completions", "skip_special_tokens", [False]),
    ("completions", "min_tokens", [1, False]),
    ("completions", "priority", [1, -1]),
    ("completions", "stop_regex", ["", "a+"]),
    ("chat", "include_reasoning", [False]),
    ("chat", "thinking_token_budget", [0, 10]),
    ("chat", "logprob_token_ids", [[], [1]]),
    ("chat", "tool_choice", ["required", {}, {"type": "function", "function": {"name": "f"}}]),
    ("chat", "modalities", [[], ["audio"], ["text", "audio"]]),
    ("chat", "echo", [True]),
    ("chat", "audio", [{}]),
    ("chat", "input_ids", [[], [1]]),
    ("completions", "prompt_embeds", ["", [], "x"]),
    ("completions", "lora_path", ["", "x", ["x"]]),
    ("chat", "repetition_detection", [{}]),
    ("chat", "return_hidden_states", [True, "last"]),
    ("chat", "verbosity", ["low", "high"]),
    ("chat", "moderation", [{}]),
    ("tokenize", "truncate_prompt_tokens", [0, 5]),
    ("tokenize", "chat_template", ["", "{{ 1 }}"]),
]
ASKS_NOTHING: list[tuple[Endpoint, dict[str, Any]]] = [
    (
        "completions",
        {"min_tokens": 0, "use_beam_search": False, "skip_special_tokens": True, "bad_words": []},
    ),
    (
        "completions",
        {"guided_json": None, "prompt_logprobs": None, "suffix": "", "priority": 0, "lora_path": None},
    ),
    (
        "completions",
        {"thinking_token_budget": -1, "vllm_xargs": {}, "logits_processors": [], "stop_regex": []},
    ),
    ("chat", {"tool_choice": "none", "function_call": "auto", "functions": [], "tools": [], "echo": False}),
    (
        "chat",
        {"tool_choice": "auto", "modalities": ["text"], "verbosity": "medium", "include_reasoning": True},
    ),
    ("chat", {"parallel_tool_calls": False, "store": True, "metadata": {"a": "b"}, "service_tier": "flex"}),
]


@pytest.mark.parametrize(("endpoint", "name", "values"), ASKS)
def test_values_that_ask_for_something(endpoint: Endpoint, name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ApiError) as caught:
            decode(endpoint, {name: value})
        assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter"), value


@pytest.mark.parametrize(("endpoint", "fields"), ASKS_NOTHING)
def test_values_that_ask_for_nothing(endpoint: Endpoint, fields: dict[str, Any]) -> None:
    decode(endpoint, fields)


def test_a_refused_field_is_named_before_what_is_missing_for_it() -> None:
    for kind, name in ((CompletionBody, "prompt_embeds"), (ChatBody, "input_ids")):
        with pytest.raises(ApiError) as caught:
            DECODER.decode(kind, json.dumps({name: [1]}).encode())
        assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")
    with pytest.raises(ApiError, match="'prompt' is missing"):
        DECODER.decode(CompletionBody, b'{"prompt_embeds":null}')


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "unsupported_parameter"),
        ({"response_format": {"type": "structural_tag"}}, "response_format", "unsupported_parameter"),
        ({"response_format": {"type": "xml"}}, "response_format", "unsupported_parameter"),
        ({"response_format": {}}, "response_format.type", None),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
            "unsupported_parameter",
        ),
        ({"n": 2, "best_of": 3}, "best_of", "unsupported_parameter"),
    ],
)
def test_nested_fields_and_their_values(fields: dict[str, Any], param: str, code: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        options_of(decode("completions", fields), LIMITS, 1)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, param, code)


def test_nested_values_that_ask_for_nothing() -> None:
    for fields in (
        {"response_format": {"type": "text"}},
        {"stream": True, "stream_options": {"include_obfuscation": False}},
        {"n": 2, "best_of": 2},
        {"stream_options": None},
    ):
        options_of(decode("chat", fields), LIMITS, 1)


def test_names_that_nobody_knows_are_ignored() -> None:
    assert decode("chat", {"unheard_of": {"a": 1}}) == decode("chat", {})


@pytest.mark.parametrize("name", ["n", "max_tokens", "max_completion_tokens", "top_k", "seed", "logprobs"])
def test_integers_may_have_a_point(name: str) -> None:
    assert getattr(decode("completions", {name: 2.0}), name) == 2
    for value in (2.5, 1e300):
        with pytest.raises(ApiError) as caught:
            decode("completions", {name: value})
        assert caught.value.param == name


def test_other_names_of_the_same_thing() -> None:
    assert options_of(decode("completions", {"max_completion_tokens": 3}), LIMITS, 1).max_tokens == 3
    assert options_of(decode("chat", {"no_stop_trim": True}), LIMITS, 1).include_stop
    assert options_of(decode("chat", {"rid": "mine"}), LIMITS, 1).label == "mine"
    options_of(decode("chat", {"top_logprobs": 0, "logprobs": False}), LIMITS, 1)


def test_the_documentation_names_every_field_that_is_not_done() -> None:
    text = (Path(__file__).parents[4] / "docs" / "api.md").read_text(encoding="utf-8")
    unnamed = {
        field.name
        for field in FIELDS
        if field.state != "done" and f"`{field.name.split('.')[-1]}" not in text
    }
    assert unnamed == {"stream_options.include_obfuscation"}  # named with its owner
