"""The two endpoints that generate: from a body to flights, and from their frames to the response.

1. The body is read (bounded), decoded and checked; the prompt is rendered and tokenized.
2. One flight for each prompt is sent off; a watch ends them if the client goes away or time is up.
3. The response begins with the first result, so that a failure before it still has its own status.
4. Frames are written as they come, all that are ready in one write.
5. However it ends, flights that still run are cancelled.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from router.answers import Heading, Sheet, StreamSheet, WholeSheet
from router.bodies import BodyDecoder, ChatBody, CompletionBody
from router.call import Call
from router.chat_prompt import chat_prompt
from router.config import RouterConfig
from router.dispatch import Dispatcher
from router.errors import ApiError, crashed
from router.formats import frame
from router.generation_config import SamplingDefaults
from router.http import EVENT_STREAM, ClientGone, Receive, Response, Scope, Send, label_of, read_body
from router.ids import draw_name, draw_number
from router.metrics import Metrics
from router.migration import Journey
from router.orders import Order
from router.parameters import (
    PLAIN_SAMPLING,
    Limits,
    Options,
    check_model,
    check_tokens,
    check_total_choices,
    options_of,
    prompts_of,
    sampling_for,
)
from router.template import ChatTemplate
from router.tokenizer import TextTokenizer

WATCH_AFTER_S = 0.02
_STREAM_HEADERS = (
    (b"content-type", EVENT_STREAM),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
    (b"x-should-retry", b"false"),
)


def salt_of(api_key: str | None) -> bytes:
    """Keeps tenants' prefix caches apart; empty without keys."""
    return b"" if not api_key else hashlib.sha256(b"baton tenant\0" + api_key.encode()).digest()


def cache_salt_of(tenant: bytes, own: bytes) -> bytes:
    """A request's own prefix cache within its tenant's, where it asks for one."""
    return hashlib.sha256(b"baton cache salt\0" + tenant + b"\0" + own).digest() if own else tenant


def outcome_of(error: ApiError) -> str:
    """The `outcome` label of `baton_requests_total`."""
    names = {429: "overloaded", 503: "unavailable", 504: "deadline", 500: "failed"}
    return names.get(error.status, "invalid" if error.status < 500 else "failed")


@dataclass(frozen=True, slots=True)
class Service:
    """What the endpoints work with; made once at start."""

    config: RouterConfig
    tokenizer: TextTokenizer
    template: ChatTemplate
    dispatcher: Dispatcher
    metrics: Metrics
    bodies: BodyDecoder
    draw_seed: Callable[[], int] = draw_number
    defaults: SamplingDefaults = PLAIN_SAMPLING

    def limits(self) -> Limits:
        """Raises ApiError 503 while no worker has said what it can take."""
        limits = self.dispatcher.limits()
        if limits is None:
            raise self.dispatcher.unavailable("No workers are connected.", "no_workers")
        return limits


class GenerateEndpoint:
    """`/v1/completions` and, with `chat`, `/v1/chat/completions`."""

    def __init__(self, service: Service, chat: bool) -> None:
        self._service, self._chat = service, chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outcome = "failed"
        response = Response(scope, send)
        try:
            config = self._service.config
            raw = await read_body(scope, receive, config.max_body_bytes, config.upload_timeout_s)
            outcome = await self._answer(raw, scope, receive, response)
        except ApiError as error:
            # A call keeps its error, whose traceback would keep the call.
            error.with_traceback(None)
            outcome = outcome_of(error)
            await response.error(error)
        except ClientGone:
            outcome = "disconnected"
        except Exception:
            if not response.begun:
                await response.error(crashed())
            raise  # uvicorn logs it and closes the connection
        finally:
            self._service.metrics.count_outcome(outcome)

    async def _answer(self, raw: bytes, scope: Scope, receive: Receive, response: Response) -> str:
        """Returns the outcome. Raises ApiError while nothing was sent, ClientGone."""
        key: str | None = scope.get("baton.api_key")
        call, orders = await self._prepare(raw, salt_of(key))
        dispatcher = self._service.dispatcher
        journeys: list[Journey] = dispatcher.submit(orders)
        label: bytes = scope["baton.label"]
        # A journey whose worker could not be written to may have ended already.
        departed = [leg.flight for journey in journeys for leg in journey.legs if leg.flight is not None]
        dispatcher.traces.remember(key, label.decode(), departed, dispatcher.fleet.name_of)
        watch = _Watch(dispatcher, journeys, self._service.config.request_timeout_s, receive, call)
        try:
            if call.options.stream:
                await _stream(call, response)
            else:
                await _whole(call, response)
        finally:
            watch.cancel()
            dispatcher.end(journeys)
        return "completed" if call.error is None else outcome_of(call.error)

    async def _prepare(self, raw: bytes, salt: bytes) -> tuple[Call, list[Order]]:
        service = self._service
        body: ChatBody | CompletionBody
        if self._chat:
            body = service.bodies.decode(ChatBody, raw)
        else:
            body = service.bodies.decode(CompletionBody, raw)
        check_model(body.model, service.config.served_model_name)
        limits = service.limits()
        options = options_of(body, limits, service.draw_seed(), service.defaults)
        prompts: list[tuple[list[int], str | None]] = []
        param = "messages" if isinstance(body, ChatBody) else "prompt"
        if isinstance(body, ChatBody):
            text = chat_prompt(service.template, body, body.messages)
            prompts.append((await service.tokenizer.encode(text, bool(body.add_special_tokens)), text))
        else:
            given = prompts_of(body, limits)
            check_total_choices(len(given), options.choices, limits)
            special = body.add_special_tokens is not False
            for prompt in given:
                if isinstance(prompt, str):
                    tokens = await service.tokenizer.encode(prompt, special) if prompt else []
                    prompts.append((tokens, prompt))
                else:
                    prompts.append((prompt, None))
        call = Call(options, self._sheet(options), service.tokenizer, service.metrics)
        salt = cache_salt_of(salt, options.cache_salt)
        orders: list[Order] = []
        for tokens, text_or_none in prompts:
            size = None if text_or_none is None else service.tokenizer.size
            check_tokens(tokens, limits.vocab_size, param, size)
            sampling = sampling_for(options, len(tokens), limits, param)
            output = call.add_prompt(tokens, text_or_none)
            orders.append(Order(tokens, sampling, options.choices, salt, output))
        return call, orders

    def _sheet(self, options: Options) -> Sheet:
        name = label_of(options.label.encode()) if options.label else draw_name()
        answer_id = ("chatcmpl-" if self._chat else "cmpl-") + name
        heading = Heading(answer_id, int(time.time()), self._service.config.served_model_name)
        if options.stream:
            return StreamSheet(
                heading,
                self._service.tokenizer,
                self._chat,
                options.logprobs,
                options.include_usage,
                options.continuous_usage,
            )
        return WholeSheet(heading, self._service.tokenizer, self._chat, options.logprobs)


class _Watch:
    """Ends a call when its client goes away or its time is up; until `cancel`.

    One timer does for a short call: only after `WATCH_AFTER_S` a task begins to listen for the client's end.
    """

    def __init__(
        self, dispatcher: Dispatcher, journeys: list[Journey], timeout_s: float, receive: Receive, call: Call
    ) -> None:
        self._dispatcher, self._journeys, self._timeout_s = dispatcher, journeys, timeout_s
        self._receive, self._call = receive, call
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        first_s = min(WATCH_AFTER_S, timeout_s)
        self._timer = self._loop.call_later(first_s, self._begin, timeout_s - first_s)

    def cancel(self) -> None:
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def _begin(self, left_s: float) -> None:
        self._task = self._loop.create_task(self._until_gone())
        self._timer = self._loop.call_later(left_s, self._expire)

    async def _until_gone(self) -> None:
        # Anything else that the client sends now is of no interest.
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._call.leave()

    def _expire(self) -> None:
        error = ApiError(
            504,
            f"The request was not done within {self._timeout_s:g} s.",
            code="deadline_exceeded",
            committed=any(journey.times.first_token_s is not None for journey in self._journeys),
        )
        self._dispatcher.end(self._journeys, error)


async def _whole(call: Call, response: Response) -> None:
    await call.wait()
    if call.left:
        raise ClientGone
    if call.error is not None:
        raise call.error
    await response.whole(200, call.sheet.body(call.usage))


async def _stream(call: Call, response: Response) -> None:
    await call.wait()
    if call.error is not None and not call.sheet.frames:
        raise call.error
    if call.left:
        raise ClientGone
    await response.begin(200, _STREAM_HEADERS)
    while True:
        ended = call.ended
        if call.left:
            raise ClientGone
        body = call.take_frames()
        if ended and call.error is not None:
            # No [DONE] follows: the stream did not come to its end.
            body += frame(call.error.body())
        await response.part(body, last=ended)
        if ended:
            return
        await call.wait()
