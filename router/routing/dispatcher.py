"""The dispatcher: requests in, attempts out to workers, and workers' reports to the attempts they are about.

A prompt is a routed request of one attempt, or more where workers fail. What follows from an attempt's end or
loss is decided by its request (routed_request.py); the dispatcher carries it out: it finds workers, keeps the
tables of who runs what, and holds attempts that find no worker in a queue. All of it happens in one event
loop, in callbacks that never block. Every frame from a worker is one wake-up, and the messages that it makes
necessary leave as one frame for each worker.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence

from router.config import RouterConfig
from router.errors import ApiError, crashed
from router.ids import draw_number
from router.routing.admission import Admission
from router.routing.attempt import Attempt, AttemptPhase, Times, WorkerMessage
from router.routing.discovery import Discovery, WorkerName, WorkersFile
from router.routing.limits import RequestLimits
from router.routing.load import WorkerLoad
from router.routing.metrics import Metrics, Snapshot
from router.routing.outbox import WorkerOutbox
from router.routing.policy import Pairing, place
from router.routing.retry_queue import SWEEP_S, RetryQueue
from router.routing.routed_request import NextStep, PromptRequest, RoutedRequest, WorkersOffer
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
        """Those that have workers, by each id under which a worker may report of them."""
        self._routed_requests: set[RoutedRequest] = set()
        self._retry_queue = RetryQueue(config.max_waiting)
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._admission = Admission(config.ttft_slo_s, config.max_kv_load, config.retry_after_s)
        self._limits: RequestLimits | None = None
        """Computed anew when a worker comes or goes."""
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
        """Ends the connections to all workers, and what happens by itself."""
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        self._discovery.close()
        self.worker_pool.close()

    # ------------------------------------------------------------ what is known

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
            for attempt in routed.attempts:
                counts[attempt.phase] = counts.get(attempt.phase, 0) + 1
        return counts

    def worker_load(self, endpoint: str) -> WorkerLoad:
        return self._worker_loads.of[endpoint]

    @property
    def can_take_work(self) -> bool:
        return not self.draining and place(self.worker_pool.candidates(), 0) is not None

    def limits(self) -> RequestLimits | None:
        """What every connected worker can take; None while there is none."""
        if self._limits is None:
            self._limits = self.worker_pool.limits()
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

    # ------------------------------------------------------------ requests

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
        """Sends the prompts of one HTTP request to workers. Raises ApiError as `check_open`, 429 where they
        would wait too long, or 503 without workers; then nothing was sent."""
        self.check_open(len(prompt_requests))
        self._admit([len(prompt_request.prompt) for prompt_request in prompt_requests])
        now_s = self._clock()
        routed_requests: list[RoutedRequest] = []
        try:
            for prompt_request in prompt_requests:
                self._route(prompt_request, now_s, routed_requests)
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

    def _route(
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
        self._start(routed.attempts[0], placement.pairing, blocks, work.request_id, now_s)

    def _start(
        self, attempt: Attempt, pairing: Pairing, blocks: Sequence[int], request_id: int, now_s: float
    ) -> None:
        """An attempt gets workers: its first, or another decode worker."""
        paired_anew = attempt.phase is not AttemptPhase.QUEUED
        transfer_id = self._draw_id() if pairing.prefill is not None else 0
        self._outbox.queue(attempt.routed.start(attempt, pairing, request_id, transfer_id, now_s))
        self._attempts[request_id] = attempt
        self.worker_pool.assign(attempt, blocks, paired_anew)

    def end(self, routed_requests: Iterable[RoutedRequest], error: ApiError | None = None) -> None:
        """Cancels these requests, or fails them with `error`, unless they have ended. Idempotent."""
        now_s = self._clock()
        for routed in routed_requests:
            self._end(routed, error, now_s)
        self._outbox.flush()

    def end_all(self, error: ApiError) -> None:
        self.end(list(self._routed_requests), error)

    def _end(self, routed: RoutedRequest, error: ApiError | None, now_s: float) -> None:
        attempts = list(routed.attempts)
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
        routed.attempts.clear()
        try:
            self._metrics.observe_request(routed)
        except BaseException as problem:
            self._borders.contain("metrics", whose, problem)
        if not self._routed_requests:
            self._idle.set()

    # ------------------------------------------------------------ what follows from an end or a loss

    def _follow_up(self, attempt: Attempt, now_s: float) -> None:
        """Carries out what the request decides now that an attempt has ended or lost its decode worker."""
        routed = attempt.routed
        decision = routed.decide(attempt)
        self._outbox.queue(routed.apply(attempt, decision, now_s))
        if attempt.ended:
            self._forget(attempt)
        match decision.step:
            case NextStep.FINISH | NextStep.FAIL:
                self._end(routed, None, now_s)
            case NextStep.PAIR:
                self._worker_loads.release_decode(attempt)
                if attempt.decode_id != attempt.work.request_id:
                    self._attempts.pop(attempt.decode_id, None)
                self._find_workers(attempt, now_s)
            case NextStep.RETRY:
                for one in [one for one in routed.attempts if one.phase is AttemptPhase.QUEUED]:
                    self._find_workers(one, now_s)

    def _find_workers(self, attempt: Attempt, now_s: float) -> None:
        """Carries out what the request decides with the workers that there are for an attempt that waits."""
        routed, wait = attempt.routed, attempt.wait
        if wait is None:
            return
        due = wait.not_before_s <= now_s
        blocks = self.worker_pool.blocks(routed.work) if due else ()
        pairing = self.worker_pool.pairing(attempt, len(routed.work.prompt), blocks) if due else None
        decision = routed.decide(attempt, WorkersOffer(pairing, due, self._retry_queue.has_room(attempt)))
        if decision.step is NextStep.START and pairing is not None:
            self._start(attempt, pairing, blocks, self._draw_id(), now_s)
        elif decision.step is NextStep.WAIT:
            self._retry_queue.add(attempt)
            self._sweep_later()
        elif decision.step is NextStep.FAIL:
            self._end(routed, decision.error, now_s)

    def _sweep_later(self) -> None:
        if self._sweep_timer is None and len(self._retry_queue):
            self._sweep_timer = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        self._sweep_timer = None
        now_s = self._clock()
        for attempt in self._retry_queue.take_due(now_s):
            try:
                self._find_workers(attempt, now_s)
            except BaseException as error:
                self._borders.contain("sweep", f"request {attempt.routed.work.request_id}", error)
                self._end_crashed(attempt.routed, now_s)
        self._sweep_later()
        self._outbox.flush()

    def _forget(self, attempt: Attempt) -> None:
        """Takes an attempt of which no worker is to report any more out of the tables."""
        self._attempts.pop(attempt.work.request_id, None)
        self._attempts.pop(attempt.decode_id, None)
        self._worker_loads.release(attempt)

    # ------------------------------------------------------------ reports

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
            if attempt.ended:
                self._follow_up(attempt, now_s)
            return
        if isinstance(report, PrefillDone):
            attempt.on_prefill_done(worker, report)
            self._worker_loads.release_prefill(attempt)
            self._admission.observe(worker, len(attempt.work.prompt), attempt.times.submitted_s, now_s)
        elif isinstance(report, DecodeStarted):
            attempt.on_decode_started(worker, report, now_s)
        elif isinstance(report, Failed):
            self._outbox.queue(attempt.on_failed(worker, report, now_s))
        elif isinstance(report, KvTransferFailed):
            self._outbox.queue(attempt.on_kv_transfer_failed(worker, report))
        elif isinstance(report, KvLeaseExpiring):
            self._outbox.queue(attempt.on_kv_lease_expiring(worker))
        elif isinstance(report, TraceReply):
            self.traces.on_reply(report)
        if attempt.needs_decision:
            self._follow_up(attempt, now_s)

    def _contain(self, where: str, request_id: int, error: BaseException, now_s: float) -> None:
        """An error that nobody foresaw ends its own request, on the workers too, and no other."""
        self._borders.contain(where, f"request {request_id}", error)
        attempt = self._attempts.get(request_id)
        if attempt is not None:
            self._end_crashed(attempt.routed, now_s)

    def _end_crashed(self, routed: RoutedRequest, now_s: float) -> None:
        self._end(routed, crashed(committed=routed.times.first_token_s is not None), now_s)

    def _on_unknown(self, worker: str, report: RequestReport) -> None:
        """A report about an attempt that has ended here: who still holds KV for it lets it go."""
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
        for attempt in dict.fromkeys(self._attempts.values()):
            if client.endpoint in attempt.workers:
                self._on_lost(attempt, client.endpoint, now_s)
        self._outbox.flush()

    def _on_lost(self, attempt: Attempt, worker: str, now_s: float) -> None:
        try:
            self._outbox.queue(attempt.on_worker_lost(worker, now_s))
            if attempt.needs_decision:
                self._follow_up(attempt, now_s)
        except BaseException as error:
            self._contain("worker_lost", attempt.work.request_id, error, now_s)

    def _on_found(self, endpoints: list[str]) -> None:
        """Takes the workers that discovery has found: some are new, some leave."""
        self.worker_pool.update(endpoints)
        if self.worker_pool.leaving:
            busy = {worker for attempt in self._attempts.values() for worker in attempt.workers}
            self.worker_pool.release(busy)

    def _on_unsent(self, worker: str, request_id: int) -> None:
        """A worker that cannot even be written to holds nothing of the request, so it counts as lost."""
        attempt = self._attempts.get(request_id)
        if attempt is not None:
            self._on_lost(attempt, worker, self._clock())
