"""What every role of a worker shares: taking requests in, running a step, ending requests.

A role is policy over one engine, one page pool and one transfer client. It is driven by the worker's
loop: `accept` for each message of a router, `on_transfer` for each event of the transfer process, `step`
once a turn. All of them run on the loop's only thread.
"""

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from kvtransfer.client import WorkerEvent
from kvtransfer.messages import WITHDRAWN
from kvtransfer.spans import Spans
from services.engine.batch import RowResult, SampledToken
from services.engine.engine import Engine
from services.engine.launched import Launched
from services.isolation import contain
from services.protocol.messages import (
    Cancel,
    Failed,
    FailureCode,
    PrefillDone,
    Request,
    SequenceRequest,
    Tokens,
)
from services.roles.engine_rows import rows_of, wants_prompt_logprobs
from services.roles.limits import WorkerLimits, finish_reason, refuse
from services.roles.report_queue import ReportQueue
from services.roles.running_requests import Requests, RunningRequest
from services.scheduler.chunks import DEFAULT_TAIL_TOKENS
from services.scheduler.pages import PagePool
from services.scheduler.sequence import Chunk, Sequence, State, StepPlan
from services.scheduler.step_deadline import StepDeadline
from services.scheduler.step_time import StepShape

log = logging.getLogger(__name__)

ENGINE_FAILURES = (RuntimeError, ValueError, IndexError)


@dataclass(slots=True, eq=False)
class WorkerContext:
    """What the worker built at start and its role works with."""

    engine: Engine
    pool: PagePool
    limits: WorkerLimits
    max_chunk_tokens: int
    outbox: ReportQueue
    clock: Callable[[], float]
    overlap: bool
    """Whether the engine's steps run on while the host plans the next one."""
    tail_chunk_tokens: int = DEFAULT_TAIL_TOKENS
    deadline: StepDeadline = field(default_factory=StepDeadline)
    """Of the roles that decode; its model is fed whether there is a limit or not."""
    requests: Requests = field(default_factory=Requests)
    counters: Counter[str] = field(default_factory=Counter)
    spans: Spans = field(default_factory=Spans)


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Requests by where they are; all zero at rest."""

    queued: int = 0
    running: int = 0
    reserved: int = 0
    holding: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class InFlightStep:
    """A step on its way: its launch began at `begun_s`, and the engine had it at `launched_s`."""

    plan: StepPlan
    launched: Launched
    begun_s: float
    launched_s: float
    shape: StepShape


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step sampled, in the plan's order."""

    decodes: list[tuple[Sequence, SampledToken]]
    chunks: list[tuple[Chunk, RowResult]]


class Role(ABC):
    def __init__(self, context: WorkerContext) -> None:
        self.context = context

    # ------------------------------------------------------------ driven by the loop

    @abstractmethod
    def accept(self, router: bytes, request: Request) -> None:
        """A request's message; one that is not for this role is counted."""

    @abstractmethod
    def on_transfer(self, event: WorkerEvent) -> None: ...

    @abstractmethod
    def step(self) -> bool:
        """One engine step, and what it makes possible; False if there was nothing to do."""

    @property
    def in_flight(self) -> bool:
        """Whether a step was launched whose results have not been taken."""
        return False

    @abstractmethod
    def occupancy(self) -> Occupancy: ...

    @abstractmethod
    def preemptions(self) -> int:
        """How often a running choice had to give up its pages."""

    @abstractmethod
    def spoil(self, sequence: Sequence, position: int) -> list[Sequence]:
        """What was computed of a sequence from `position` on is worth nothing, and is no prefix any more.
        Returns the sequences that have taken it for one."""

    @abstractmethod
    def release(self, request_id: int, reason: str) -> None:
        """Give back everything a request holds here. Called once for each, when it leaves `requests`."""

    def sweep(self) -> None:
        """End every request whose deadline has passed."""

        def expire(running: RunningRequest) -> None:
            message = f"not finished within {running.work.deadline_s:g} s"
            self.fail(running.work.request_id, "deadline", message, False)

        self.each("sweep", self.context.requests.expired(self.context.clock()), expire)

    def drop_router(self, router: bytes) -> None:
        """A router is gone: nobody wants its requests any more."""
        lost = self.context.requests.of_router(router)
        if lost:
            log.warning("router %s is gone with %d requests", router.hex(), len(lost))
        self.each("router_lost", lost, lambda running: self.end(running.work.request_id, WITHDRAWN))

    # ------------------------------------------------------------ entering and leaving

    def take(
        self, router: bytes, work: SequenceRequest, transfer_id: int | None, queued: int
    ) -> RunningRequest | None:
        """Keep a new request, or refuse it with one `Failed`; None if it was not kept."""
        requests = self.context.requests
        if work.request_id in requests or (transfer_id is not None and requests.has_transfer(transfer_id)):
            self.context.counters["dropped_duplicate_request"] += 1
            return None
        failed = refuse(work, self.context.limits, queued)
        if failed is not None:
            self.context.counters["requests_refused"] += 1
            self.context.outbox.add(router, failed)
            return None
        self.context.counters["requests_accepted"] += 1
        return requests.add(work, router, self.context.clock(), transfer_id)

    def cancel(self, request: Cancel) -> None:
        if request.choice is None and request.request_id in self.context.requests:
            self.context.counters["requests_cancelled"] += 1
            self.end(request.request_id, WITHDRAWN)

    def end(self, request_id: int, reason: str) -> None:
        """Forget a request without a report; `reason` goes to the other side of its transfer."""
        if request_id in self.context.requests:
            self.release(request_id, reason)
            self.context.requests.remove(request_id)

    def fail(self, request_id: int, code: FailureCode, message: str, retryable: bool) -> None:
        running = self.context.requests.get(request_id)
        if running is None:
            return
        log.warning("request %d failed: %s: %s", request_id, code, message)
        self.context.counters[f"requests_failed_{code}"] += 1
        self.context.outbox.add(running.router, Failed(request_id, code, message, retryable))
        # What nobody tries again ends at its other worker by the router's word: nothing is lost there.
        self.end(request_id, code if retryable else WITHDRAWN)

    def contain(self, where: str, request_id: int | None, error: Exception) -> None:
        """What nobody foresaw ends the request that it came from, and no other; see `isolation.contain`."""
        context = self.context
        contain(where, request_id, error, context.counters, context.engine.device.type == "cuda")
        if request_id is not None:
            self.fail(request_id, "internal", "the worker failed on this request", False)

    def each(self, where: str, requests: list[RunningRequest], act: Callable[[RunningRequest], None]) -> None:
        """Something that is done for many requests, of which each fails by itself."""
        for running in requests:
            try:
                act(running)
            except Exception as error:
                self.contain(where, running.work.request_id, error)

    # ------------------------------------------------------------ a step

    def launch(self, plan: StepPlan) -> InFlightStep | None:
        """Hand a plan to the engine; an engine error fails the plan's requests, not the worker.

        On a GPU an error may have spoilt the context, so there it ends the process.
        """
        for chunk in plan.chunks:
            running = self.context.requests.get(chunk.sequence.work.request_id)
            if running is not None and running.started_s is None:
                running.started_s = self.context.clock()
        begun_s = self.context.clock()
        try:
            launched = self.context.engine.launch(rows_of(plan))
        except ENGINE_FAILURES as error:
            self._engine_failed(plan, error)
            return None
        self.context.pool.step = self.context.engine.queued_step
        self.context.counters["steps"] += 1
        self.context.counters["prompt_tokens"] += sum(chunk.count for chunk in plan.chunks)
        return InFlightStep(plan, launched, begun_s, self.context.clock(), plan.shape())

    def copy_pages(self, pairs: list[tuple[int, int]]) -> None:
        """Copies that fork choices; a step to all who know steps by number."""
        self.context.engine.copy_pages(pairs)
        self.context.pool.step = self.context.engine.queued_step

    def collect(self, step: InFlightStep, after: InFlightStep | None = None) -> StepResult | None:
        """Wait for a launched plan. An error fails its requests likewise, and those of the step launched
        `after` it, which went on from what it should have computed. Since pages are findable prefixes from
        the launch on that computes them, no prefix is trusted any more.

        A request whose numbers are not finite ends here, without the others of the step."""
        plan = step.plan
        try:
            results = step.launched.collect()
        except ENGINE_FAILURES as error:
            self._engine_failed(plan, error)
            if after is not None:
                self._fail_plan(after.plan, "the step before failed")
            self.context.pool.forget_prefixes()
            return None
        for sequence, result in zip(plan.sequences(), results, strict=True):
            if result.nonfinite_at is not None:
                self._end_nonfinite(sequence, result.nonfinite_at)
        decodes = len(plan.decodes)
        return StepResult(
            [(one, result.sampled[0]) for one, result in zip(plan.decodes, results[:decodes], strict=True)],
            list(zip(plan.chunks, results[decodes:], strict=True)),
        )

    def _end_nonfinite(self, sequence: Sequence, position: int) -> None:
        """A token's numbers are NaN or infinite. So would be those of every sequence that begins with the
        same tokens: one that took their KV from here does not notice, since the pool keeps no such number."""
        sharers = self.spoil(sequence, position)
        if sequence.state is not State.ENDED:
            message = f"the model's logits are NaN or infinite at token position {position}"
            self.fail(sequence.work.request_id, "invalid_logits", message, False)
        for sharer in sharers:
            if sharer.state is not State.ENDED:
                self._end_nonfinite(sharer, position)

    def _fail_plan(self, plan: StepPlan, reason: str) -> None:
        """End the requests of a plan. Those whose sequences have ended meanwhile are not touched."""
        alive = (one for one in plan.sequences() if one.state is not State.ENDED)
        for request_id in sorted({one.work.request_id for one in alive}):
            self.fail(request_id, "internal", f"the engine failed: {reason}", False)

    def _engine_failed(self, plan: StepPlan, error: Exception) -> None:
        log.error("engine step with %d rows failed", len(plan.sequences()), exc_info=error)
        self.context.counters["engine_errors"] += 1
        if self.context.engine.device.type == "cuda":
            raise error
        self._fail_plan(plan, type(error).__name__)

    def collect_prompt_logprobs(self, chunk: Chunk, result: RowResult) -> None:
        running = self.context.requests.get(chunk.sequence.work.request_id)
        if running is not None and wants_prompt_logprobs(chunk.sequence):
            del running.prompt_logprobs[chunk.start :]  # a prompt that was preempted starts again
            running.prompt_logprobs.extend(result.prompt_logprobs)

    def report_prefill(self, running: RunningRequest, sequence: Sequence) -> None:
        now_s = self.context.clock()
        started_s = running.started_s if running.started_s is not None else now_s
        self.context.outbox.add(
            running.router,
            PrefillDone(
                running.work.request_id,
                started_s - running.arrived_s,
                now_s - started_s,
                sequence.cached_tokens,
                running.prompt_logprobs if running.work.sampling.prompt_logprobs is not None else None,
            ),
        )

    def report_token(
        self, running: RunningRequest, choice: int, output_tokens: int, sampled: SampledToken
    ) -> bool:
        """Report a choice's newly sampled token, its `output_tokens`-th; True if the choice ends with it."""
        finish = finish_reason(running.work, sampled.token, output_tokens, self.context.limits)
        logprobs = None if sampled.logprob is None else [sampled.logprob]
        report = Tokens(running.work.request_id, choice, [sampled.token], logprobs, finish)
        self.context.outbox.add(running.router, report)
        self.context.counters["output_tokens"] += 1
        if finish is not None:
            self.context.counters[f"choices_finished_{finish}"] += 1
        return finish is not None


def sharing(pages: set[int], sequences: Iterable[Sequence]) -> list[Sequence]:
    """Those that hold at least one of the pages."""
    return [one for one in sequences if not pages.isdisjoint(one.pages)]
