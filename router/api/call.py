"""One HTTP request while it runs: its prompts' outputs, and the wake-up of whoever writes the response.

The workers' reports run in the event loop's callbacks and leave finished frames here; the response's task
takes all that are ready whenever it wakes up. A slow client costs memory up to `MAX_UNSENT_FRAMES`, and never
holds the others up.
"""

import asyncio

from router.api.openai_format import Usage, prompt_logprobs
from router.api.parameters import Options
from router.api.responses import Echo, ResponseBuilder
from router.errors import ApiError
from router.routing.metrics import Metrics
from router.text.choice import Choice
from router.text.tokenizer import TextTokenizer
from services.protocol.messages import PrefillDone, Tokens

MAX_UNSENT_FRAMES = 1 << 15
"""Frames of a stream that wait for its client: some megabytes. A reader may be slow, but not for ever."""


class Call:
    """Ends when all choices have ended, with one `error`, or with the client gone (`left`).

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

    def add_prompt(self, tokens: list[int], text: str | None, of_ids: bool = False) -> "PromptOutput":
        """`text` is what `echo` and `return_prompt_text` give back, made of the tokens if it is None."""
        first_index = self._prompts * self.options.choices
        output = PromptOutput(self, tokens, text, of_ids or text is None, first_index)
        self._prompts += 1
        self._open_choices += self.options.choices
        self.usage.prompt_tokens += len(tokens)
        return output

    @property
    def ended(self) -> bool:
        return self.left or self.error is not None or self._open_choices == 0

    def count(self, tokens: int) -> None:
        """Tokens that a choice was made of; what was generated past its end is nobody's."""
        self.usage.completion_tokens += tokens
        self.metrics.generation_tokens += tokens

    def choice_ended(self) -> None:
        if self._open_choices == 1:
            self.builder.close(self.usage)  # first: an answer that cannot be closed has not ended well
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


class PromptOutput:
    """What one prompt's attempt reports to (`router.routing.attempt.Output`)."""

    __slots__ = (
        "_annotates",
        "_builder",
        "_call",
        "_choices",
        "_echoed",
        "_first_index",
        "_muted",
        "_prompt",
        "_special",
    )

    def __init__(
        self, call: Call, prompt: list[int], text: str | None, of_ids: bool, first_index: int
    ) -> None:
        options = call.options
        self._call, self._builder = call, call.builder
        self._prompt, self._first_index = prompt, first_index
        self._special = of_ids
        """Special tokens are part of an echo that was given as token ids."""
        self._muted = options.max_tokens == 0
        echo = (call.tokenizer.decode(prompt) if text is None else text) if options.echo else ""
        ids = prompt if options.token_ids else None
        rendered = text if options.prompt_text else None
        self._echoed = [Echo(echo, token_ids=ids, prompt_text=rendered) for _ in range(options.choices)]
        self._annotates = options.stream and (
            options.token_ids or options.prompt_text or options.continuous_usage
        )
        continuation = call.tokenizer.continuation(prompt)
        self._choices = [
            Choice(
                continuation.detokenizer(echoed.take_back),
                options.stops,
                options.include_stop,
                options.logprobs is not None,
                call.builder.writer(first_index + index, echoed),
            )
            for index, echoed in enumerate(self._echoed)
        ]

    def on_prefilled(self, report: PrefillDone) -> None:
        self._call.usage.cached_tokens += report.cached_tokens
        options = self._call.options
        if options.echo and options.logprobs is not None and report.prompt_logprobs is not None:
            logprobs = prompt_logprobs(
                self._prompt, report.prompt_logprobs, self._call.tokenizer, options.logprobs, self._special
            )
            for echoed in self._echoed:
                echoed.logprobs = logprobs

    def on_tokens(self, report: Tokens, now_s: float) -> bool:
        choice = self._choices[report.choice]
        last_s = choice.last_token_s
        if last_s is not None:
            self._call.metrics.inter_token.observe(now_s - last_s)
        choice.last_token_s = now_s
        before, frames = choice.token_count, len(self._builder.frames)
        going_on = False
        if self._muted:
            choice.mute()
        else:
            going_on = choice.push(report)
        taken = choice.token_count - before
        self._call.count(taken)
        index = self._first_index + report.choice
        if self._call.options.token_ids:
            self._builder.note_tokens(index, report.tokens[:taken])
        if self._annotates:
            self._builder.annotate(frames, index, self._call.usage)
        if not going_on:
            self._call.choice_ended()
        elif self._builder.frames:
            if len(self._builder.frames) > MAX_UNSENT_FRAMES:
                self._call.fail(ApiError(408, "The client reads too slowly.", code="client_too_slow"))
                return False
            self._call.wake()
        return going_on

    def on_failed(self, error: ApiError) -> None:
        self._call.fail(error)
