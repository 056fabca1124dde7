"""The two APIs' answers, streamed and whole: a `ResponseBuilder` hands out one `Writer` for each choice.
Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from msgspec import Struct

from router.api.openai_format import (
    DONE,
    Usage,
    chat_logprobs,
    completion_logprobs,
    encode_json,
    frame,
    joined_logprobs,
)
from router.text.choice import LogprobEntry, Writer
from router.text.tokenizer import TextTokenizer
from services.protocol.messages import FinishReason


class ResponseHeader(Struct, frozen=True):
    """What every object of one answer begins with."""

    answer_id: str
    created: int
    model: str

    def fields(self, kind: str) -> dict[str, Any]:
        return {"id": self.answer_id, "object": kind, "created": self.created, "model": self.model}


@dataclass(slots=True)
class Echo:
    """What an answer says of a prompt: its text and log probabilities, echoed before a choice of its own, its
    token ids, and for a chat what its template made."""

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


class ResponseBuilder(Protocol):
    """One answer in the making. `frames` is what a stream has ready to send; whole answers leave it empty."""

    frames: list[bytes]

    def writer(self, index: int, echoed: Echo) -> Writer: ...

    def note_tokens(self, index: int, tokens: Sequence[int]) -> None:
        """What a choice was made of; called only for answers that give token ids too."""

    def annotate(self, since: int, index: int, usage: Usage) -> None:
        """Frames from number `since` on are one choice's new ones; they get what few requests ask for."""

    def close(self, usage: Usage) -> None:
        """All choices have ended."""

    def body(self, usage: Usage) -> bytes:
        """The whole answer; for answers that are not streamed."""


_END = b"}]}\n\n"
"""Of every frame with a choice."""
_PLAIN_TAIL = b',"logprobs":null,"finish_reason":null' + _END


def _tail(logprobs: dict[str, Any] | None, finish: FinishReason | None) -> bytes:
    return b',"logprobs":' + encode_json(logprobs) + b',"finish_reason":' + encode_json(finish) + _END


def _open_frame(response_header: ResponseHeader, kind: str, null_usage: bool) -> bytes:
    fields = response_header.fields(kind)
    if null_usage:
        fields["usage"] = None
    return b"data: " + encode_json(fields)[:-1] + b',"choices":[{"index":'


@dataclass(slots=True)
class _ChatFrames:
    """The first frame of a choice has the role, the last its finish reason."""

    frames: list[bytes]
    start: bytes
    tokenizer: TextTokenizer
    want_logprobs: bool
    opened: bool = False
    content: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.content = self.start + b'{"content":'

    def write(self, text: str, entries: Sequence[LogprobEntry], finish: FinishReason | None) -> None:
        if not self.opened:
            self.opened = True
            self.frames.append(self.start + b'{"role":"assistant","content":""}' + _PLAIN_TAIL)
        if finish is None and not entries:
            self.frames.append(self.content + encode_json(text) + b"}" + _PLAIN_TAIL)
            return
        logprobs = {"content": chat_logprobs(entries, self.tokenizer), "refusal": None} if entries else None
        delta = self.content + encode_json(text) + b"}" if text or entries else self.start + b"{}"
        self.frames.append(delta + _tail(logprobs, finish))


@dataclass(slots=True)
class _CompletionFrames:
    frames: list[bytes]
    start: bytes
    tokenizer: TextTokenizer
    alternatives: int | None
    echoed: Echo
    opened: bool = False

    def write(self, text: str, entries: Sequence[LogprobEntry], finish: FinishReason | None) -> None:
        logprobs: dict[str, Any] | None = None
        if self.alternatives is not None and entries:
            logprobs = completion_logprobs(entries, self.tokenizer, len(self.echoed.text), self.alternatives)
        if not self.opened:
            self.opened = True
            text = self.echoed.text + text
            if self.echoed.logprobs is not None:
                logprobs = (
                    joined_logprobs(self.echoed.logprobs, logprobs) if logprobs else self.echoed.logprobs
                )
        tail = _PLAIN_TAIL if finish is None and logprobs is None else _tail(logprobs, finish)
        self.frames.append(self.start + encode_json(text) + tail)


def _further(fields: dict[str, Any]) -> bytes:
    """As they follow others in an object."""
    return b"," + encode_json(fields)[1:-1] if fields else b""


class StreamSheet:
    """`with_usage` adds a last chunk without choices, and a null `usage` to all others (as OpenAI does).
    `continuous_usage` gives every chunk the usage so far."""

    def __init__(
        self,
        response_header: ResponseHeader,
        tokenizer: TextTokenizer,
        chat: bool,
        logprobs: int | None,
        with_usage: bool,
        continuous_usage: bool = False,
    ) -> None:
        self.frames: list[bytes] = []
        self._heading, self._tokenizer, self._logprobs = response_header, tokenizer, logprobs
        self._chat, self._with_usage = chat, with_usage
        self._kind = "chat.completion.chunk" if chat else "text_completion"
        self._continuous_usage = continuous_usage
        self._open = _open_frame(response_header, self._kind, with_usage and not continuous_usage)
        self._echoed: dict[int, Echo] = {}
        self._token_ids: dict[int, list[int]] = {}

    def writer(self, index: int, echoed: Echo) -> Writer:
        self._echoed[index] = echoed
        if self._chat:
            start = self._open + b'%d,"delta":' % index
            return _ChatFrames(self.frames, start, self._tokenizer, self._logprobs is not None)
        return _CompletionFrames(
            self.frames, self._open + b'%d,"text":' % index, self._tokenizer, self._logprobs, echoed
        )

    def note_tokens(self, index: int, tokens: Sequence[int]) -> None:
        self._token_ids.setdefault(index, []).extend(tokens)

    def annotate(self, since: int, index: int, usage: Usage) -> None:
        for at in range(since, len(self.frames)):
            in_choice: dict[str, Any] = {}
            beside: dict[str, Any] = {"usage": usage.body()} if self._continuous_usage else {}
            echoed = self._echoed.pop(index, None)
            if echoed is not None:
                (beside if self._chat else in_choice).update(echoed.shown())
            if at == len(self.frames) - 1 and index in self._token_ids:
                # Tokens whose text was held back come with the next that is not.
                in_choice["token_ids"] = self._token_ids.pop(index)
            start = self.frames[at].removesuffix(_END)
            self.frames[at] = start + _further(in_choice) + b"}]" + _further(beside) + b"}\n\n"

    def close(self, usage: Usage) -> None:
        if self._with_usage:
            last = {**self._heading.fields(self._kind), "choices": [], "usage": usage.body()}
            self.frames.append(frame(encode_json(last)))
        self.frames.append(DONE)

    def body(self, usage: Usage) -> bytes:
        return b"".join(self.frames)


@dataclass(slots=True)
class _Collected:
    """One choice of a whole answer."""

    index: int
    echoed: Echo
    parts: list[str] = field(default_factory=list)
    entries: list[LogprobEntry] = field(default_factory=list)
    finish: FinishReason | None = None

    def write(self, text: str, entries: Sequence[LogprobEntry], finish: FinishReason | None) -> None:
        self.parts.append(text)
        self.entries.extend(entries)
        self.finish = finish


class WholeSheet:
    def __init__(
        self, response_header: ResponseHeader, tokenizer: TextTokenizer, chat: bool, logprobs: int | None
    ) -> None:
        self.frames: list[bytes] = []
        self._heading, self._tokenizer = response_header, tokenizer
        self._chat, self._logprobs = chat, logprobs
        self._choices: list[_Collected] = []
        self._token_ids: dict[int, list[int]] = {}

    def writer(self, index: int, echoed: Echo) -> Writer:
        collected = _Collected(index, echoed)
        self._choices.append(collected)
        return collected

    def note_tokens(self, index: int, tokens: Sequence[int]) -> None:
        self._token_ids.setdefault(index, []).extend(tokens)

    def annotate(self, since: int, index: int, usage: Usage) -> None:
        """There are no frames."""

    def close(self, usage: Usage) -> None:
        """Nothing to add: `body` is asked for next."""

    def body(self, usage: Usage) -> bytes:
        kind = "chat.completion" if self._chat else "text_completion"
        one = self._chat_choice if self._chat else self._completion_choice
        collected = sorted(self._choices, key=lambda choice: choice.index)
        choices = [one(choice) for choice in collected]
        for choice, made in zip(collected, choices, strict=True):
            if choice.index in self._token_ids:
                made["token_ids"] = self._token_ids[choice.index]
            if not self._chat:
                made.update(choice.echoed.shown())
        beside = collected[0].echoed.shown() if self._chat else {}
        answer = {**self._heading.fields(kind), "choices": choices, "usage": usage.body(), **beside}
        return encode_json(answer)

    def _chat_choice(self, choice: _Collected) -> dict[str, Any]:
        logprobs = None
        if self._logprobs is not None:
            logprobs = {"content": chat_logprobs(choice.entries, self._tokenizer), "refusal": None}
        message = {"role": "assistant", "content": "".join(choice.parts), "refusal": None}
        return {
            "index": choice.index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": choice.finish,
        }

    def _completion_choice(self, choice: _Collected) -> dict[str, Any]:
        echoed = choice.echoed
        logprobs = None
        if self._logprobs is not None:
            logprobs = joined_logprobs(
                echoed.logprobs,
                completion_logprobs(choice.entries, self._tokenizer, len(echoed.text), self._logprobs),
            )
        return {
            "index": choice.index,
            "text": echoed.text + "".join(choice.parts),
            "logprobs": logprobs,
            "finish_reason": choice.finish,
        }
