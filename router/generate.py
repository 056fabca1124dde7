"""The two endpoints that generate: from a body to flights, and from their frames to the response.

1. The body is read (bounded), decoded and checked; the prompt is rendered and tokenized.
2. One flight for each prompt is sent off; a task watches for the client to go away.
3. The response begins with the first result, so that a failure before it still has its own status.
4. Frames are written as they come, all that are ready in one write.
5. However it ends, flights that still run are cancelled.
"""

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from router.answers import Heading, Sheet, StreamSheet, WholeSheet
from router.bodies import BodyDecoder, ChatBody, CompletionBody, template_messages
from router.call import Call
from router.config import RouterConfig
from router.dispatch import Dispatcher, Order
from router.errors import ApiError
from router.formats import frame
from router.http import EVENT_STREAM, ClientGone, Receive, Scope, Send, read_body, send_error, send_whole
from router.metrics import Metrics
from router.parameters import (
    Limits,
    Options,
    check_model,
    check_tokens,
    check_total_choices,
    options_of,
    prompts_of,
    sampling_for,
)
from router.requests import Flight
from router.template import ChatTemplate
from router.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)


def salt_of(api_key: str | None) -> bytes:
    """Keeps tenants' prefix caches apart; empty without keys."""
    return b"" if not api_key else hashlib.sha256(b"baton tenant\0" + api_key.encode()).digest()


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
    draw_seed: Callable[[], int] = lambda: secrets.randbits(62)

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
        # What stays if something unexpected goes through here, to be answered with 500 further out.
        outcome = "failed"
        try:
            raw = await read_body(scope, receive, self._service.config.max_body_bytes)
            outcome = await self._answer(raw, salt_of(scope.get("baton.api_key")), receive, send)
        except ApiError as error:
            outcome = outcome_of(error)
            await send_error(send, error)
        except ClientGone:
            outcome = "disconnected"
        finally:
            self._service.metrics.count_outcome(outcome)

    async def _answer(self, raw: bytes, salt: bytes, receive: Receive, send: Send) -> str:
        """Returns the outcome. Raises ApiError while nothing was sent, ClientGone."""
        call, orders = await self._prepare(raw, salt)
        dispatcher = self._service.dispatcher
        flights: list[Flight] = dispatcher.submit(orders)
        loop = asyncio.get_running_loop()
        gone = loop.create_task(_watch(receive, call))
        timeout_s = self._service.config.request_timeout_s
        deadline = loop.call_later(timeout_s, _expire, dispatcher, flights, timeout_s)
        try:
            if call.options.stream:
                await _stream(call, send)
            else:
                await _whole(call, send)
        finally:
            deadline.cancel()
            dispatcher.end(flights)
            gone.cancel()
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
        options = options_of(body, limits, service.draw_seed())
        prompts: list[tuple[list[int], str | None]] = []
        param = "messages" if isinstance(body, ChatBody) else "prompt"
        if isinstance(body, ChatBody):
            text = service.template.render(
                template_messages(body.messages),
                body.add_generation_prompt is not False,
                body.chat_template_kwargs,
            )
            prompts.append((await service.tokenizer.encode(text, add_special_tokens=False), None))
        else:
            given = prompts_of(body, limits)
            check_total_choices(len(given), options.choices, limits)
            for prompt in given:
                if isinstance(prompt, str):
                    tokens = await service.tokenizer.encode(prompt, add_special_tokens=True) if prompt else []
                    prompts.append((tokens, prompt))
                else:
                    prompts.append((prompt, None))
        call = Call(options, self._sheet(options), service.tokenizer, service.metrics)
        orders: list[Order] = []
        for tokens, text_or_none in prompts:
            check_tokens(tokens, limits.vocab_size, param)
            sampling = sampling_for(options, len(tokens), limits, param)
            output = call.add_prompt(tokens, text_or_none)
            orders.append(Order(tokens, sampling, options.choices, salt, output))
        return call, orders

    def _sheet(self, options: Options) -> Sheet:
        answer_id = ("chatcmpl-" if self._chat else "cmpl-") + secrets.token_hex(12)
        heading = Heading(answer_id, int(time.time()), self._service.config.served_model_name)
        if options.stream:
            return StreamSheet(
                heading, self._service.tokenizer, self._chat, options.logprobs, options.include_usage
            )
        return WholeSheet(heading, self._service.tokenizer, self._chat, options.logprobs)


async def _watch(receive: Receive, call: Call) -> None:
    """Ends the call when the client goes away; anything else it sends now is of no interest."""
    while (await receive())["type"] != "http.disconnect":
        pass
    call.leave()


def _expire(dispatcher: Dispatcher, flights: list[Flight], timeout_s: float) -> None:
    committed = any(flight.times.first_token_s is not None for flight in flights)
    error = ApiError(
        504,
        f"The request was not done within {timeout_s:g} s.",
        code="deadline_exceeded",
        committed=committed,
    )
    dispatcher.end(flights, error)


async def _whole(call: Call, send: Send) -> None:
    await call.wait()
    if call.left:
        raise ClientGone
    if call.error is not None:
        raise call.error
    await send_whole(send, 200, call.sheet.body(call.usage))


async def _stream(call: Call, send: Send) -> None:
    await call.wait()
    if call.error is not None and not call.sheet.frames:
        raise call.error
    headers = [
        (b"content-type", EVENT_STREAM),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    ]
    headers.append((b"x-should-retry", b"false"))
    if call.left:
        raise ClientGone
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    while True:
        ended = call.ended
        if call.left:
            raise ClientGone
        body = call.take_frames()
        if ended and call.error is not None:
            # No [DONE] follows: the stream did not come to its end.
            body += frame(call.error.body())
        await send({"type": "http.response.body", "body": body, "more_body": not ended})
        if ended:
            return
        await call.wait()
