"""When what happened to a request: what the router remembers of the latest ones, and what its workers say.

A request is found by its label (`x-request-id`) among those that came with the same API key. Times are
seconds of the router's clock from the moment it sent the prompt off. A worker's clock is compared with the
router's by the question and its answer: on one host they are the same clock, which the comparison shows;
between hosts they are only known as well as half of the time between the two.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from msgspec import Struct

from router.errors import ApiError
from router.routing.attempt import Attempt, Times
from services.protocol.messages import Request, TraceReply, TraceRequest, TraceSpan

MAX_LABELS = 1024
MAX_PROMPTS = 16
"""Of one label: a request may have many prompts, and a client may use a label again."""
ANSWER_S = 2.0


class ProcessTrace(Struct, frozen=True):
    """`offset_s` was added to the times of this process to make them the router's; it may be off by
    `error_s`. Both are 0 where the two have one clock."""

    process: str
    offset_s: float
    error_s: float
    spans: list[TraceSpan]


class PromptTrace(Struct, frozen=True):
    """One prompt. `missing` processes did not answer; times are None for what has not happened."""

    prompt_tokens: int
    prefill: str | None
    decode: str
    first_token_s: float | None
    decode_started_s: float | None
    ended_s: float | None
    processes: list[ProcessTrace]
    missing: list[str]


class RequestTrace(Struct, frozen=True):
    id: str
    prompts: list[PromptTrace]


class _Known(Struct, frozen=True):
    request_id: int
    transfer_id: int
    prompt_tokens: int
    workers: dict[str, str]
    """Endpoint and name of each worker that has a part in the transfer."""
    prefill: str | None
    decode: str
    times: Times


@dataclass(slots=True)
class _Question:
    """`sent_s` is when it left; `waits` are the processes that have not answered."""

    sent_s: float
    waits: set[str]
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    replies: list[tuple[float, TraceReply]] = field(default_factory=list)


class Traces:
    """`send(endpoint, messages)` is False for a worker that cannot be asked."""

    def __init__(self, send: Callable[[str, list[Request]], bool], clock: Callable[[], float]) -> None:
        self._send, self._clock = send, clock
        self._known: OrderedDict[tuple[str | None, str], list[_Known]] = OrderedDict()
        self._questions: dict[int, _Question] = {}
        self._asked = 0

    def remember(
        self, owner: str | None, label: str, attempts: Sequence[Attempt], names: Callable[[str], str]
    ) -> None:
        """The prompts of a request that has just been sent off; `owner` is its API key, `names` a worker's
        own name by its endpoint."""
        known = self._known.setdefault((owner, label), [])
        self._known.move_to_end((owner, label))
        for attempt in attempts:
            parts = [] if attempt.prefill is None else [attempt.prefill, attempt.decode]
            known.append(
                _Known(
                    attempt.work.request_id,
                    attempt.transfer_id,
                    len(attempt.work.prompt),
                    {endpoint: names(endpoint) for endpoint in parts},
                    None if attempt.prefill is None else names(attempt.prefill),
                    names(attempt.decode),
                    attempt.times,
                )
            )
        del known[:-MAX_PROMPTS]
        if len(self._known) > MAX_LABELS:
            self._known.popitem(last=False)

    def on_reply(self, reply: TraceReply) -> None:
        question = self._questions.get(reply.ask_id)
        if question is None or reply.process not in question.waits:
            return
        question.waits.discard(reply.process)
        question.replies.append((self._clock(), reply))
        if not question.waits:
            question.answered.set()

    async def trace(self, owner: str | None, label: str) -> RequestTrace:
        """Raises ApiError 404 for a label that is not known (any more)."""
        known = self._known.get((owner, label))
        if known is None:
            raise ApiError(404, f"No request {label!r} is remembered.", code="not_found")
        return RequestTrace(label, [await self._trace(one) for one in list(known)])

    async def _trace(self, known: _Known) -> PromptTrace:
        processes, missing = await self._ask(known)
        times, zero_s = known.times, known.times.submitted_s

        def since(at_s: float | None) -> float | None:
            return None if at_s is None else at_s - zero_s

        return PromptTrace(
            prompt_tokens=known.prompt_tokens,
            prefill=known.prefill,
            decode=known.decode,
            first_token_s=since(times.first_token_s),
            decode_started_s=since(times.decode_started_s),
            ended_s=since(times.ended_s),
            processes=processes,
            missing=missing,
        )

    async def _ask(self, known: _Known) -> tuple[list[ProcessTrace], list[str]]:
        self._asked += 1
        ask_id = self._asked
        waits = {process for name in known.workers.values() for process in (name, f"{name}/transfer")}
        question = _Question(self._clock(), set(waits))
        self._questions[ask_id] = question
        request = TraceRequest(ask_id, known.request_id, known.transfer_id)
        waiter = asyncio.ensure_future(question.answered.wait())
        try:
            reached = [self._send(endpoint, [request]) for endpoint in known.workers]
            if any(reached):
                await asyncio.wait([waiter], timeout=ANSWER_S)  # what has not answered is named as missing
        finally:
            waiter.cancel()
            del self._questions[ask_id]
        zero_s = known.times.submitted_s
        found = [process_trace(question.sent_s, at_s, reply, zero_s) for at_s, reply in question.replies]
        return sorted(found, key=lambda one: one.process), sorted(question.waits)


def process_trace(sent_s: float, received_s: float, reply: TraceReply, zero_s: float) -> ProcessTrace:
    """A reply's spans in seconds after `zero_s` of the router's clock, by which the question was sent at
    `sent_s` and answered at `received_s`."""
    offset_s = (sent_s + received_s) / 2 - reply.clock_s
    error_s = (received_s - sent_s) / 2
    if abs(offset_s) <= error_s:  # the same clock, as far as can be seen
        offset_s = error_s = 0.0
    shift_s = offset_s - zero_s
    spans = [
        TraceSpan(one.stage, one.start_token, one.token_count, one.start_s + shift_s, one.end_s + shift_s)
        for one in reply.spans
    ]
    return ProcessTrace(reply.process, offset_s, error_s, spans)
