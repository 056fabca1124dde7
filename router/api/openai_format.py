"""The parts of an answer that completions and chats share: SSE frames, usage, log probabilities. Pure.

Frames of a stream differ in little but their text, so everything before and after the text is encoded once
for each choice, and a token costs one string encoding and one concatenation of bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from router.text.choice import LogprobEntry
from router.text.tokenizer import TextTokenizer
from services.protocol.messages import TokenLogprob

DONE = b"data: [DONE]\n\n"
LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""

encode_json = msgspec.json.Encoder().encode


def frame(body: bytes) -> bytes:
    return b"data: " + body + b"\n\n"


@dataclass(slots=True)
class Usage:
    """Token counts of a request, all prompts together; `cached_tokens` of them came from a prefix cache."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(slots=True)
class Echo:
    """What a choice says of its prompt: the text and log probabilities that come before its own, the prompt's
    token ids, and for a chat the text that the template made."""

    text: str = ""
    logprobs: dict[str, Any] | None = None
    token_ids: list[int] | None = None
    prompt_text: str | None = None

    def shown(self) -> dict[str, Any]:
        """Beside the choices of a chat, or in each choice of a completion."""
        values = {"prompt_token_ids": self.token_ids, "prompt_text": self.prompt_text}
        return {name: value for name, value in values.items() if value is not None}

    def take_back(self, text: str) -> None:
        """The prompt's text ends in this no more, now that more tokens follow."""
        self.text = self.text.removesuffix(text)


def _bounded(logprob: float) -> float:
    # The comparison is false for NaN too.
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB


def chat_logprobs(entries: Sequence[LogprobEntry], tokenizer: TextTokenizer) -> list[dict[str, Any]]:
    """`choices[].logprobs.content` of a chat answer."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": tokenizer.token_text(token),
            "logprob": _bounded(logprob),
            "bytes": list(tokenizer.token_bytes(token)),
        }

    return [
        {
            **one(entry.token, entry.logprob.logprob),
            "top_logprobs": [one(top.token, top.logprob) for top in entry.logprob.top],
        }
        for entry in entries
    ]


def _top(logprob: TokenLogprob, token: int, tokenizer: TextTokenizer) -> dict[str, float]:
    found = {tokenizer.token_text(token): _bounded(logprob.logprob)}
    for top in logprob.top:
        # Two tokens with the same text (halves of a character): the likelier one stays.
        found.setdefault(tokenizer.token_text(top.token), _bounded(top.logprob))
    return found


def completion_logprobs(
    entries: Sequence[LogprobEntry], tokenizer: TextTokenizer, offset: int, alternatives: int
) -> dict[str, Any]:
    """`choices[].logprobs` of a completion; `offset` characters (an echoed prompt) come before the text."""
    tops = [_top(entry.logprob, entry.token, tokenizer) for entry in entries]
    return {
        "text_offset": [offset + entry.start for entry in entries],
        "token_logprobs": [_bounded(entry.logprob.logprob) for entry in entries],
        "tokens": [tokenizer.token_text(entry.token) for entry in entries],
        "top_logprobs": tops if alternatives else None,
    }


def prompt_logprobs(
    prompt: Sequence[int],
    logprobs: Sequence[TokenLogprob],
    tokenizer: TextTokenizer,
    alternatives: int,
    special: bool = False,
) -> dict[str, Any]:
    """The log probabilities of an echoed prompt, as in a completion; its first token has none. `special`: its
    text has special tokens."""
    offsets: list[int] = []
    length = seen = 0
    detokenizer = tokenizer.detokenizer(special)
    for token in prompt:
        offsets.append(seen)
        length += len(detokenizer.push((token,)))
        seen = max(seen, length + len(detokenizer.ahead()))
    following = list(zip(prompt[1:], logprobs, strict=False))
    tops: list[dict[str, float] | None] = [None]
    tops += [_top(logprob, token, tokenizer) for token, logprob in following]
    values: list[float | None] = [None]
    values += [_bounded(logprob.logprob) for _, logprob in following]
    return {
        "text_offset": offsets[: len(values)],
        "token_logprobs": values,
        "tokens": [tokenizer.token_text(token) for token in prompt[: len(values)]],
        "top_logprobs": tops if alternatives else None,
    }


def joined_logprobs(first: dict[str, Any] | None, second: dict[str, Any]) -> dict[str, Any]:
    """A prompt's log probabilities followed by its continuation's."""
    if first is None:
        return second
    return {
        name: first[name] + second[name] if first[name] is not None and second[name] is not None else None
        for name in second
    }
