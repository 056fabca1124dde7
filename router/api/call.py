"""One HTTP request while it runs: its prompts' outputs, and the wake-up of the task that writes the response.

Workers' reports run in the event loop's callbacks, in which each choice leaves finished frames; the task of
the response takes all that are ready whenever it wakes up. A slow client costs memory up to
`MAX_UNSENT_FRAMES`, and never holds the others up.
"""

import asyncio
from collections.abc import Sequence
from typing import Protocol

from router.api.openai_format import Echo, Usage, prompt_logprobs
from router.errors import ApiError
from router.prepare.parameters import Options
from router.routing.metrics import Metrics
from router.text.choice import Choice
from router.text.detokenizer import Detokenizer
from router.text.tokenizer import TextTokenizer
from services.protocol.messages import PrefillDone, Tokens

MAX_UNSENT_FRAMES = 1 << 15
"""Frames of a stream that wait for its client: some megabytes. A reader may be slow, but not for ever."""


class ResponseBuilder(Protocol):
    """One answer in the making. `frames` is what a stream has ready to send; whole answers leave it empty."""

    frames: list[bytes]

    def choice(self, call: "Call", index: int, detokenizer: Detokenizer, echo: Echo) -> "ChoiceStream":
        """The output of one more choice."""

    def note_tokens(self, index: int, tokens: Sequence[int]) -> None:
        """Takes the tokens a choice was made of; called only for answers that give token ids too."""

    def annotate(self, since: int, index: int, usage: Usage) -> None:
        """Adds what few requests ask for to one choice's new frames, those from number `since` on."""

    def finish(self, usage: Usage) -> None:
        """Called once, when all choices have ended."""

    def body(self, usage: Usage) -> bytes:
        """The whole answer; for answers that are not streamed."""


class Call:
    """One HTTP request while it runs. It ends when all choices have ended, with one `error`, or with the
    client gone (`left`).

    The outputs hold the call, and it holds none of them: a request leaves nothing to the garbage collector.
    """

    def __init__(
        self, options: Options, builder: ResponseBuilder, tokenizer: TextTokenizer, metrics: Metrics
    ) -> None:
        self.options, self.builder = options, builder
        self.tokenizer, self.metrics = tokenizer, metrics
        self.usage = Usage()
        self.error: ApiError | None = None
        self.left = False
        self._prompts = self._open_choices = 0
        self._waiter: asyncio.Future[None] | None = None

    def add_prompt(self, tokens: list[int], text: str | None, of_ids: bool = False) -> "PromptStream":
        """`text` is what `echo` and `return_prompt_text` give back, made of the tokens if it is None."""
        first_index = self._prompts * self.options.choices
        output = PromptStream(self, tokens, text, of_ids or text is None, first_index)
        self._prompts += 1
        self._open_choices += self.options.choices
        self.usage.prompt_tokens += len(tokens)
        return output

    @property
    def ended(self) -> bool:
        return self.left or self.error is not None or self._open_choices == 0

    def count(self, tokens: int) -> None:
        """Counts the tokens a choice was made of; what was generated past its end is nobody's."""
        self.usage.completion_tokens += tokens
        self.metrics.generation_tokens += tokens

    def choice_ended(self) -> None:
        if self._open_choices == 1:
            self.builder.finish(self.usage)  # first: an answer that cannot be finished has not ended well
        self._open_choices -= 1
        if self._open_choices == 0:
            self.wake()

    def fail(self, error: ApiError) -> None:
        """The first error ends the call; later ones say nothing new."""
        if not self.ended:
            self.error = error
            self.wake()

    def leave(self) -> None:
        """The client is gone. (Also seen after a complete answer, where it means nothing.)"""
        if not self.ended:
            self.left = True
            self.wake()

    def wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def wait(self) -> None:
        """Until there are frames to send, or the call has ended."""
        while not self.builder.frames and not self.ended:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def take_frames(self) -> bytes:
        frames = self.builder.frames
        if len(frames) == 1:
            return frames.pop()
        joined = b"".join(frames)
        frames.clear()
        return joined


class ChoiceStream(Choice):
    """One choice of an answer (a `ChoiceOutput` of routed_request.py): a worker's tokens in, frames out.

    A token passes from the worker's client over the dispatcher, its attempt and its request to here, where it
    becomes bytes of the client's stream.
    """

    __slots__ = ("_annotates", "_call", "_index", "_last_token_s", "_muted", "frames")

    def __init__(self, call: Call, index: int, detokenizer: Detokenizer) -> None:
        options = call.options
        super().__init__(detokenizer, options.stops, options.include_stop, options.logprobs is not None)
        self._call, self._index = call, index
        self.frames = call.builder.frames
        self._last_token_s: float | None = None
        self._muted = options.max_tokens == 0
        self._annotates = options.stream and (
            options.token_ids or options.prompt_text or options.continuous_usage
        )

    def on_tokens(self, report: Tokens, now_s: float) -> bool:
        """Writes what the tokens add to the answer. False: the choice has ended."""
        call, frames = self._call, self.frames
        if self._last_token_s is not None:
            call.metrics.inter_token.observe(now_s - self._last_token_s)
        self._last_token_s = now_s
        tokens_before, frames_before = self.token_count, len(frames)
        goes_on = False
        if self._muted:
            self.mute()
        else:
            goes_on = self.push(report)
        taken = self.token_count - tokens_before
        call.count(taken)
        if call.options.token_ids:
            call.builder.note_tokens(self._index, report.tokens[:taken])
        if self._annotates:
            call.builder.annotate(frames_before, self._index, call.usage)
        if not goes_on:
            call.choice_ended()
            return False
        if frames:
            if len(frames) > MAX_UNSENT_FRAMES:
                call.fail(ApiError(408, "The client reads too slowly.", code="client_too_slow"))
                return False
            call.wake()
        return True


class PromptStream:
    """One prompt's part of an answer (a `PromptOutput` of routed_request.py)."""

    __slots__ = ("_call", "_echoes", "_prompt", "_special", "choices")

    def __init__(
        self, call: Call, prompt: list[int], text: str | None, of_ids: bool, first_index: int
    ) -> None:
        options = call.options
        self._call, self._prompt = call, prompt
        self._special = of_ids
        """Special tokens are part of an echo that was given as token ids."""
        echo = (call.tokenizer.decode(prompt) if text is None else text) if options.echo else ""
        ids = prompt if options.token_ids else None
        rendered = text if options.prompt_text else None
        self._echoes = [Echo(echo, token_ids=ids, prompt_text=rendered) for _ in range(options.choices)]
        continuation = call.tokenizer.continuation(prompt)
        self.choices: list[ChoiceStream] = []
        for index, one in enumerate(self._echoes, first_index):
            detokenizer = continuation.detokenizer(one.take_back)
            self.choices.append(call.builder.choice(call, index, detokenizer, one))

    def on_prefilled(self, report: PrefillDone) -> None:
        self._call.usage.cached_tokens += report.cached_tokens
        options = self._call.options
        if options.echo and options.logprobs is not None and report.prompt_logprobs is not None:
            logprobs = prompt_logprobs(
                self._prompt, report.prompt_logprobs, self._call.tokenizer, options.logprobs, self._special
            )
            for echo in self._echoes:
                echo.logprobs = logprobs

    def on_failed(self, error: ApiError) -> None:
        self._call.fail(error)
