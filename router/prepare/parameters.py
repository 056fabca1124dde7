"""From a decoded body to what the workers are asked. Pure; raises ApiError 400 (404 for another model)."""

import math

import msgspec
from msgspec import Struct

from router.errors import ApiError, invalid
from router.openai.requests import ChatBody, CompletionBody, GenerationBody
from router.prepare.generation_config import SamplingDefaults
from router.routing.limits import RequestLimits
from services.protocol.messages import Sampling

DEFAULT_COMPLETION_TOKENS = 16
MAX_TOKEN_ID_DIGITS = 10
PLAIN_SAMPLING = SamplingDefaults()


class Options(Struct, frozen=True):
    """How a request's answer is put together, and `sampling` without the prompt's clip of `max_tokens`.

    `max_tokens` None: as many as the context has room for. 0 (with `echo`): nothing is generated.
    """

    sampling: Sampling
    max_tokens: int | None
    choices: int
    stops: tuple[str, ...]
    include_stop: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool
    logprobs: int | None
    echo: bool = False
    token_ids: bool = False
    prompt_text: bool = False
    label: str = ""
    """The client's own name for the answer."""
    cache_salt: bytes = b""
    """Of requests that share a prefix cache with none but each other."""


def check_model(asked: str | None, served: str) -> None:
    if asked is not None and asked != served:
        raise ApiError(
            404,
            f"The model '{asked}' does not exist: this server serves '{served}'.",
            param="model",
            code="model_not_found",
        )


def options_of(
    body: CompletionBody | ChatBody,
    limits: RequestLimits,
    random_seed: int,
    defaults: SamplingDefaults = PLAIN_SAMPLING,
) -> Options:
    """`random_seed` (62 bits) and `defaults` are used where the request says nothing."""
    _check_floats(body)
    choices = body.n or 1
    if choices > limits.max_choices:
        raise invalid(f"'n' is {choices}: at most {limits.max_choices} choices are allowed.", "n")
    if body.best_of is not None and body.best_of != choices:
        raise invalid(
            f"'best_of' must equal 'n' ({choices}) or be left out.", "best_of", "unsupported_parameter"
        )
    if body.stream_options is not None and not body.stream:
        raise invalid("'stream_options' is only allowed when 'stream' is true.", "stream_options")
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if isinstance(body, ChatBody):
        echo, logprobs = False, _chat_logprobs(body)
        max_tokens = defaults.max_tokens if max_tokens is None else max_tokens
    else:
        echo, logprobs = bool(body.echo), body.logprobs
        most = DEFAULT_COMPLETION_TOKENS if defaults.max_tokens is None else defaults.max_tokens
        max_tokens = min(DEFAULT_COMPLETION_TOKENS, most) if max_tokens is None else max_tokens
        if max_tokens == 0 and not echo:
            raise invalid("'max_tokens' must be at least 1 (0 is for 'echo' only).", "max_tokens")
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    sampling = Sampling(
        max_tokens=1,
        seed=random_seed if body.seed is None else body.seed & (2**63 - 1),
        temperature=_or(body.temperature, defaults.temperature),
        top_p=_or(body.top_p, defaults.top_p),
        top_k=defaults.top_k if body.top_k is None else max(0, body.top_k),
        min_p=_or(body.min_p, defaults.min_p),
        repetition_penalty=_or(body.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        logit_bias=_logit_bias(body.logit_bias, limits.vocab_size),
        logprobs=logprobs,
        prompt_logprobs=logprobs if echo else None,
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=_stop_token_ids(body.stop_token_ids, limits.vocab_size),
    )
    return Options(
        sampling=sampling,
        max_tokens=max_tokens,
        choices=choices,
        stops=stops,
        include_stop=bool(body.include_stop_str_in_output or body.no_stop_trim),
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        continuous_usage=bool(body.stream_options and body.stream_options.continuous_usage_stats),
        logprobs=logprobs,
        echo=echo,
        token_ids=bool(body.return_token_ids),
        prompt_text=isinstance(body, ChatBody) and bool(body.return_prompt_text),
        label=body.request_id or body.rid or "",
        cache_salt=_cache_salt(body),
    )


def _cache_salt(body: GenerationBody) -> bytes:
    if body.cache_salt is None and body.extra_key is None:
        return b""
    return msgspec.json.encode([body.cache_salt, body.extra_key])


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _check_floats(body: GenerationBody) -> None:
    # JSON has no NaN, but a decoder may make an infinity of a large number.
    for name in (
        "temperature",
        "top_p",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
    ):
        value = getattr(body, name)
        if value is not None and not math.isfinite(value):
            raise invalid(f"'{name}' must be a finite number.", name)


def _chat_logprobs(body: ChatBody) -> int | None:
    if body.top_logprobs and not body.logprobs:
        raise invalid("'top_logprobs' needs 'logprobs' to be true.", "top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def _logit_bias(given: dict[str, float] | None, vocab_size: int) -> dict[int, float]:
    bias: dict[int, float] = {}
    for key, value in (given or {}).items():
        # The length first: int() raises on thousands of digits.
        is_number = len(key) <= MAX_TOKEN_ID_DIGITS and key.isascii() and key.isdigit()
        if not is_number or int(key) >= vocab_size:
            raise invalid(f"'logit_bias': {key[:32]!r} is not a token id below {vocab_size}.", "logit_bias")
        bias[int(key)] = value
    return bias


def _stop_token_ids(given: list[int] | None, vocab_size: int) -> list[int]:
    for token in given or ():
        if token >= vocab_size:
            raise invalid(
                f"'stop_token_ids': {token} is not a token id below {vocab_size}.", "stop_token_ids"
            )
    return given or []


def prompts_of(body: CompletionBody, limits: RequestLimits) -> list[str] | list[list[int]]:
    """The prompts of a completions request in one of its four forms, as a list of texts or of token ids."""
    given = body.prompt
    if isinstance(given, str):
        return [given]
    kinds = set(map(type, given))
    if len(kinds) > 1:
        raise invalid("'prompt' must hold either texts, or token ids, or lists of token ids.", "prompt")
    if int in kinds:
        # One prompt of token ids.
        return [[token for token in given if isinstance(token, int)]]
    if len(given) > limits.max_prompts:
        raise invalid(
            f"'prompt' holds {len(given)} prompts: at most {limits.max_prompts} are allowed.", "prompt"
        )
    if str in kinds:
        return [text for text in given if isinstance(text, str)]
    return [tokens for tokens in given if isinstance(tokens, list)]


def check_total_choices(prompts: int, choices: int, limits: RequestLimits) -> None:
    if prompts * choices > limits.max_total_choices:
        raise invalid(
            f"{prompts} prompts times 'n' {choices} is over the limit of {limits.max_total_choices} choices.",
            "n",
        )


def check_tokens(tokens: list[int], vocab_size: int, param: str, tokenizer_size: int | None = None) -> None:
    """Raises ApiError 400 for an empty list or an id outside the vocabulary. `tokenizer_size` is given where
    the ids are a tokenizer's own: mostly that says enough, and they need not be gone through."""
    if not tokens:
        raise invalid(f"'{param}' must not be empty.", param)
    if tokenizer_size is not None and tokenizer_size <= vocab_size:
        return
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        raise invalid(f"'{param}' holds a token id outside the vocabulary of {vocab_size}.", param)


def sampling_for(options: Options, prompt_tokens: int, limits: RequestLimits, param: str) -> Sampling:
    """The request's sampling with `max_tokens` clipped to what this prompt leaves of the context."""
    room = limits.context_tokens - prompt_tokens
    if room < 1:
        # OpenAI's words: clients know an overflow by them, and shorten their history.
        what = "messages" if param == "messages" else "prompt"
        raise invalid(
            f"This model's maximum context length is {limits.context_tokens} tokens. However, your {what} "
            f"resulted in {prompt_tokens} tokens, and at least one more is to be generated. Please reduce "
            f"the length of the {what}.",
            param,
            "context_length_exceeded",
        )
    wanted = room if options.max_tokens is None else max(1, min(options.max_tokens, room))
    return msgspec.structs.replace(options.sampling, max_tokens=wanted)
