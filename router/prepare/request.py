"""Request preparation: a body becomes prompts and options for the workers, or a whole answer. Pure.

The event loop calls `prepare` for small bodies, and a process of the pool (process_pool.py) for all others:
other clients could not wait while megabytes are decoded, rendered and tokenized, and a thread would hold the
interpreter's lock as long.
"""

from dataclasses import dataclass
from typing import Literal

import msgspec
from msgspec import Struct

from router.chat.chat_prompt import chat_prompt
from router.chat.chat_template import ChatTemplate
from router.chat.template_sandbox import TemplateTimeout
from router.errors import ApiError, invalid
from router.openai.requests import (
    BodyDecoder,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    Message,
    TokenizeBody,
)
from router.prepare.generation_config import SamplingDefaults
from router.prepare.parameters import (
    PLAIN_SAMPLING,
    Options,
    check_model,
    check_tokens,
    check_total_choices,
    options_of,
    prompts_of,
    sampling_for,
)
from router.routing.limits import RequestLimits
from router.text.tokenizer import TextTokenizer

MAX_TEXT_PARTS = 8192
"""Of all messages of a chat together."""
BESIDE_BYTES = 8 << 10
"""Larger bodies are prepared beside the event loop. This much takes some milliseconds at most."""
BESIDE_TEMPLATE_S = 0.02
"""What a chat template may take in the event loop; then the rendering begins anew beside it."""


Kind = Literal["chat", "completions", "tokenize", "detokenize"]


class TooMuchHere(Exception):
    """A small body turned out to be long to prepare: a process of the pool is to do it."""


class PrepareInput(Struct, frozen=True):
    """What the event loop knows beside a body. Without `limits` no worker is connected."""

    kind: Kind
    limits: RequestLimits | None = None
    seed: int = 0
    retry_after_s: int = 1
    defaults: SamplingDefaults = PLAIN_SAMPLING


class Prompt(Struct, frozen=True):
    """A tokenized prompt. `text` is what `echo` and `return_prompt_text` give back, and there only for them;
    `of_ids`: the prompt was given as token ids."""

    tokens: list[int]
    text: str | None
    of_ids: bool = False


class PreparedRequest(Struct, frozen=True):
    """The prompts of a request, and how each is to be answered."""

    options: Options
    prompts: list[Prompt]


@dataclass(frozen=True, slots=True)
class Kit:
    """A model's tokenizer and template. A text of more than `max_characters` raises TooMuchHere."""

    model: str
    tokenizer: TextTokenizer
    template: ChatTemplate
    bodies: BodyDecoder
    max_characters: int | None = None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if self.max_characters is not None and len(text) > self.max_characters:
            raise TooMuchHere
        return self.tokenizer.encode(text, add_special_tokens)


def prepare(kit: Kit, ask: PrepareInput, raw: bytes | bytearray) -> PreparedRequest | bytes:
    """`bytes`: the JSON of the answer. Raises ApiError, and TooMuchHere."""
    _check_encoding(raw)
    try:
        match ask.kind:
            case "tokenize":
                return _tokenize(kit, ask, raw)
            case "detokenize":
                return _detokenize(kit, raw)
            case _:
                return _generation(kit, ask, raw)
    except ApiError as error:
        if kit.max_characters is not None and isinstance(error.__cause__, TemplateTimeout):
            raise TooMuchHere from None
        raise


def _check_encoding(raw: bytes | bytearray) -> None:
    """JSON is UTF-8 (RFC 8259, 8.1); other encodings of its first characters all have a zero byte in them."""
    if raw.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")) or b"\0" in raw[:4]:
        raise invalid(
            "The request body must be JSON in UTF-8, without a byte order mark.", code="invalid_json"
        )


def check_parts(messages: list[Message]) -> None:
    """Raises ApiError 400 for the message with which the parts are too many."""
    parts = 0
    for index, message in enumerate(messages):
        if isinstance(message.content, list):
            parts += len(message.content)
            if parts > MAX_TEXT_PARTS:
                where = f"messages[{index}].content"
                raise invalid(
                    f"'{where}': all messages together may have at most {MAX_TEXT_PARTS} content parts.",
                    where,
                )


def _generation(kit: Kit, ask: PrepareInput, raw: bytes | bytearray) -> PreparedRequest:
    body: ChatBody | CompletionBody
    if ask.kind == "chat":
        body = kit.bodies.decode(ChatBody, raw)
    else:
        body = kit.bodies.decode(CompletionBody, raw)
    check_model(body.model, kit.model)
    limits = ask.limits
    if limits is None:
        raise ApiError(503, "No workers are connected.", code="no_workers", retry_after_s=ask.retry_after_s)
    options = options_of(body, limits, ask.seed, ask.defaults)
    prompts: list[Prompt] = []
    if isinstance(body, ChatBody):
        param = "messages"
        check_parts(body.messages)
        text = chat_prompt(kit.template, body, body.messages)
        tokens = kit.encode(text, bool(body.add_special_tokens))
        prompts.append(Prompt(tokens, text if options.prompt_text else None))
    else:
        param = "prompt"
        given = prompts_of(body, limits)
        check_total_choices(len(given), options.choices, limits)
        special = body.add_special_tokens is not False
        prompts = [_prompt(kit, one, options.echo, special) for one in given]
    for prompt in prompts:
        size = None if prompt.of_ids else kit.tokenizer.size
        check_tokens(prompt.tokens, limits.vocab_size, param, size)
        sampling_for(options, len(prompt.tokens), limits, param)
    return PreparedRequest(options, prompts)


def _prompt(kit: Kit, given: str | list[int], echo: bool, special: bool) -> Prompt:
    if isinstance(given, str):
        tokens = kit.encode(given, special) if given else []
        return Prompt(tokens, given if echo else None)
    return Prompt(given, kit.tokenizer.decode(given) if echo else None, of_ids=True)


def _tokenize(kit: Kit, ask: PrepareInput, raw: bytes | bytearray) -> bytes:
    body = kit.bodies.decode(TokenizeBody, raw)
    check_model(body.model, kit.model)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("Exactly one of 'prompt' and 'messages' must be given.", "prompt")
    if body.messages is not None:
        check_parts(body.messages)
        text = chat_prompt(kit.template, body, body.messages)
    else:
        text = body.prompt or ""
    special = body.messages is None if body.add_special_tokens is None else body.add_special_tokens
    tokens = kit.encode(text, special)
    texts = [kit.tokenizer.token_text(token) for token in tokens] if body.return_token_strs else None
    return msgspec.json.encode(
        {
            "count": len(tokens),
            "max_model_len": ask.limits.context_tokens if ask.limits is not None else None,
            "tokens": tokens,
            "token_strs": texts,
        }
    )


def _detokenize(kit: Kit, raw: bytes | bytearray) -> bytes:
    body = kit.bodies.decode(DetokenizeBody, raw)
    check_model(body.model, kit.model)
    if body.tokens:
        check_tokens(body.tokens, kit.tokenizer.size, "tokens")
    return msgspec.json.encode({"prompt": kit.tokenizer.decode(body.tokens)})
