"""The router's workers and what runs on them: attempts are placed, told what arrives, and sent for.

A prompt is a request of one attempt, or more where workers fail (migration.py); branches that find no worker
wait. All of it happens in one event loop, in callbacks that never block. Every frame from a worker is one
wake-up, and what it makes necessary to send leaves as one frame for each worker.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence

from router.api.parameters import RequestLimits
from router.config import RouterConfig
from router.errors import ApiError, crashed
from router.ids import draw_number
from router.routing.admission import Admission
from router.routing.attempt import WITHOUT_DECODE, Attempt, AttemptPhase, Times, WorkerMessage
from router.routing.candidates import common_limits
from router.routing.discovery import Discovery, WorkerName, WorkersFile
from router.routing.load import WorkerLoad
from router.routing.metrics import Metrics, Snapshot
from router.routing.outbox import WorkerOutbox
from router.routing.policy import Pairing, place
from router.routing.prompt_request import PromptRequest
from router.routing.retry_queue import SWEEP_S, RetryQueue
from router.routing.routed_request import Branch, RoutedRequest
from router.routing.traces import Traces
from router.routing.worker_pool import WorkerPool
from services.protocol.client import ClientState, WorkerClient
from services.protocol.messages import (
    Cancel,
    DecodeStarted,
    Failed,
    KvLeaseExpiring,
    KvTransferFailed,
    PrefillDone,
    RequestReport,
    SequenceRequest,
    Tokens,
    TraceReply,
)


class Dispatcher:
    def __init__(
        self,
        config: RouterConfig,
        metrics: Metrics,
        draw_id: Callable[[], int] = draw_number,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._metrics, self._draw_id = config, metrics, draw_id
        # Not the loop's clock: uvloop's has a resolution of a millisecond.
        self._clock = clock
        self._borders = metrics.borders
        self._attempts: dict[int, Attempt] = {}
        """By each id under which a worker may report of it."""
        self._branches: dict[int, Branch] = {}
        """Those with an attempt, by the id of its work."""
        self._routed_requests: set[RoutedRequest] = set()
        self._waiting = RetryQueue(config.max_waiting)
        self._sweeping: asyncio.TimerHandle | None = None
        self._admission = Admission(config.ttft_slo_s, config.max_kv_load, config.retry_after_s)
        self._limits: RequestLimits | None = None
        """Until a worker comes or goes."""
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False
        self.worker_pool = WorkerPool(config, draw_id(), self._on_reports, self._on_state)
        self.clients, self._worker_loads = self.worker_pool.clients, self.worker_pool.worker_loads
        self._outbox = WorkerOutbox(self.worker_pool.send, self._on_unsent, self._borders)
        self.traces = Traces(self.worker_pool.send, clock)
        file = None if config.workers_file is None else WorkersFile(config.workers_file)
        self._discovery = Discovery(file, map(WorkerName, config.worker_names), self._on_found, self._borders)

    def start(self) -> None:
        """Connects to every worker, in the running loop. Raises ClientConfigError."""
        self.worker_pool.start()
        self._discovery.start()

    def close(self) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
        self._discovery.close()
        self.worker_pool.close()

    # -- what is known

    @property
    def live(self) -> int:
        """Prompts in flight."""
        return len(self._routed_requests)

    async def wait_idle(self) -> None:
        """Until no prompt is in flight."""
        await self._idle.wait()

    def count_phases(self) -> dict[AttemptPhase, int]:
        counts: dict[AttemptPhase, int] = {}
        for routed in self._routed_requests:
            for branch in routed.branches:
                phase = AttemptPhase.QUEUED if branch.attempt is None else branch.attempt.phase
                counts[phase] = counts.get(phase, 0) + 1
        return counts

    def worker_load(self, endpoint: str) -> WorkerLoad:
        return self._worker_loads.of[endpoint]

    @property
    def can_take_work(self) -> bool:
        return not self.draining and place(self.worker_pool.candidates(), 0) is not None

    def limits(self) -> RequestLimits | None:
        """What every connected worker can take; None while there is none."""
        if self._limits is None:
            self._limits = common_limits(self.clients.values(), self._config)
        return self._limits

    def snapshot(self) -> Snapshot:
        waiting = sum(routed.times.first_token_s is None for routed in self._routed_requests)
        clients = self.clients.items()
        usable = {candidate.name for candidate in self.worker_pool.candidates()}
        return Snapshot(
            queued=waiting,
            running=self.live - waiting,
            worker_states=[(name, client.state.value, name in usable) for name, client in clients],
            statuses=[(client.status.name, client.status) for _, client in clients if client.status],
            output_tokens_per_s=self._metrics.rate.per_second(self._clock()),
        )

    # -- orders

    def unavailable(self, message: str, code: str) -> ApiError:
        return ApiError(503, message, code=code, retry_after_s=self._config.retry_after_s)

    def check_open(self, prompts: int) -> None:
        """Raises ApiError 503 while draining or without workers, 429 when too much is in flight."""
        if self.draining:
            raise self.unavailable("The server is shutting down.", "draining")
        if self.live + prompts > self._config.max_running:
            raise ApiError(
                429,
                f"The server is overloaded: {self.live} prompts are in flight.",
                code="overloaded",
                retry_after_s=self._config.retry_after_s,
            )

    def submit(self, prompt_requests: Sequence[PromptRequest]) -> list[RoutedRequest]:
        """Sends the prompts of one request off. Raises ApiError as `check_open`, 429 where they would wait
        too long, or 503 without workers; then nothing was sent."""
        self.check_open(len(prompt_requests))
        self._admit([len(prompt_request.prompt) for prompt_request in prompt_requests])
        now_s = self._clock()
        routed_requests: list[RoutedRequest] = []
        try:
            for prompt_request in prompt_requests:
                self._depart(prompt_request, now_s, routed_requests)
        except BaseException as error:
            self.end(routed_requests)  # no prompt of a request runs without the others
            if isinstance(error, ApiError):
                raise
            self._borders.contain("submit", f"{len(prompt_requests)} prompts", error)
            raise crashed() from None
        self._outbox.flush()
        return routed_requests

    def _admit(self, prompts: list[int]) -> None:
        if self._config.ttft_slo_s is None and self._config.max_kv_load is None:
            return
        placement = place(self.worker_pool.candidates(), max(prompts, default=0))
        if placement is not None:
            first = placement.prefill or placement.decode
            self._admission.check(placement, prompts, self._worker_loads.of[first.name].queued_prompts)

    def _depart(
        self, prompt_request: PromptRequest, now_s: float, routed_requests: list[RoutedRequest]
    ) -> None:
        work = SequenceRequest(
            request_id=self._draw_id(),
            prompt=prompt_request.prompt,
            sampling=prompt_request.sampling,
            choices=prompt_request.choices,
            salt=prompt_request.salt,
            deadline_s=self._config.request_timeout_s,
        )
        blocks = self.worker_pool.blocks(work)
        placement = place(self.worker_pool.candidates(blocks), len(prompt_request.prompt))
        if placement is None:
            raise self.unavailable(
                "No workers are ready: a prefill and a decode worker, or a unified one, are needed.",
                "no_workers",
            )
        self._metrics.retries.on_prompt()
        retry_after_s, budget = self._config.retry_after_s, self._metrics.retries
        routed = RoutedRequest(work, prompt_request.output, Times(now_s), retry_after_s, budget)
        self._routed_requests.add(routed)
        routed_requests.append(routed)
        self._idle.clear()
        self._fly(routed.branches[0], placement.pairing, blocks, work.request_id, now_s)

    def _fly(
        self, branch: Branch, pairing: Pairing, blocks: Sequence[int], request_id: int, now_s: float
    ) -> None:
        paired_anew = branch.attempt is not None
        transfer_id = self._draw_id() if pairing.prefill is not None else 0
        self._outbox.queue(branch.routed.depart(branch, pairing, request_id, transfer_id, now_s))
        attempt = branch.attempt
        if attempt is None:
            raise RuntimeError("a branch departed without an attempt")
        self._attempts[request_id] = attempt
        self._branches[attempt.work.request_id] = branch
        self.worker_pool.take(attempt, blocks, paired_anew)

    def end(self, routed_requests: Iterable[RoutedRequest], error: ApiError | None = None) -> None:
        """Cancels what still runs of these requests, or fails it with `error`. Idempotent."""
        now_s = self._clock()
        for routed in routed_requests:
            self._end(routed, error, now_s)
        self._outbox.flush()

    def end_all(self, error: ApiError) -> None:
        self.end(list(self._routed_requests), error)

    def _end(self, routed: RoutedRequest, error: ApiError | None, now_s: float) -> None:
        attempts = [branch.attempt for branch in routed.branches if branch.attempt is not None]
        whose = f"request {routed.work.request_id}"
        try:
            self._outbox.queue(routed.end(now_s, error))
        except BaseException as problem:
            self._borders.contain("end", whose, problem)
            for attempt in attempts:
                self._outbox.queue(attempt.recall())
        if routed not in self._routed_requests:
            return
        self._routed_requests.discard(routed)
        for attempt in attempts:
            self._forget(attempt)
        routed.close()
        try:
            self._metrics.observe_request(routed)
        except BaseException as problem:
            self._borders.contain("metrics", whose, problem)
        if not self._routed_requests:
            self._idle.set()

    # -- retries

    def _settle(self, attempt: Attempt, now_s: float) -> None:
        """An attempt has ended, or needs another decode worker: its request goes on, or ends with it."""
        branch = self._branches.get(attempt.work.request_id)
        if branch is None:
            return
        routed = branch.routed
        self._outbox.queue(routed.settle(branch, now_s))
        if attempt.ended:
            self._forget(attempt)
        elif attempt.phase in WITHOUT_DECODE:
            self._worker_loads.leave_decode(attempt)
            self._forget_decode_id(attempt)
        if routed.ended:
            self._end(routed, None, now_s)
            return
        for one in routed.branches:
            if one.waiting:
                self._seek(one, now_s)

    def _seek(self, branch: Branch, now_s: float) -> None:
        """Workers for a waiting branch, at once or later."""
        if branch.over:
            return
        due = branch.not_before_s <= now_s
        blocks = self.worker_pool.blocks(branch.routed.work) if due else ()
        pairing = self.worker_pool.pairing(branch, blocks) if due else None
        if pairing is not None:
            self._fly(branch, pairing, blocks, self._draw_id(), now_s)
        elif (branch.strict and due) or not self._waiting.add(branch):
            self._end(branch.routed, branch.error, now_s)
        else:
            self._sweep_later()

    def _sweep_later(self) -> None:
        if self._sweeping is None and len(self._waiting):
            self._sweeping = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        self._sweeping = None
        now_s = self._clock()
        for branch in self._waiting.take_due(now_s):
            try:
                self._seek(branch, now_s)
            except BaseException as error:
                self._borders.contain("sweep", f"request {branch.routed.work.request_id}", error)
                self._end_crashed(branch.routed, now_s)
        self._sweep_later()
        self._outbox.flush()

    def _forget(self, attempt: Attempt) -> None:
        """No worker is to report of it any more."""
        self._branches.pop(attempt.work.request_id, None)
        self._attempts.pop(attempt.work.request_id, None)
        self._attempts.pop(attempt.decode_id, None)
        self._worker_loads.leave(attempt)

    def _forget_decode_id(self, attempt: Attempt) -> None:
        if attempt.decode_id != attempt.work.request_id:
            self._attempts.pop(attempt.decode_id, None)

    # -- reports

    def _on_reports(self, client: WorkerClient, reports: list[RequestReport]) -> None:
        worker, now_s = client.endpoint, self._clock()
        before_tokens = self._metrics.generation_tokens
        for report in reports:
            try:
                self._on_report(worker, report, now_s)
            except BaseException as error:
                self._contain("report", getattr(report, "request_id", 0), error, now_s)
        if self._metrics.generation_tokens > before_tokens:
            self._metrics.rate.add(self._metrics.generation_tokens - before_tokens, now_s)
        self._outbox.flush()

    def _on_report(self, worker: str, report: RequestReport, now_s: float) -> None:
        attempt = self._attempts.get(report.request_id)
        if attempt is None:
            self._on_unknown(worker, report)
            return
        if isinstance(report, Tokens):
            sends = attempt.on_tokens(worker, report, now_s)
            if sends:
                self._outbox.queue(sends)
        elif isinstance(report, PrefillDone):
            attempt.on_prefill_done(worker, report)
            self._worker_loads.leave_prefill(attempt)
            self._admission.observe(worker, len(attempt.work.prompt), attempt.times.submitted_s, now_s)
        elif isinstance(report, DecodeStarted):
            attempt.on_decode_started(worker, report, now_s)
        elif isinstance(report, Failed):
            self._outbox.queue(attempt.on_failed(worker, report, now_s))
            self._settle(attempt, now_s)
        elif isinstance(report, KvTransferFailed):
            self._outbox.queue(attempt.on_undelivered(worker, report))
            self._settle(attempt, now_s)
        elif isinstance(report, KvLeaseExpiring):
            self._outbox.queue(attempt.on_holding(worker))
        elif isinstance(report, TraceReply):
            self.traces.on_reply(report)
        if attempt.ended:
            self._settle(attempt, now_s)

    def _contain(self, where: str, request_id: int, error: BaseException, now_s: float) -> None:
        """What nobody foresaw ends the request that it came from, on its workers too, and no other."""
        self._borders.contain(where, f"request {request_id}", error)
        attempt = self._attempts.get(request_id)
        branch = None if attempt is None else self._branches.get(attempt.work.request_id)
        if branch is not None:
            self._end_crashed(branch.routed, now_s)

    def _end_crashed(self, routed: RoutedRequest, now_s: float) -> None:
        self._end(routed, crashed(committed=routed.times.first_token_s is not None), now_s)

    def _on_unknown(self, worker: str, report: RequestReport) -> None:
        """Of an attempt that has ended here: who still holds KV for it need not."""
        if isinstance(report, TraceReply):
            self.traces.on_reply(report)
        elif isinstance(report, KvLeaseExpiring | KvTransferFailed):
            self._outbox.queue((WorkerMessage(worker, Cancel(report.request_id)),))
        else:
            self._metrics.ignored_reports += 1

    def _on_state(self, client: WorkerClient, old: ClientState, new: ClientState) -> None:
        self._limits = None
        if old is not ClientState.READY:
            return
        self._admission.forget(client.endpoint)
        now_s = self._clock()
        attempts = [branch.attempt for branch in self._branches.values() if branch.attempt is not None]
        for attempt in attempts:
            if client.endpoint in attempt.workers:
                self._on_lost(attempt, client.endpoint, now_s)
        self._outbox.flush()

    def _on_lost(self, attempt: Attempt, worker: str, now_s: float) -> None:
        try:
            self._outbox.queue(attempt.on_worker_lost(worker, now_s))
            self._settle(attempt, now_s)
        except BaseException as error:
            self._contain("worker_lost", attempt.work.request_id, error, now_s)

    def _on_found(self, endpoints: list[str]) -> None:
        """Discovery has looked: workers come and go."""
        self.worker_pool.look(endpoints)
        if self.worker_pool.leaving:
            attempts = (branch.attempt for branch in self._branches.values() if branch.attempt is not None)
            self.worker_pool.release({worker for attempt in attempts for worker in attempt.workers})

    def _on_unsent(self, worker: str, request_id: int) -> None:
        """A worker that cannot even be written to holds nothing of the request, whatever it was before."""
        attempt = self._attempts.get(request_id)
        if attempt is not None:
            self._on_lost(attempt, worker, self._clock())
