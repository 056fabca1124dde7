"""The router's workers and what runs on them: flights are placed, told what arrives, and sent for.

A prompt is a journey of one flight, or more where workers fail (migration.py); legs that find no worker wait.
All of it happens in one event loop, in callbacks that never block. Every frame from a worker is one wake-up,
and what it makes necessary to send leaves as one frame for each worker.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence

from router.admission import Admission
from router.candidates import common_limits
from router.config import RouterConfig
from router.discovery import Discovery, WorkerName, WorkersFile
from router.errors import ApiError
from router.fleet import Fleet
from router.ids import draw_number
from router.metrics import Metrics, Snapshot
from router.migration import Journey, Leg
from router.orders import Order
from router.parameters import Limits
from router.policy import Pairing, place, place_decode, spare
from router.requests import WITHOUT_DECODE, Flight, Phase, Send, Times
from router.seats import Seat
from router.traces import Traces
from router.waiting import SWEEP_S, WaitingRoom
from services.client import ClientState, WorkerClient
from services.messages import (
    Cancel,
    DecodeStarted,
    Failed,
    Holding,
    PrefillDone,
    Report,
    Request,
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
        self._flights: dict[int, Flight] = {}
        """By each id under which a worker may report of it."""
        self._legs: dict[int, Leg] = {}
        """Those with a flight, by the id of its work."""
        self._journeys: set[Journey] = set()
        self._waiting = WaitingRoom(config.max_waiting)
        self._sweeping: asyncio.TimerHandle | None = None
        self._outbox: dict[str, list[Request]] = {}
        self._admission = Admission(config.ttft_slo_s, config.max_kv_load, config.retry_after_s)
        self._limits: Limits | None = None
        """Until a worker comes or goes."""
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False
        self.fleet = Fleet(config, draw_id(), self._on_reports, self._on_state)
        self.clients, self._seats = self.fleet.clients, self.fleet.seats
        self.traces = Traces(self.fleet.send, clock)
        file = None if config.workers_file is None else WorkersFile(config.workers_file)
        self._discovery = Discovery(file, map(WorkerName, config.worker_names), self._on_found)

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
        journeys = [self._depart(order, now_s) for order in orders]
        self._flush()
        return journeys

    def _admit(self, prompts: list[int]) -> None:
        if self._config.ttft_slo_s is None and self._config.max_kv_load is None:
            return
        placement = place(self.fleet.candidates(), max(prompts, default=0))
        if placement is not None:
            first = placement.prefill or placement.decode
            self._admission.check(placement, prompts, self._seats.of[first.name].queued_prompts)

    def _depart(self, order: Order, now_s: float) -> Journey:
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
        self._idle.clear()
        self._fly(journey.legs[0], placement.pairing, blocks, work.request_id, now_s)
        return journey

    def _fly(
        self, leg: Leg, pairing: Pairing, blocks: Sequence[int], request_id: int, now_s: float
    ) -> None:
        paired_anew = leg.flight is not None
        transfer_id = self._draw_id() if pairing.prefill is not None else 0
        self._queue(leg.journey.depart(leg, pairing, request_id, transfer_id, now_s))
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
        self._flush()

    def end_all(self, error: ApiError) -> None:
        self.end(list(self._journeys), error)

    def _end(self, journey: Journey, error: ApiError | None, now_s: float) -> None:
        self._queue(journey.end(now_s, error))
        if journey not in self._journeys:
            return
        self._journeys.discard(journey)
        for leg in journey.legs:
            if leg.flight is not None:
                self._forget(leg.flight)
        journey.close()
        self._metrics.observe_journey(journey)
        if not self._journeys:
            self._idle.set()

    # -- retries

    def _settle(self, flight: Flight, now_s: float) -> None:
        """A flight has ended, or needs another decode worker: its journey goes on, or ends with it."""
        leg = self._legs.get(flight.work.request_id)
        if leg is None:
            return
        journey = leg.journey
        self._queue(journey.settle(leg, now_s))
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
        pairing = self._pairing(leg, blocks) if due else None
        if pairing is not None:
            self._fly(leg, pairing, blocks, self._draw_id(), now_s)
        elif (leg.strict and due) or not self._waiting.add(leg):
            self._end(leg.journey, leg.error, now_s)
        else:
            self._sweep_later()

    def _sweep_later(self) -> None:
        if self._sweeping is None and len(self._waiting):
            self._sweeping = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)

    def _pairing(self, leg: Leg, blocks: Sequence[int]) -> Pairing | None:
        candidates = spare(self.fleet.candidates(blocks), leg.avoid, leg.strict)
        flight = leg.flight
        tokens = len(leg.journey.work.prompt)
        if flight is None or flight.prefill is None:
            placement = place(candidates, tokens)
            return None if placement is None else placement.pairing
        hello = self.clients[flight.prefill].hello
        if hello is None or hello.transfer is None:
            return None
        decode = place_decode(candidates, hello.model_digest, tokens)
        return None if decode is None else Pairing(flight.prefill, decode.name, hello.transfer)

    def _sweep(self) -> None:
        self._sweeping = None
        now_s = self._clock()
        for leg in self._waiting.take_due(now_s):
            self._seek(leg, now_s)
        self._sweep_later()
        self._flush()

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
        flights = self._flights
        tokens_before = self._metrics.generation_tokens
        for report in reports:
            flight = flights.get(report.request_id)  # type: ignore[union-attr]
            if flight is None:
                self._on_unknown(worker, report)
                continue
            if isinstance(report, Tokens):
                sends = flight.on_tokens(worker, report, now_s)
                if sends:
                    self._queue(sends)
            elif isinstance(report, PrefillDone):
                flight.on_prefill_done(worker, report)
                self._seats.leave_prefill(flight)
                self._admission.observe(worker, len(flight.work.prompt), flight.times.submitted_s, now_s)
            elif isinstance(report, DecodeStarted):
                flight.on_decode_started(worker, report, now_s)
            elif isinstance(report, Failed):
                self._queue(flight.on_failed(worker, report, now_s))
                self._settle(flight, now_s)
            elif isinstance(report, Undelivered):
                self._queue(flight.on_undelivered(worker, report))
                self._settle(flight, now_s)
            elif isinstance(report, Holding):
                self._queue(flight.on_holding(worker))
            elif isinstance(report, TraceReply):
                self.traces.on_reply(report)
            if flight.ended:
                self._settle(flight, now_s)
        if self._metrics.generation_tokens > tokens_before:
            self._metrics.rate.add(self._metrics.generation_tokens - tokens_before, now_s)
        self._flush()

    def _on_unknown(self, worker: str, report: Report) -> None:
        """Of a flight that has ended here: who still holds KV for it need not."""
        if isinstance(report, TraceReply):
            self.traces.on_reply(report)
        elif isinstance(report, Holding | Undelivered):
            self._queue((Send(worker, Cancel(report.request_id)),))
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
                self._queue(flight.on_worker_lost(client.endpoint, now_s))
                self._settle(flight, now_s)
        self._flush()

    def _on_found(self, endpoints: list[str]) -> None:
        """Discovery has looked: workers come and go."""
        self.fleet.look(endpoints)
        if self.fleet.leaving:
            flights = (leg.flight for leg in self._legs.values() if leg.flight is not None)
            self.fleet.release({worker for flight in flights for worker in flight.workers})

    # -- sending

    def _queue(self, sends: Iterable[Send]) -> None:
        for send in sends:
            self._outbox.setdefault(send.worker, []).append(send.message)

    def _flush(self) -> None:
        while self._outbox:
            outbox, self._outbox = self._outbox, {}
            for worker, messages in outbox.items():
                if not self.fleet.send(worker, messages):
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
                self._settle(flight, now_s)
