"""The table of all request fields of OpenAI's, vLLM's and SGLang's APIs, and what becomes of each. Pure.

`done` does what its name says. `harmless` is taken and changes nothing; `why` says why nothing is missed.
`refused` is a 400, except for null and the values of `nothing`, which ask for what happens anyway: a falsy
value that asks for something is refused like any other. Names of nested fields are paths. A name that is in
none of the three protocols is ignored, as the others do.
"""

from collections.abc import Iterable
from typing import Any, Literal

from msgspec import Struct

from router.errors import ApiError, invalid

Endpoint = Literal["completions", "chat", "tokenize"]
BOTH: tuple[Endpoint, ...] = ("completions", "chat")
ALL: tuple[Endpoint, ...] = ("completions", "chat", "tokenize")
COMPLETIONS: tuple[Endpoint, ...] = ("completions",)
CHAT: tuple[Endpoint, ...] = ("chat",)
CHATS: tuple[Endpoint, ...] = ("chat", "tokenize")


class Field(Struct, frozen=True):
    """What becomes of `name` in a body for one of the endpoints `on`."""

    name: str
    state: Literal["done", "harmless", "refused"]
    on: tuple[Endpoint, ...]
    why: str = ""
    nothing: tuple[Any, ...] = ()

    def asked_by(self, value: Any) -> bool:
        """Whether `value` asks for more than nothing. A boolean is not a number here."""
        if value is None:
            return False
        return not any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.nothing
        )


def _done(on: tuple[Endpoint, ...], names: str) -> list[Field]:
    return [Field(name, "done", on) for name in names.split()]


def _harmless(on: tuple[Endpoint, ...], names: str, why: str) -> list[Field]:
    return [Field(name, "harmless", on, why) for name in names.split()]


def _refused(on: tuple[Endpoint, ...], names: str, why: str, *nothing: Any) -> list[Field]:
    return [Field(name, "refused", on, why, nothing) for name in names.split()]


_ONLY_CHAT = "it is for /v1/chat/completions"
_ONLY_COMPLETIONS = "it is for /v1/completions"
_NOT_CONSTRAINED = "the output cannot be held to a form"
_NO_MEDIA = "is about images, audio or video, whose parts are refused"
_NO_SUCH_DATA = "is about data that no answer of this server holds"

FIELDS: tuple[Field, ...] = (
    # ------------------------------------------------------------ done
    *_done(ALL, "model"),
    *_done(
        BOTH,
        "stream stream_options n best_of temperature top_p top_k min_p presence_penalty frequency_penalty"
        " repetition_penalty logit_bias seed stop stop_token_ids include_stop_str_in_output no_stop_trim"
        " ignore_eos logprobs max_tokens max_completion_tokens response_format return_token_ids request_id"
        " rid cache_salt extra_key",
    ),
    *_done(COMPLETIONS, "prompt echo"),
    *_done(CHAT, "top_logprobs return_prompt_text"),
    *_done(
        CHATS,
        "messages tools add_generation_prompt continue_final_message chat_template_kwargs documents"
        " reasoning_effort",
    ),
    *_done(("tokenize",), "prompt return_token_strs"),
    *_done(ALL, "add_special_tokens"),
    *_done(BOTH, "stream_options.include_usage stream_options.continuous_usage_stats"),
    *_done(
        CHATS,
        "messages[].role messages[].content messages[].name messages[].refusal messages[].tool_calls"
        " messages[].tool_call_id messages[].reasoning messages[].reasoning_content messages[].thinking",
    ),
    # ------------------------------------------------------------ harmless
    *_harmless(
        BOTH,
        "user metadata store safety_identifier custom_labels session_id",
        "says who asks or what the operator should keep, not what is answered",
    ),
    *_harmless(
        BOTH,
        "service_tier prediction prompt_cache_key prompt_cache_options prompt_cache_retention ngram_corpus_id"
        " routed_dp_rank data_parallel_rank stream_interval",
        "is a hint about speed, cost or place; the tokens are the same",
    ),
    *_harmless(BOTH, "length_penalty early_stopping", "is read by beam search only, which is refused"),
    *_harmless(
        BOTH,
        "guided_decoding_backend guided_whitespace_pattern",
        "says how a form is kept to, and forms are refused",
    ),
    *_harmless(BOTH, "custom_params", "is read by custom logits processors only, which are refused"),
    *_harmless(BOTH, "truncation_side", "is read with truncate_prompt_tokens only, which is refused"),
    *_harmless(BOTH, "spaces_between_special_tokens", "is about special tokens that are shown, and none are"),
    *_harmless(BOTH, "parallel_tool_calls", "bounds calls that are parsed from the answer, and none are"),
    *_harmless(
        BOTH,
        "separate_reasoning stream_reasoning",
        "is about reasoning that a parser takes out of the text, and there is none",
    ),
    *_harmless(
        ALL,
        "media_io_kwargs mm_processor_kwargs images_config max_dynamic_patch min_dynamic_patch"
        " use_audio_in_video",
        _NO_MEDIA,
    ),
    *_harmless(
        BOTH,
        "return_token_offsets return_mm_kwargs routed_experts_prompt_start routed_experts_start_len",
        _NO_SUCH_DATA,
    ),
    *_harmless(CHATS, "messages[].annotations", "says where an earlier answer had its facts from"),
    # ------------------------------------------------------------ refused
    *_refused(
        BOTH,
        "structured_outputs guided_json guided_regex guided_choice guided_grammar structural_tag grammar"
        " regex json_schema ebnf",
        _NOT_CONSTRAINED,
    ),
    *_refused(BOTH, "allowed_token_ids", "the vocabulary cannot be narrowed"),
    *_refused(BOTH, "bad_words", "words cannot be forbidden", []),
    *_refused(BOTH, "min_tokens", "an answer cannot be kept from ending", 0),
    *_refused(BOTH, "stop_regex", "a stop is a string or a token id", []),
    *_refused(BOTH, "use_beam_search watermarking", "tokens are drawn one by one", False),
    *_refused(BOTH, "logits_processors", "the sampler runs no code of clients", []),
    *_refused(BOTH, "custom_logit_processor", "the sampler runs no code of clients"),
    *_refused(BOTH, "repetition_detection", "an answer ends by a stop, an end token or its length"),
    *_refused(BOTH, "vllm_xargs kv_transfer_params ec_transfer_params", "no extension reads it", {}),
    *_refused(BOTH, "thinking_token_budget", "thinking cannot be bounded by itself", -1),
    *_refused(BOTH, "include_reasoning", "reasoning is not taken out of the text", True),
    *_refused(BOTH, "reasoning", "use 'reasoning_effort' or 'chat_template_kwargs'"),
    *_refused(BOTH, "skip_special_tokens", "the text of special tokens is left out", True),
    *_refused(BOTH, "prompt_logprobs", "use 'echo' with 'logprobs' on /v1/completions"),
    *_refused(BOTH, "logprob_token_ids", "log probabilities are those of the likeliest tokens"),
    *_refused(BOTH, "return_tokens_as_token_ids", "use 'return_token_ids'", False),
    *_refused(BOTH, "return_prompt_token_ids", "use 'return_token_ids'", False),
    *_refused(
        BOTH,
        "return_hidden_states return_routed_experts return_cached_tokens_details return_meta_info",
        "the workers do not report it",
        False,
    ),
    *_refused(BOTH, "priority", "requests are served in order", 0),
    *_refused(BOTH, "lora_path", "there are no adapters", []),
    *_refused(BOTH, "session_params", "there are no sessions", {}),
    *_refused(
        BOTH,
        "bootstrap_host bootstrap_port bootstrap_room disagg_prefill_dp_rank",
        "the router pairs workers by itself",
    ),
    *_refused(BOTH, "audio", "the model writes text"),
    *_refused(BOTH, "modalities", "the model writes text", ["text"]),
    *_refused(BOTH, "web_search_options", "nothing is looked up"),
    *_refused(BOTH, "moderation", "nothing is moderated"),
    *_refused(BOTH, "verbosity", "no model knows it", "medium"),
    *_refused(ALL, "functions", "use 'tools'", []),
    *_refused(ALL, "tool_choice function_call", "only the model decides on a call", "none", "auto"),
    *_refused(COMPLETIONS, "suffix", "text goes on at its end only", ""),
    *_refused(ALL, "prompt_embeds", "a prompt is text or token ids"),
    *_refused(ALL, "input_ids", "token ids are for 'prompt' on /v1/completions"),
    *_refused(ALL, "truncate_prompt_tokens", "no part of a prompt is dropped"),
    *_refused(ALL, "chat_template", "a chat template comes with the checkpoint"),
    *_refused(ALL, "task", "no model knows it"),
    *_refused(CHATS, "messages[].audio", "the model reads text"),
    *_refused(CHATS, "messages[].function_call", "use 'tool_calls'"),
    *_refused(CHATS, "messages[].tools", "use 'tools' of the request", []),
    *_refused(BOTH, "stream_options.include_obfuscation", "chunks are not padded", False),
    # Of the other endpoint.
    *_refused(
        COMPLETIONS,
        "messages tools top_logprobs chat_template_kwargs continue_final_message reasoning_effort",
        _ONLY_CHAT,
    ),
    *_refused(COMPLETIONS, "documents", _ONLY_CHAT, []),
    *_refused(COMPLETIONS, "add_generation_prompt", _ONLY_CHAT, True),
    *_refused(COMPLETIONS, "return_prompt_text", _ONLY_CHAT, False),
    *_refused(CHAT, "prompt", _ONLY_COMPLETIONS),
    *_refused(CHAT, "suffix", _ONLY_COMPLETIONS, ""),
    *_refused(CHAT, "echo", _ONLY_COMPLETIONS, False),
)

RESPONSE_FORMATS = {
    "text": "done",
    "json_object": "refused",
    "json_schema": "refused",
    "structural_tag": "refused",
}
TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
"""Content parts that are read, each with the name of its text; others are refused (`unsupported_content`)."""
ASSISTANT_PARTS = frozenset(("output_text", "refusal", "thinking"))
"""Those that only an assistant's message may have."""


def refused_on(endpoint: Endpoint, parent: str = "") -> dict[str, Field]:
    """The refused fields of one endpoint's body, by name; with `parent`, of what is nested there."""
    found: dict[str, Field] = {}
    for field in FIELDS:
        owner, _, name = field.name.rpartition(".")
        if field.state == "refused" and endpoint in field.on and owner == parent:
            found[name] = field
    return found


def refuse(fields: Iterable[tuple[str, Field]], body: Any, where: str = "") -> None:
    """Raises ApiError 400 for the first of `fields` that `body` asks something of."""
    for name, field in fields:
        value = getattr(body, name, None)
        if value is not None and field.asked_by(value):
            raise refusal(field, f"{where}{name}")


def refusal(field: Field, path: str) -> ApiError:
    allowed = ", ".join(_shown(one) for one in field.nothing)
    with_this = f" with this value (allowed: {allowed})" if allowed else ""
    return invalid(
        f"'{path}' is not supported by this server{with_this}: {field.why}.", path, "unsupported_parameter"
    )


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).replace("'", '"') if isinstance(value, list | dict) else repr(value)
