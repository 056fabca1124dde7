"""The router's workers and what runs on them: flights are placed, told what arrives, and sent for.

A prompt is a journey of one flight, or more where workers fail (migration.py); legs that find no worker wait.
All of it happens in one event loop, in callbacks that never block. Every frame from a worker is one wake-up,
and what it makes necessary to send leaves as one frame for each worker.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence

from router.api.parameters import Limits
from router.config import RouterConfig
from router.errors import ApiError, crashed
from router.ids import draw_number
from router.routing.admission import Admission
from router.routing.attempt import WITHOUT_DECODE, Flight, Phase, Send, Times
from router.routing.candidates import common_limits
from router.routing.discovery import Discovery, WorkerName, WorkersFile
from router.routing.load import Seat
from router.routing.metrics import Metrics, Snapshot
from router.routing.outbox import Outbox
from router.routing.policy import Pairing, place
from router.routing.prompt_request import Order
from router.routing.retry_queue import SWEEP_S, WaitingRoom
from router.routing.routed_request import Journey, Leg
from router.routing.traces import Traces
from router.routing.worker_pool import Fleet
from services.protocol.client import ClientState, WorkerClient
from services.protocol.messages import (
    Cancel,
    DecodeStarted,
    Failed,
    Holding,
    PrefillDone,
    Report,
    Tokens,
    TraceReply,
    Undelivered,
    Work,
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
        self._flights: dict[int, Flight] = {}
        """By each id under which a worker may report of it."""
        self._legs: dict[int, Leg] = {}
        """Those with a flight, by the id of its work."""
        self._journeys: set[Journey] = set()
        self._waiting = WaitingRoom(config.max_waiting)
        self._sweeping: asyncio.TimerHandle | None = None
        self._admission = Admission(config.ttft_slo_s, config.max_kv_load, config.retry_after_s)
        self._limits: Limits | None = None
        """Until a worker comes or goes."""
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False
        self.fleet = Fleet(config, draw_id(), self._on_reports, self._on_state)
        self.clients, self._seats = self.fleet.clients, self.fleet.seats
        self._outbox = Outbox(self.fleet.send, self._on_unsent, self._borders)
        self.traces = Traces(self.fleet.send, clock)
        file = None if config.workers_file is None else WorkersFile(config.workers_file)
        self._discovery = Discovery(file, map(WorkerName, config.worker_names), self._on_found, self._borders)

    def start(self) -> None:
        """Connects to every worker, in the running loop. Raises ClientConfigError."""
        self.fleet.start()
        self._discovery.start()

    def close(self) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
        self._discovery.close()
        self.fleet.close()

    # -- what is known

    @property
    def live(self) -> int:
        """Prompts in flight."""
        return len(self._journeys)

    async def wait_idle(self) -> None:
        """Until no prompt is in flight."""
        await self._idle.wait()

    def count_phases(self) -> dict[Phase, int]:
        counts: dict[Phase, int] = {}
        for journey in self._journeys:
            for leg in journey.legs:
                phase = Phase.QUEUED if leg.flight is None else leg.flight.phase
                counts[phase] = counts.get(phase, 0) + 1
        return counts

    def seat(self, endpoint: str) -> Seat:
        return self._seats.of[endpoint]

    @property
    def can_take_work(self) -> bool:
        return not self.draining and place(self.fleet.candidates(), 0) is not None

    def limits(self) -> Limits | None:
        """What every connected worker can take; None while there is none."""
        if self._limits is None:
            self._limits = common_limits(self.clients.values(), self._config)
        return self._limits

    def snapshot(self) -> Snapshot:
        waiting = sum(journey.times.first_token_s is None for journey in self._journeys)
        clients = self.clients.items()
        usable = {candidate.name for candidate in self.fleet.candidates()}
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

    def submit(self, orders: Sequence[Order]) -> list[Journey]:
        """Sends the prompts of one request off. Raises ApiError as `check_open`, 429 where they would wait
        too long, or 503 without workers; then nothing was sent."""
        self.check_open(len(orders))
        self._admit([len(order.prompt) for order in orders])
        now_s = self._clock()
        journeys: list[Journey] = []
        try:
            for order in orders:
                self._depart(order, now_s, journeys)
        except BaseException as error:
            self.end(journeys)  # no prompt of a request runs without the others
            if isinstance(error, ApiError):
                raise
            self._borders.contain("submit", f"{len(orders)} prompts", error)
            raise crashed() from None
        self._outbox.flush()
        return journeys

    def _admit(self, prompts: list[int]) -> None:
        if self._config.ttft_slo_s is None and self._config.max_kv_load is None:
            return
        placement = place(self.fleet.candidates(), max(prompts, default=0))
        if placement is not None:
            first = placement.prefill or placement.decode
            self._admission.check(placement, prompts, self._seats.of[first.name].queued_prompts)

    def _depart(self, order: Order, now_s: float, journeys: list[Journey]) -> None:
        work = Work(
            request_id=self._draw_id(),
            prompt=order.prompt,
            sampling=order.sampling,
            choices=order.choices,
            salt=order.salt,
            deadline_s=self._config.request_timeout_s,
        )
        blocks = self.fleet.blocks(work)
        placement = place(self.fleet.candidates(blocks), len(order.prompt))
        if placement is None:
            raise self.unavailable(
                "No workers are ready: a prefill and a decode worker, or a unified one, are needed.",
                "no_workers",
            )
        self._metrics.retries.on_prompt()
        retry_after_s, budget = self._config.retry_after_s, self._metrics.retries
        journey = Journey(work, order.output, Times(now_s), retry_after_s, budget)
        self._journeys.add(journey)
        journeys.append(journey)
        self._idle.clear()
        self._fly(journey.legs[0], placement.pairing, blocks, work.request_id, now_s)

    def _fly(self, leg: Leg, pairing: Pairing, blocks: Sequence[int], request_id: int, now_s: float) -> None:
        paired_anew = leg.flight is not None
        transfer_id = self._draw_id() if pairing.prefill is not None else 0
        self._outbox.queue(leg.journey.depart(leg, pairing, request_id, transfer_id, now_s))
        flight = leg.flight
        if flight is None:
            raise RuntimeError("a leg departed without a flight")
        self._flights[request_id] = flight
        self._legs[flight.work.request_id] = leg
        self.fleet.take(flight, blocks, paired_anew)

    def end(self, journeys: Iterable[Journey], error: ApiError | None = None) -> None:
        """Cancels what still runs of these journeys, or fails it with `error`. Idempotent."""
        now_s = self._clock()
        for journey in journeys:
            self._end(journey, error, now_s)
        self._outbox.flush()

    def end_all(self, error: ApiError) -> None:
        self.end(list(self._journeys), error)

    def _end(self, journey: Journey, error: ApiError | None, now_s: float) -> None:
        flights = [leg.flight for leg in journey.legs if leg.flight is not None]
        whose = f"request {journey.work.request_id}"
        try:
            self._outbox.queue(journey.end(now_s, error))
        except BaseException as problem:
            self._borders.contain("end", whose, problem)
            for flight in flights:
                self._outbox.queue(flight.recall())
        if journey not in self._journeys:
            return
        self._journeys.discard(journey)
        for flight in flights:
            self._forget(flight)
        journey.close()
        try:
            self._metrics.observe_journey(journey)
        except BaseException as problem:
            self._borders.contain("metrics", whose, problem)
        if not self._journeys:
            self._idle.set()

    # -- retries

    def _settle(self, flight: Flight, now_s: float) -> None:
        """A flight has ended, or needs another decode worker: its journey goes on, or ends with it."""
        leg = self._legs.get(flight.work.request_id)
        if leg is None:
            return
        journey = leg.journey
        self._outbox.queue(journey.settle(leg, now_s))
        if flight.ended:
            self._forget(flight)
        elif flight.phase in WITHOUT_DECODE:
            self._seats.leave_decode(flight)
            self._forget_decode_id(flight)
        if journey.ended:
            self._end(journey, None, now_s)
            return
        for one in journey.legs:
            if one.waiting:
                self._seek(one, now_s)

    def _seek(self, leg: Leg, now_s: float) -> None:
        """Workers for a waiting leg, at once or later."""
        if leg.over:
            return
        due = leg.not_before_s <= now_s
        blocks = self.fleet.blocks(leg.journey.work) if due else ()
        pairing = self.fleet.pairing(leg, blocks) if due else None
        if pairing is not None:
            self._fly(leg, pairing, blocks, self._draw_id(), now_s)
        elif (leg.strict and due) or not self._waiting.add(leg):
            self._end(leg.journey, leg.error, now_s)
        else:
            self._sweep_later()

    def _sweep_later(self) -> None:
        if self._sweeping is None and len(self._waiting):
            self._sweeping = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        self._sweeping = None
        now_s = self._clock()
        for leg in self._waiting.take_due(now_s):
            try:
                self._seek(leg, now_s)
            except BaseException as error:
                self._borders.contain("sweep", f"request {leg.journey.work.request_id}", error)
                self._end_crashed(leg.journey, now_s)
        self._sweep_later()
        self._outbox.flush()

    def _forget(self, flight: Flight) -> None:
        """No worker is to report of it any more."""
        self._legs.pop(flight.work.request_id, None)
        self._flights.pop(flight.work.request_id, None)
        self._flights.pop(flight.decode_id, None)
        self._seats.leave(flight)

    def _forget_decode_id(self, flight: Flight) -> None:
        if flight.decode_id != flight.work.request_id:
            self._flights.pop(flight.decode_id, None)

    # -- reports

    def _on_reports(self, client: WorkerClient, reports: list[Report]) -> None:
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

    def _on_report(self, worker: str, report: Report, now_s: float) -> None:
        flight = self._flights.get(report.request_id)  # type: ignore[union-attr]
        if flight is None:
            self._on_unknown(worker, report)
            return
        if isinstance(report, Tokens):
            sends = flight.on_tokens(worker, report, now_s)
            if sends:
                self._outbox.queue(sends)
        elif isinstance(report, PrefillDone):
            flight.on_prefill_done(worker, report)
            self._seats.leave_prefill(flight)
            self._admission.observe(worker, len(flight.work.prompt), flight.times.submitted_s, now_s)
        elif isinstance(report, DecodeStarted):
            flight.on_decode_started(worker, report, now_s)
        elif isinstance(report, Failed):
            self._outbox.queue(flight.on_failed(worker, report, now_s))
            self._settle(flight, now_s)
        elif isinstance(report, Undelivered):
            self._outbox.queue(flight.on_undelivered(worker, report))
            self._settle(flight, now_s)
        elif isinstance(report, Holding):
            self._outbox.queue(flight.on_holding(worker))
        elif isinstance(report, TraceReply):
            self.traces.on_reply(report)
        if flight.ended:
            self._settle(flight, now_s)

    def _contain(self, where: str, request_id: int, error: BaseException, now_s: float) -> None:
        """What nobody foresaw ends the request that it came from, on its workers too, and no other."""
        self._borders.contain(where, f"request {request_id}", error)
        flight = self._flights.get(request_id)
        leg = None if flight is None else self._legs.get(flight.work.request_id)
        if leg is not None:
            self._end_crashed(leg.journey, now_s)

    def _end_crashed(self, journey: Journey, now_s: float) -> None:
        self._end(journey, crashed(committed=journey.times.first_token_s is not None), now_s)

    def _on_unknown(self, worker: str, report: Report) -> None:
        """Of a flight that has ended here: who still holds KV for it need not."""
        if isinstance(report, TraceReply):
            self.traces.on_reply(report)
        elif isinstance(report, Holding | Undelivered):
            self._outbox.queue((Send(worker, Cancel(report.request_id)),))
        else:
            self._metrics.ignored_reports += 1

    def _on_state(self, client: WorkerClient, old: ClientState, new: ClientState) -> None:
        self._limits = None
        if old is not ClientState.READY:
            return
        self._admission.forget(client.endpoint)
        now_s = self._clock()
        flights = [leg.flight for leg in self._legs.values() if leg.flight is not None]
        for flight in flights:
            if client.endpoint in flight.workers:
                self._on_lost(flight, client.endpoint, now_s)
        self._outbox.flush()

    def _on_lost(self, flight: Flight, worker: str, now_s: float) -> None:
        try:
            self._outbox.queue(flight.on_worker_lost(worker, now_s))
            self._settle(flight, now_s)
        except BaseException as error:
            self._contain("worker_lost", flight.work.request_id, error, now_s)

    def _on_found(self, endpoints: list[str]) -> None:
        """Discovery has looked: workers come and go."""
        self.fleet.look(endpoints)
        if self.fleet.leaving:
            flights = (leg.flight for leg in self._legs.values() if leg.flight is not None)
            self.fleet.release({worker for flight in flights for worker in flight.workers})

    def _on_unsent(self, worker: str, request_id: int) -> None:
        """A worker that cannot even be written to holds nothing of the request, whatever it was before."""
        flight = self._flights.get(request_id)
        if flight is not None:
            self._on_lost(flight, worker, self._clock())
