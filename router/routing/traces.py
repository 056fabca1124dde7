"""Traces of the latest requests: the router's own times, and the spans that workers report when asked.

The router finds a request by its label (`x-request-id`) among those that came with the same API key. Times
are seconds of the router's clock after it sent the prompt to its workers. The router compares a worker's
clock with its own by the time at which it asked and that at which the reply came: on one host both have the
same clock, which the comparison shows; between hosts the offset is known to half of the time between the two.
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
    """The spans of one worker or transfer process. The router added `offset_s`, which may be off by
    `error_s`, to the times of its clock; both are 0 where the two have one clock."""

    process: str
    offset_s: float
    error_s: float
    spans: list[TraceSpan]


class PromptTrace(Struct, frozen=True):
    """The trace of one prompt. `missing` processes did not reply; times are None for what has not
    happened."""

    prompt_tokens: int
    prefill: str | None
    decode: str
    first_token_s: float | None
    decode_started_s: float | None
    ended_s: float | None
    processes: list[ProcessTrace]
    missing: list[str]


class RequestTrace(Struct, frozen=True):
    """The body of `/trace/{id}`: the traces of a label's prompts."""

    id: str
    prompts: list[PromptTrace]


class _TracedPrompt(Struct, frozen=True):
    """What the router remembers of a prompt: enough to ask its workers."""

    request_id: int
    transfer_id: int
    prompt_tokens: int
    workers: dict[str, str]
    """The name of each worker that takes part in the transfer, by its endpoint."""
    prefill: str | None
    decode: str
    times: Times


@dataclass(slots=True)
class _PendingQuery:
    """A `TraceRequest` that was sent at `sent_s`; the processes in `unanswered` have not replied yet."""

    sent_s: float
    unanswered: set[str]
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    replies: list[tuple[float, TraceReply]] = field(default_factory=list)


class Traces:
    """The prompts that can be traced, at most `MAX_LABELS` labels, and the queries that are open.

    `send(endpoint, messages)` is False for a worker that cannot be reached.
    """

    def __init__(self, send: Callable[[str, list[Request]], bool], clock: Callable[[], float]) -> None:
        self._send, self._clock = send, clock
        self._known: OrderedDict[tuple[str | None, str], list[_TracedPrompt]] = OrderedDict()
        self._queries: dict[int, _PendingQuery] = {}
        self._last_ask_id = 0

    def remember(
        self, owner: str | None, label: str, attempts: Sequence[Attempt], names: Callable[[str], str]
    ) -> None:
        """Keeps the prompts of a request that was just sent to its workers. `owner` is the request's API key;
        `names` gives a worker's name by its endpoint."""
        known = self._known.setdefault((owner, label), [])
        self._known.move_to_end((owner, label))
        for attempt in attempts:
            parts = [] if attempt.prefill is None else [attempt.prefill, attempt.decode]
            known.append(
                _TracedPrompt(
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
        """A process has replied; replies to no open query are ignored."""
        query = self._queries.get(reply.ask_id)
        if query is None or reply.process not in query.unanswered:
            return
        query.unanswered.discard(reply.process)
        query.replies.append((self._clock(), reply))
        if not query.unanswered:
            query.answered.set()

    async def trace(self, owner: str | None, label: str) -> RequestTrace:
        """Asks the workers of the label's prompts. Raises ApiError 404 for a label that is not known (any
        more)."""
        known = self._known.get((owner, label))
        if known is None:
            raise ApiError(404, f"No request {label!r} is remembered.", code="not_found")
        return RequestTrace(label, [await self._trace(one) for one in list(known)])

    async def _trace(self, known: _TracedPrompt) -> PromptTrace:
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

    async def _ask(self, known: _TracedPrompt) -> tuple[list[ProcessTrace], list[str]]:
        """The traces of the processes that reply within `ANSWER_S`, and the names of those that do not."""
        self._last_ask_id += 1
        ask_id = self._last_ask_id
        processes = {process for name in known.workers.values() for process in (name, f"{name}/transfer")}
        query = _PendingQuery(self._clock(), processes)
        self._queries[ask_id] = query
        request = TraceRequest(ask_id, known.request_id, known.transfer_id)
        waiter = asyncio.ensure_future(query.answered.wait())
        try:
            reached = [self._send(endpoint, [request]) for endpoint in known.workers]
            if any(reached):
                await asyncio.wait([waiter], timeout=ANSWER_S)
        finally:
            waiter.cancel()
            del self._queries[ask_id]
        zero_s = known.times.submitted_s
        found = [process_trace(query.sent_s, at_s, reply, zero_s) for at_s, reply in query.replies]
        return sorted(found, key=lambda one: one.process), sorted(query.unanswered)


def process_trace(sent_s: float, received_s: float, reply: TraceReply, zero_s: float) -> ProcessTrace:
    """A reply's spans in seconds after `zero_s` of the router's clock. By the same clock the router sent the
    query at `sent_s` and had the reply at `received_s`."""
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
