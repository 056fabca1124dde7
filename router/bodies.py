"""Request bodies as they may come: types and bounds, checked while decoding. Unknown fields are ignored;
fields that are known, not supported, and would change the result are refused (`refuse_unsupported`).

`None` is what OpenAI's clients send for "not given", so every optional field takes it.
"""

from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from router.errors import ApiError, from_decoding, invalid

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_LOGIT_BIAS = 1024
MAX_MESSAGES = 4096
MAX_ALTERNATIVES = 20

Name = Annotated[str, Meta(max_length=512)]
StopText = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Alternatives = Annotated[int, Meta(ge=0, le=MAX_ALTERNATIVES)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]


class StreamOptions(Struct):
    include_usage: bool | None = None


class ResponseFormat(Struct):
    type: str = "text"


class GenerationBody(Struct, kw_only=True):
    """What completions and chats have in common."""

    model: Name | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Meta(ge=-100, le=100)]],
            Meta(max_length=MAX_LOGIT_BIAS),
        ]
        | None
    ) = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=128)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    # Not supported where they would change the result.
    skip_special_tokens: bool | None = None
    min_tokens: int | None = None
    bad_words: Any = None
    use_beam_search: Any = None
    truncate_prompt_tokens: Any = None
    prompt_logprobs: Any = None
    response_format: ResponseFormat | None = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    grammar: Any = None
    regex: Any = None
    json_schema: Any = None
    ebnf: Any = None
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1)] | None = None


class CompletionBody(GenerationBody, kw_only=True):
    prompt: str | Annotated[list[str | int | list[TokenId]], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=0, lt=2**31)] | None = None
    logprobs: Alternatives | None = None
    suffix: str | None = None


class Message(Struct):
    role: Annotated[str, Meta(max_length=32)]
    content: str | list[dict[str, Any]] | None = None
    name: Name | None = None
    reasoning_content: str | None = None
    tool_call_id: Name | None = None
    tool_calls: Any = None
    function_call: Any = None
    audio: Any = None


class ChatBody(GenerationBody, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Meta(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: (
        Annotated[
            dict[Name, str | int | float | bool | None],
            Meta(max_length=16),
        ]
        | None
    ) = None
    chat_template: Any = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    web_search_options: Any = None
    documents: list[Any] | None = None


class TokenizeBody(Struct, kw_only=True):
    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None
    chat_template: Any = None


class DetokenizeBody(Struct, kw_only=True):
    model: Name | None = None
    tokens: list[TokenId]


_REFUSED_IF_GIVEN = (
    "bad_words",
    "use_beam_search",
    "truncate_prompt_tokens",
    "prompt_logprobs",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "grammar",
    "regex",
    "json_schema",
    "ebnf",
    "min_tokens",
    "suffix",
    "chat_template",
    "continue_final_message",
    "tools",
    "functions",
    "audio",
    "web_search_options",
    "documents",
)
_HARMLESS_CHOICES = (None, "none", "auto")


def refuse_unsupported(body: GenerationBody) -> None:
    """Raises ApiError 400 for the first field that would have to change the result and cannot."""
    for name in _REFUSED_IF_GIVEN:
        if getattr(body, name, None):
            raise invalid(f"'{name}' is not supported by this server.", name, "unsupported_parameter")
    if body.skip_special_tokens is False:
        raise invalid(
            "'skip_special_tokens' can only be true.", "skip_special_tokens", "unsupported_parameter"
        )
    if body.response_format is not None and body.response_format.type != "text":
        raise invalid(
            f"'response_format' of type {body.response_format.type!r} is not supported: only 'text' is.",
            "response_format",
            "unsupported_parameter",
        )
    if isinstance(body, ChatBody):
        for name in ("tool_choice", "function_call"):
            if getattr(body, name) not in _HARMLESS_CHOICES:
                raise invalid(f"'{name}' is not supported by this server.", name, "unsupported_parameter")
        if body.modalities is not None and body.modalities != ["text"]:
            raise invalid("'modalities' can only be [\"text\"].", "modalities", "unsupported_parameter")
        if body.echo:
            raise invalid("'echo' is for /v1/completions only.", "echo", "unsupported_parameter")


def template_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as a chat template takes them: text parts joined, only what is text accepted.

    Raises ApiError 400 for images, audio, files, tool calls, and roles nobody knows.
    """
    plain: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if message.role not in ("system", "developer", "user", "assistant", "tool", "function"):
            raise invalid(f"'{where}.role': {message.role!r} is not a known role.", f"{where}.role")
        for name in ("tool_calls", "function_call", "audio"):
            if getattr(message, name):
                raise invalid(
                    f"'{where}.{name}' is not supported by this server.",
                    f"{where}.{name}",
                    "unsupported_parameter",
                )
        entry: dict[str, Any] = {"role": message.role, "content": _text_of(message.content, where)}
        for name in ("name", "reasoning_content", "tool_call_id"):
            if getattr(message, name) is not None:
                entry[name] = getattr(message, name)
        plain.append(entry)
    return plain


def _text_of(content: str | list[dict[str, Any]] | None, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts: list[str] = []
    for number, part in enumerate(content):
        path = f"{where}.content[{number}]"
        kind = part.get("type")
        if kind not in ("text", "input_text"):
            raise invalid(
                f"'{path}': a part of type {kind!r} cannot be read by this text model.",
                f"{path}.type",
                "unsupported_content",
            )
        text = part.get("text")
        if not isinstance(text, str):
            raise invalid(f"'{path}.text' must be a string.", f"{path}.text")
        texts.append(text)
    return "\n".join(texts)


Body = TypeVar("Body")


class BodyDecoder:
    """JSON to one of the bodies above. Raises ApiError 400 that names the field."""

    def __init__(self) -> None:
        kinds = (CompletionBody, ChatBody, TokenizeBody, DetokenizeBody)
        self._decoders: dict[type[Any], Any] = {kind: msgspec.json.Decoder(kind) for kind in kinds}

    def decode(self, kind: type[Body], raw: bytes | bytearray) -> Body:
        try:
            body: Body = self._decoders[kind].decode(raw)
        except UnicodeDecodeError as error:
            raise ApiError(400, "The request body is not valid UTF-8.", code="invalid_json") from error
        except (msgspec.MsgspecError, RecursionError) as error:
            raise from_decoding(error) from error
        return body
