"""The two APIs' answers, streamed and whole: a `ResponseBuilder` (call.py) makes the output of each choice,
which appends frames to a stream or collects the parts of one body."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec import Struct

from router.api.call import Call, ChoiceStream
from router.api.openai_format import (
    DONE,
    Echo,
    Usage,
    chat_logprobs,
    completion_logprobs,
    encode_json,
    frame,
    joined_logprobs,
)
from router.text.choice import LogprobEntry
from router.text.detokenizer import Detokenizer
from router.text.tokenizer import TextTokenizer
from services.protocol.messages import FinishReason


class ResponseHeader(Struct, frozen=True):
    """What every object of one answer begins with."""

    answer_id: str
    created: int
    model: str

    def fields(self, kind: str) -> dict[str, Any]:
        return {"id": self.answer_id, "object": kind, "created": self.created, "model": self.model}


_END = b"}]}\n\n"
"""Of every frame with a choice."""
_PLAIN_TAIL = b',"logprobs":null,"finish_reason":null' + _END


def _tail(logprobs: dict[str, Any] | None, finish: FinishReason | None) -> bytes:
    return b',"logprobs":' + encode_json(logprobs) + b',"finish_reason":' + encode_json(finish) + _END


def _open_frame(header: ResponseHeader, kind: str, null_usage: bool) -> bytes:
    fields = header.fields(kind)
    if null_usage:
        fields["usage"] = None
    return b"data: " + encode_json(fields)[:-1] + b',"choices":[{"index":'


class _ChatFrames(ChoiceStream):
    """The first frame of a choice has the role, the last its finish reason."""

    __slots__ = ("_content", "_opened", "_start", "_tokenizer")

    def __init__(
        self, call: Call, index: int, detokenizer: Detokenizer, start: bytes, tokenizer: TextTokenizer
    ) -> None:
        super().__init__(call, index, detokenizer)
        self._start, self._content = start, start + b'{"content":'
        self._tokenizer, self._opened = tokenizer, False

    def write(self, text: str, entries: Sequence[LogprobEntry], finish: FinishReason | None) -> None:
        if not self._opened:
            self._opened = True
            self.frames.append(self._start + b'{"role":"assistant","content":""}' + _PLAIN_TAIL)
        if finish is None and not entries:
            self.frames.append(self._content + encode_json(text) + b"}" + _PLAIN_TAIL)
            return
        logprobs = {"content": chat_logprobs(entries, self._tokenizer), "refusal": None} if entries else None
        content = self._content + encode_json(text) + b"}" if text or entries else self._start + b"{}"
        self.frames.append(content + _tail(logprobs, finish))


class _CompletionFrames(ChoiceStream):
    """The first frame of a choice begins with the echo of its prompt."""

    __slots__ = ("_alternatives", "_echo", "_opened", "_start", "_tokenizer")

    def __init__(
        self,
        call: Call,
        index: int,
        detokenizer: Detokenizer,
        start: bytes,
        tokenizer: TextTokenizer,
        alternatives: int | None,
        echo: Echo,
    ) -> None:
        super().__init__(call, index, detokenizer)
        self._start, self._tokenizer, self._opened = start, tokenizer, False
        self._alternatives, self._echo = alternatives, echo

    def write(self, text: str, entries: Sequence[LogprobEntry], finish: FinishReason | None) -> None:
        echo = self._echo
        logprobs: dict[str, Any] | None = None
        if self._alternatives is not None and entries:
            logprobs = completion_logprobs(entries, self._tokenizer, len(echo.text), self._alternatives)
        if not self._opened:
            self._opened = True
            text = echo.text + text
            if echo.logprobs is not None:
                logprobs = joined_logprobs(echo.logprobs, logprobs) if logprobs else echo.logprobs
        tail = _PLAIN_TAIL if finish is None and logprobs is None else _tail(logprobs, finish)
        self.frames.append(self._start + encode_json(text) + tail)


def _further(fields: dict[str, Any]) -> bytes:
    """As they follow others in an object."""
    return b"," + encode_json(fields)[1:-1] if fields else b""


class StreamBuilder:
    """A streamed answer. `with_usage` adds a last chunk without choices, and a null `usage` to all others (as
    OpenAI does). `continuous_usage` gives every chunk the usage so far."""

    def __init__(
        self,
        header: ResponseHeader,
        tokenizer: TextTokenizer,
        chat: bool,
        logprobs: int | None,
        with_usage: bool,
        continuous_usage: bool = False,
    ) -> None:
        self.frames: list[bytes] = []
        self._header, self._tokenizer, self._logprobs = header, tokenizer, logprobs
        self._chat, self._with_usage = chat, with_usage
        self._kind = "chat.completion.chunk" if chat else "text_completion"
        self._continuous_usage = continuous_usage
        self._open = _open_frame(header, self._kind, with_usage and not continuous_usage)
        self._echoes: dict[int, Echo] = {}
        self._token_ids: dict[int, list[int]] = {}

    def choice(self, call: Call, index: int, detokenizer: Detokenizer, echo: Echo) -> ChoiceStream:
        self._echoes[index] = echo
        if self._chat:
            return _ChatFrames(call, index, detokenizer, self._open + b'%d,"delta":' % index, self._tokenizer)
        start = self._open + b'%d,"text":' % index
        return _CompletionFrames(call, index, detokenizer, start, self._tokenizer, self._logprobs, echo)

    def note_tokens(self, index: int, tokens: Sequence[int]) -> None:
        self._token_ids.setdefault(index, []).extend(tokens)

    def annotate(self, since: int, index: int, usage: Usage) -> None:
        for at in range(since, len(self.frames)):
            in_choice: dict[str, Any] = {}
            beside: dict[str, Any] = {"usage": usage.body()} if self._continuous_usage else {}
            echo = self._echoes.pop(index, None)
            if echo is not None:
                (beside if self._chat else in_choice).update(echo.shown())
            if at == len(self.frames) - 1 and index in self._token_ids:
                # Tokens whose text was held back come with the next that is not.
                in_choice["token_ids"] = self._token_ids.pop(index)
            start = self.frames[at].removesuffix(_END)
            self.frames[at] = start + _further(in_choice) + b"}]" + _further(beside) + b"}\n\n"

    def finish(self, usage: Usage) -> None:
        if self._with_usage:
            last = {**self._header.fields(self._kind), "choices": [], "usage": usage.body()}
            self.frames.append(frame(encode_json(last)))
        self.frames.append(DONE)

    def body(self, usage: Usage) -> bytes:
        return b"".join(self.frames)


@dataclass(slots=True)
class _ChoiceParts:
    """One choice of a whole answer."""

    index: int
    echo: Echo
    texts: list[str] = field(default_factory=list)
    entries: list[LogprobEntry] = field(default_factory=list)
    finish: FinishReason | None = None


class _Collected(ChoiceStream):
    """Fills the parts of one choice. The builder keeps the parts and not their filler, which knows the call
    that knows the builder."""

    __slots__ = ("_parts",)

    def __init__(self, call: Call, detokenizer: Detokenizer, parts: _ChoiceParts) -> None:
        super().__init__(call, parts.index, detokenizer)
        self._parts = parts

    def write(self, text: str, entries: Sequence[LogprobEntry], finish: FinishReason | None) -> None:
        self._parts.texts.append(text)
        self._parts.entries.extend(entries)
        self._parts.finish = finish


class WholeBuilder:
    """An answer in one body."""

    def __init__(
        self, header: ResponseHeader, tokenizer: TextTokenizer, chat: bool, logprobs: int | None
    ) -> None:
        self.frames: list[bytes] = []
        self._header, self._tokenizer = header, tokenizer
        self._chat, self._logprobs = chat, logprobs
        self._choices: list[_ChoiceParts] = []
        self._token_ids: dict[int, list[int]] = {}

    def choice(self, call: Call, index: int, detokenizer: Detokenizer, echo: Echo) -> ChoiceStream:
        self._choices.append(_ChoiceParts(index, echo))
        return _Collected(call, detokenizer, self._choices[-1])

    def note_tokens(self, index: int, tokens: Sequence[int]) -> None:
        self._token_ids.setdefault(index, []).extend(tokens)

    def annotate(self, since: int, index: int, usage: Usage) -> None:
        """There are no frames."""

    def finish(self, usage: Usage) -> None:
        """Nothing to add: `body` is called next."""

    def body(self, usage: Usage) -> bytes:
        kind = "chat.completion" if self._chat else "text_completion"
        one = self._chat_choice if self._chat else self._completion_choice
        collected = sorted(self._choices, key=lambda choice: choice.index)
        choices = [one(choice) for choice in collected]
        for choice, made in zip(collected, choices, strict=True):
            if choice.index in self._token_ids:
                made["token_ids"] = self._token_ids[choice.index]
            if not self._chat:
                made.update(choice.echo.shown())
        beside = collected[0].echo.shown() if self._chat else {}
        answer = {**self._header.fields(kind), "choices": choices, "usage": usage.body(), **beside}
        return encode_json(answer)

    def _chat_choice(self, choice: _ChoiceParts) -> dict[str, Any]:
        logprobs = None
        if self._logprobs is not None:
            logprobs = {"content": chat_logprobs(choice.entries, self._tokenizer), "refusal": None}
        message = {"role": "assistant", "content": "".join(choice.texts), "refusal": None}
        return {
            "index": choice.index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": choice.finish,
        }

    def _completion_choice(self, choice: _ChoiceParts) -> dict[str, Any]:
        echo = choice.echo
        logprobs = None
        if self._logprobs is not None:
            logprobs = joined_logprobs(
                echo.logprobs,
                completion_logprobs(choice.entries, self._tokenizer, len(echo.text), self._logprobs),
            )
        return {
            "index": choice.index,
            "text": echo.text + "".join(choice.texts),
            "logprobs": logprobs,
            "finish_reason": choice.finish,
        }
