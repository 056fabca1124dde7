"""The two endpoints that generate: from a body to routed requests, and from their frames to the response.

1. The body is read (bounded); the time limit begins. Then it is decoded and checked, and the prompt rendered
   and tokenized (prepare/request.py): a small one here, others in a process beside the event loop.
2. Each prompt becomes a routed request (`Dispatcher.submit`); a watch ends them if the client goes away or
   time is up.
3. The response begins with the first result, so that a failure before it still has its own status.
4. Frames are written as they come, all that are ready in one write.
5. However it ends, requests that still run are cancelled.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from router.api.asgi import (
    EVENT_STREAM,
    Body,
    ClientGone,
    Receive,
    Response,
    Scope,
    Send,
    attended,
    label_of,
    overdue,
    read_body,
    until_gone,
)
from router.api.call import Call, ResponseBuilder
from router.api.openai_format import frame
from router.api.responses import ResponseHeader, StreamBuilder, WholeBuilder
from router.config import RouterConfig
from router.errors import ApiError, crashed
from router.ids import draw_name, draw_number
from router.prepare.generation_config import SamplingDefaults
from router.prepare.parameters import PLAIN_SAMPLING, Options, sampling_for
from router.prepare.process_pool import ProcessPool
from router.prepare.request import (
    BESIDE_BYTES,
    Kind,
    Kit,
    PreparedRequest,
    PrepareInput,
    TooMuchHere,
    prepare,
)
from router.routing.attempt import AttemptPhase
from router.routing.dispatcher import Dispatcher
from router.routing.limits import RequestLimits
from router.routing.metrics import Metrics
from router.routing.routed_request import PromptRequest, RoutedRequest

WATCH_AFTER_S = 0.02
TOKENS_A_TURN = 1 << 15
"""Of prompts that are submitted in one turn of the event loop."""
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
    """What the endpoints work with; made once at start. `kit` is for what is small enough to be prepared in
    the event loop, `beside` for the rest."""

    config: RouterConfig
    kit: Kit
    beside: ProcessPool
    dispatcher: Dispatcher
    metrics: Metrics
    draw_seed: Callable[[], int] = draw_number
    defaults: SamplingDefaults = PLAIN_SAMPLING

    def limits(self) -> RequestLimits:
        """Raises ApiError 503 while no worker has said what it can take."""
        limits = self.dispatcher.limits()
        if limits is None:
            raise self.dispatcher.unavailable("No workers are connected.", "no_workers")
        return limits

    async def prepare(self, kind: Kind, raw: Body, receive: Receive) -> PreparedRequest | list[bytes]:
        """A whole answer comes in pieces. Raises ApiError, ClientGone."""
        config = self.config
        limits, seed = self.dispatcher.limits(), self.draw_seed()
        ask = PrepareInput(kind, limits, seed, config.retry_after_s, self.defaults)
        if len(raw) <= BESIDE_BYTES:
            try:
                made = prepare(self.kit, ask, raw)
                return made if isinstance(made, PreparedRequest) else [made]
            except TooMuchHere as signal:
                signal.with_traceback(None)
        timeout_s = config.request_timeout_s
        return await attended(self.beside.prepare(ask, raw), receive, timeout_s, timeout_s)


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

    async def _answer(self, raw: Body, scope: Scope, receive: Receive, response: Response) -> str:
        """Returns the outcome. Raises ApiError while nothing was sent, ClientGone."""
        key: str | None = scope.get("baton.api_key")
        service = self._service
        clock, timeout_s = asyncio.get_running_loop().time, service.config.request_timeout_s
        end_s = clock() + timeout_s
        prepared = await service.prepare("chat" if self._chat else "completions", raw, receive)
        if not isinstance(prepared, PreparedRequest):
            raise TypeError("an answer in place of prompts")
        call, prompt_requests = self._prompt_requests(prepared, salt_of(key))
        dispatcher = service.dispatcher
        routed_requests = await _submit(dispatcher, prompt_requests)
        watch = _Watch(dispatcher, routed_requests, timeout_s, max(end_s - clock(), 0.0), receive, call)
        try:
            label: bytes = scope["baton.label"]
            # A request whose worker could not be written to may have ended already.
            started = [
                attempt
                for routed in routed_requests
                for attempt in routed.attempts
                if attempt.phase is not AttemptPhase.QUEUED
            ]
            dispatcher.traces.remember(key, label.decode(), started, dispatcher.worker_pool.name_of)
            if call.options.stream:
                await _stream(call, response)
            else:
                await _whole(call, response)
        finally:
            watch.cancel()
            dispatcher.end(routed_requests)
        return "completed" if call.error is None else outcome_of(call.error)

    def _prompt_requests(self, prepared: PreparedRequest, salt: bytes) -> tuple[Call, list[PromptRequest]]:
        service, options = self._service, prepared.options
        limits = service.limits()
        call = Call(options, self._builder(options), service.kit.tokenizer, service.metrics)
        salt = cache_salt_of(salt, options.cache_salt)
        prompt_requests: list[PromptRequest] = []
        for prompt in prepared.prompts:
            sampling = sampling_for(
                options, len(prompt.tokens), limits, "messages" if self._chat else "prompt"
            )
            output = call.add_prompt(prompt.tokens, prompt.text, prompt.of_ids)
            prompt_requests.append(PromptRequest(prompt.tokens, sampling, options.choices, salt, output))
        return call, prompt_requests

    def _builder(self, options: Options) -> ResponseBuilder:
        name = label_of(options.label.encode()) if options.label else draw_name()
        answer_id = ("chatcmpl-" if self._chat else "cmpl-") + name
        header = ResponseHeader(answer_id, int(time.time()), self._service.config.served_model_name)
        if options.stream:
            return StreamBuilder(
                header,
                self._service.kit.tokenizer,
                self._chat,
                options.logprobs,
                options.include_usage,
                options.continuous_usage,
            )
        return WholeBuilder(header, self._service.kit.tokenizer, self._chat, options.logprobs)


class _Watch:
    """Ends a call when its client goes away or its time is up; until `cancel`.

    One timer does for a short call: only after `WATCH_AFTER_S` a task begins to listen for the client's end.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        routed_requests: list[RoutedRequest],
        limit_s: float,
        left_s: float,
        receive: Receive,
        call: Call,
    ) -> None:
        """`left_s` of the request's `limit_s` are left."""
        self._dispatcher, self._routed_requests, self._limit_s = dispatcher, routed_requests, limit_s
        self._receive, self._call = receive, call
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        first_s = min(WATCH_AFTER_S, left_s)
        self._timer = self._loop.call_later(first_s, self._begin, left_s - first_s)

    def cancel(self) -> None:
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def _begin(self, left_s: float) -> None:
        self._task = self._loop.create_task(self._until_gone())
        self._timer = self._loop.call_later(left_s, self._expire)

    async def _until_gone(self) -> None:
        await until_gone(self._receive)
        self._call.leave()

    def _expire(self) -> None:
        begun = any(routed.times.first_token_s is not None for routed in self._routed_requests)
        self._dispatcher.end(self._routed_requests, overdue(self._limit_s, committed=begun))


async def _submit(dispatcher: Dispatcher, prompt_requests: list[PromptRequest]) -> list[RoutedRequest]:
    """Submits the prompts, so many in a turn that no other request waits long. Raises ApiError with none
    under way."""
    dispatcher.check_open(len(prompt_requests))
    routed_requests: list[RoutedRequest] = []
    first, tokens = 0, 0
    try:
        for index, prompt_request in enumerate(prompt_requests, 1):
            tokens += len(prompt_request.prompt)
            if index == len(prompt_requests) or tokens >= TOKENS_A_TURN:
                routed_requests += dispatcher.submit(prompt_requests[first:index])
                first, tokens = index, 0
                if index < len(prompt_requests):
                    await asyncio.sleep(0)
    except BaseException:
        dispatcher.end(routed_requests)
        raise
    return routed_requests


async def _whole(call: Call, response: Response) -> None:
    await call.wait()
    if call.left:
        raise ClientGone
    if call.error is not None:
        raise call.error
    await response.whole(200, call.builder.body(call.usage))


async def _stream(call: Call, response: Response) -> None:
    await call.wait()
    if call.error is not None and not call.builder.frames:
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
