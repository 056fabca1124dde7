"""The router's workers and what runs on them: flights are placed, told what arrives, and sent for.

All of it happens in one event loop, in callbacks that never block. Every frame from a worker is one wake-up,
and what it makes necessary to send leaves as one frame for each worker.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from router.config import RouterConfig
from router.errors import ApiError
from router.ids import draw_number
from router.metrics import Metrics, Snapshot
from router.parameters import Limits
from router.policy import Candidate, place
from router.requests import Flight, Output, Phase, Send, Times
from router.traces import Traces
from services.client import ClientState, WorkerClient, load_keys
from services.messages import (
    DecodeStarted,
    Failed,
    PrefillDone,
    Report,
    Request,
    Sampling,
    Tokens,
    TraceReply,
    Work,
)


@dataclass(slots=True)
class Seat:
    """This router's own account of what it has on one worker."""

    queued_tokens: int = 0
    live_tokens: int = 0
    live_requests: int = 0


@dataclass(frozen=True, slots=True)
class Order:
    """One prompt to run."""

    prompt: list[int]
    sampling: Sampling
    choices: int
    salt: bytes
    output: Output


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
        self._flights: dict[int, Flight] = {}
        self._queued: set[int] = set()
        self._seats: dict[str, Seat] = {endpoint: Seat() for endpoint in config.workers}
        self._outbox: dict[str, list[Request]] = {}
        self._limits: Limits | None = None
        """Until a worker comes or goes."""
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False
        self.traces = Traces(lambda worker, messages: self.clients[worker].send(messages), clock)
        keys = load_keys(config.key_dir)
        epoch = draw_id()
        self.clients: dict[str, WorkerClient] = {
            endpoint: WorkerClient(
                endpoint,
                router_epoch=epoch,
                on_reports=self._on_reports,
                on_state=self._on_state,
                keys=keys,
                heartbeat_s=config.heartbeat_s,
                timeout_s=config.worker_timeout_s,
            )
            for endpoint in config.workers
        }

    def start(self) -> None:
        """Connects to every worker, in the running loop. Raises ClientConfigError."""
        for client in self.clients.values():
            client.start()

    def close(self) -> None:
        for client in self.clients.values():
            client.close()

    # -- what is known

    @property
    def live(self) -> int:
        """Prompts in flight."""
        return len(self._flights)

    async def wait_idle(self) -> None:
        """Until no prompt is in flight."""
        await self._idle.wait()

    def count_phases(self) -> dict[Phase, int]:
        counts: dict[Phase, int] = {}
        for flight in self._flights.values():
            counts[flight.phase] = counts.get(flight.phase, 0) + 1
        return counts

    def name_of(self, endpoint: str) -> str:
        """What the worker calls itself; its endpoint where it has not said so."""
        hello = self.clients[endpoint].hello
        return endpoint if hello is None else hello.name

    def seat(self, endpoint: str) -> Seat:
        return self._seats[endpoint]

    def _candidates(self) -> list[Candidate]:
        found: list[Candidate] = []
        for endpoint, client in self.clients.items():
            hello, status, seat = client.hello, client.status, self._seats[endpoint]
            if client.state is not ClientState.READY or hello is None or status is None:
                continue
            if status.state != "ready":
                continue
            found.append(
                Candidate(
                    name=endpoint,
                    role=status.role,
                    model_digest=hello.model_digest,
                    transfer=hello.transfer,
                    page_size_tokens=hello.page_size_tokens,
                    pages=hello.pages,
                    reported_queued=status.queued,
                    reported_running=status.running,
                    reported_used_pages=status.pages.used,
                    queued_tokens=seat.queued_tokens,
                    live_tokens=seat.live_tokens,
                )
            )
        return found

    @property
    def can_take_work(self) -> bool:
        return not self.draining and place(self._candidates(), 0) is not None

    def limits(self) -> Limits | None:
        """What every connected worker can take; None while there is none."""
        if self._limits is None:
            self._limits = self._limits_now()
        return self._limits

    def _limits_now(self) -> Limits | None:
        hellos = [client.hello for client in self.clients.values() if client.hello is not None]
        if not hellos:
            return None
        config = self._config
        return Limits(
            vocab_size=min(hello.vocab_size for hello in hellos),
            max_model_len=min(hello.max_model_len for hello in hellos),
            max_sequence_tokens=min(hello.max_sequence_tokens for hello in hellos),
            max_choices=config.max_choices,
            max_prompts=config.max_prompts,
            max_total_choices=config.max_total_choices,
        )

    def snapshot(self) -> Snapshot:
        phases = self.count_phases()
        waiting = phases.get(Phase.PREFILLING, 0)
        clients = self.clients.items()
        usable = {candidate.name for candidate in self._candidates()}
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

    def submit(self, orders: Sequence[Order]) -> list[Flight]:
        """Sends the prompts of one request off. Raises ApiError as `check_open`, or 503 without workers;
        then nothing was sent."""
        self.check_open(len(orders))
        now_s = self._clock()
        flights = [self._place(order, now_s) for order in orders]
        for flight in flights:
            self._flights[flight.work.request_id] = flight
            self._idle.clear()
            self._queue(flight.start())
        self._flush()
        return flights

    def _place(self, order: Order, now_s: float) -> Flight:
        placement = place(self._candidates(), len(order.prompt))
        if placement is None:
            raise self.unavailable(
                "No workers are ready: a prefill and a decode worker, or a unified one, are needed.",
                "no_workers",
            )
        work = Work(
            request_id=self._draw_id(),
            prompt=order.prompt,
            sampling=order.sampling,
            choices=order.choices,
            salt=order.salt,
            deadline_s=self._config.request_timeout_s,
        )
        prefill, decode = placement.prefill, placement.decode
        flight = Flight(
            work, decode.name, order.output, Times(now_s), self._config.retry_after_s,
            prefill=None if prefill is None else prefill.name,
            transfer_id=0 if prefill is None else self._draw_id(),
            source=None if prefill is None else prefill.transfer,
        )  # fmt: skip
        self._seat_taken(flight)
        return flight

    def _seat_taken(self, flight: Flight) -> None:
        tokens = len(flight.work.prompt)
        self._seats[flight.prefill or flight.decode].queued_tokens += tokens
        self._seats[flight.decode].live_tokens += tokens
        self._seats[flight.decode].live_requests += 1
        self._queued.add(flight.work.request_id)

    def _no_longer_queued(self, flight: Flight) -> None:
        if flight.work.request_id in self._queued:
            self._queued.discard(flight.work.request_id)
            self._seats[flight.prefill or flight.decode].queued_tokens -= len(flight.work.prompt)

    def end(self, flights: Iterable[Flight], error: ApiError | None = None) -> None:
        """Cancels what still runs of these flights, or fails it with `error`. Idempotent."""
        now_s = self._clock()
        for flight in flights:
            if not flight.ended:
                self._queue(flight.cancel(now_s) if error is None else flight.fail(error, now_s))
                self._ended(flight)
        self._flush()

    def end_all(self, error: ApiError) -> None:
        self.end(list(self._flights.values()), error)

    # -- reports

    def _on_reports(self, client: WorkerClient, reports: list[Report]) -> None:
        worker, now_s = client.endpoint, self._clock()
        flights = self._flights
        tokens = 0
        for report in reports:
            flight = flights.get(report.request_id)  # type: ignore[union-attr]
            if flight is None:
                if isinstance(report, TraceReply):
                    self.traces.on_reply(report)
                else:
                    self._metrics.ignored_reports += 1
                continue
            if isinstance(report, Tokens):
                tokens += len(report.tokens)
                sends = flight.on_tokens(worker, report, now_s)
                if sends:
                    self._queue(sends)
            elif isinstance(report, PrefillDone):
                flight.on_prefill_done(worker, report)
                self._no_longer_queued(flight)
            elif isinstance(report, DecodeStarted):
                flight.on_decode_started(worker, report, now_s)
            elif isinstance(report, Failed):
                self._queue(flight.on_failed(worker, report, now_s))
            elif isinstance(report, TraceReply):
                self.traces.on_reply(report)
            if flight.ended:
                self._ended(flight)
        if tokens:
            self._metrics.rate.add(tokens, now_s)
        self._flush()

    def _on_state(self, client: WorkerClient, old: ClientState, new: ClientState) -> None:
        self._limits = None
        if old is not ClientState.READY:
            return
        now_s = self._clock()
        for flight in [flight for flight in self._flights.values() if client.endpoint in flight.workers]:
            self._queue(flight.on_worker_lost(client.endpoint, now_s))
            self._ended(flight)
        self._flush()

    def _ended(self, flight: Flight) -> None:
        if self._flights.pop(flight.work.request_id, None) is None:
            return
        self._no_longer_queued(flight)
        seat = self._seats[flight.decode]
        seat.live_tokens -= len(flight.work.prompt)
        seat.live_requests -= 1
        self._metrics.observe_flight(flight)
        if not self._flights:
            self._idle.set()

    # -- sending

    def _queue(self, sends: Iterable[Send]) -> None:
        for send in sends:
            self._outbox.setdefault(send.worker, []).append(send.message)

    def _flush(self) -> None:
        while self._outbox:
            outbox, self._outbox = self._outbox, {}
            for worker, messages in outbox.items():
                if not self.clients[worker].send(messages):
                    self._not_sent(worker, messages)

    def _not_sent(self, worker: str, messages: list[Request]) -> None:
        """A worker that cannot even be written to holds nothing of these requests, whatever it was before."""
        now_s = self._clock()
        for message in messages:
            work = getattr(message, "work", None)
            request_id: int = work.request_id if work is not None else getattr(message, "request_id", 0)
            flight = self._flights.get(request_id)
            if flight is not None:
                self._queue(flight.on_worker_lost(worker, now_s))
                if flight.ended:
                    self._ended(flight)
