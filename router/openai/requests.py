"""The bodies of requests: types and bounds, which decoding checks.

request_fields.py says what becomes of each field. `BodyDecoder` adds those that are refused. `None` is what
OpenAI's clients send for "not given", so every optional field takes it.
"""

from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from router.errors import ApiError, from_decoding, invalid
from router.openai.request_fields import RESPONSE_FORMATS, Endpoint, Field, refuse, refused_on

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_LOGIT_BIAS = 1024
MAX_MESSAGES = 4096
MAX_ALTERNATIVES = 20
MAX_TEMPLATE_NAMES = 64

Name = Annotated[str, Meta(max_length=512)]
Label = Annotated[str, Meta(max_length=512)]
Salt = Annotated[str, Meta(min_length=1, max_length=1024)]
StopText = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Alternatives = Annotated[int, Meta(ge=0, le=MAX_ALTERNATIVES)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]


class StreamOptions(Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Any = None


class ResponseFormat(Struct):
    type: str


class GenerationBody(Struct, kw_only=True):
    """The fields that completions and chats share."""

    model: Name | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, lt=2**31)] | None = None
    best_of: Annotated[int, Meta(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, lt=2**31)] | None = None
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
    no_stop_trim: bool | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    add_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    request_id: Label | None = None
    rid: Label | None = None
    cache_salt: Salt | None = None
    extra_key: Salt | None = None


class CompletionBody(GenerationBody, kw_only=True):
    prompt: str | Annotated[list[str | int | list[TokenId]], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=0, lt=2**31)] | None = None
    logprobs: Alternatives | None = None
    echo: bool | None = None


class CalledFunction(Struct):
    name: Name
    arguments: str | dict[str, Any] | None = None


class ToolCall(Struct):
    function: CalledFunction
    id: Name | None = None
    type: str = "function"


class Message(Struct):
    role: Annotated[str, Meta(min_length=1, max_length=64)]
    content: str | list[str | dict[str, Any]] | None = None
    name: Name | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    thinking: str | None = None
    tool_call_id: Name | None = None
    tool_calls: list[ToolCall] | None = None
    # Refused.
    function_call: Any = None
    audio: Any = None
    tools: Any = None


Messages = Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
TemplateNames = Annotated[dict[Name, Any], Meta(max_length=MAX_TEMPLATE_NAMES)]


class ChatBody(GenerationBody, kw_only=True):
    messages: Messages
    max_tokens: Annotated[int, Meta(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateNames | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    return_prompt_text: bool | None = None


class TokenizeBody(Struct, kw_only=True):
    """A body of `/tokenize`. Every field that decides on a chat's prompt is as in `ChatBody`."""

    model: Name | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateNames | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Struct, kw_only=True):
    model: Name | None = None
    tokens: list[TokenId]


_ENDPOINTS: dict[type[Any], Endpoint | None] = {
    CompletionBody: "completions",
    ChatBody: "chat",
    TokenizeBody: "tokenize",
    DetokenizeBody: None,
}
_STREAM_OPTIONS = tuple(refused_on("chat", "stream_options").items())
_NUMBERS = (
    "n", "best_of", "max_tokens", "max_completion_tokens", "top_k", "seed", "logprobs", "top_logprobs",
)  # fmt: skip
"""Integers, which some clients write with a point: 16.0."""


def _refuse_nested(body: GenerationBody) -> None:
    if body.stream_options is not None:
        refuse(_STREAM_OPTIONS, body.stream_options, "stream_options.")
    given = body.response_format
    if given is not None and RESPONSE_FORMATS.get(given.type) != "done":
        raise invalid(
            f"'response_format' of type {given.type[:64]!r} is not supported by this server: only 'text' is.",
            "response_format",
            "unsupported_parameter",
        )


class _BodyKind:
    """The decoder of one kind of body, with a field of any type for everything that its endpoint refuses."""

    def __init__(self, kind: type[Any]) -> None:
        endpoint = _ENDPOINTS[kind]
        fields = {} if endpoint is None else refused_on(endpoint)
        self.refused: tuple[tuple[str, Field], ...] = tuple(fields.items())
        places: list[tuple[str, Any, Any]] = [(name, Any, None) for name in fields]
        self.whole = msgspec.defstruct(kind.__name__, places, bases=(kind,), kw_only=True)
        self.decoder = msgspec.json.Decoder(self.whole)
        self.only_refused = msgspec.json.Decoder(msgspec.defstruct("Refused", places))


Body = TypeVar("Body")


class BodyDecoder:
    """The decoder of JSON to the bodies above. It raises ApiError 400 that names the field."""

    def __init__(self) -> None:
        self._kinds = {kind: _BodyKind(kind) for kind in _ENDPOINTS}

    def decode(self, kind: type[Body], raw: bytes | bytearray) -> Body:
        made = self._kinds[kind]
        try:
            body: Body = self._decoded(made, raw)
        except UnicodeDecodeError as error:
            raise ApiError(400, "The request body is not valid UTF-8.", code="invalid_json") from error
        except (msgspec.MsgspecError, RecursionError) as error:
            raise from_decoding(error) from error
        refuse(made.refused, body)
        if isinstance(body, GenerationBody):
            _refuse_nested(body)
        return body

    def _decoded(self, made: _BodyKind, raw: bytes | bytearray) -> Any:
        try:
            return made.decoder.decode(raw)
        except msgspec.ValidationError:
            # A refused field can be why another is missing, and is what the client should hear of first.
            values = msgspec.json.decode(raw)
            if not isinstance(values, dict):
                raise
            refuse(made.refused, made.only_refused.decode(raw))
            points = [name for name in _NUMBERS if isinstance(values.get(name), float)]
            whole = {name: int(values[name]) for name in points if values[name].is_integer()}
            if not whole:
                raise
            return msgspec.convert({**values, **whole}, made.whole)
