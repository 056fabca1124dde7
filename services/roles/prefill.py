"""The prefill role: run prompts in chunks, draw first tokens, push KV, hold it until it has arrived.

1. `Prefill` comes in: the request is queued and its transfer opened.
2. The decode side confirms its reservation and grants slots; confirmed prompts run first.
3. What a chunk has computed is packed into assigned slots as soon as it is done, and moved while the next
   chunk runs.
4. The prompt's end draws the first token of every choice; the router has them at once.
5. The KV is held until the decode side has committed it. A request whose choices all ended with their
   first token is released immediately.
6. KV that cannot be delivered (the decode worker or a transfer process is gone) is held as well, until the
   router names another transfer by `RepushKv`, or cancels: nothing is computed a second time.
7. What is held for longer than `LEASE_S` is reported. The word that the KV has arrived dies with a transfer
   process, and then only the router knows that the request went on without us.

No turn waits for the device: up to `MAX_FLIGHTS` steps are queued, and collected once they are done.
"""

from collections import deque

from kvtransfer.client import TransferLost, WorkerEvent
from kvtransfer.messages import WITHDRAWN, Aborted, SendCommitted, SendConfirmed
from services.engine.batch import RowResult
from services.protocol.messages import (
    Cancel,
    Failed,
    KvLeaseExpiring,
    KvTransferFailed,
    Prefill,
    RepushKv,
    Request,
)
from services.roles.live_requests import RunningRequest
from services.roles.role import InFlightStep, Occupancy, Role, WorkerContext, sharing
from services.scheduler.prefill import PrefillScheduler
from services.scheduler.sequence import Chunk, Sequence
from services.transfer.push_parts import PushParts

MAX_FLIGHTS = 2
"""One runs, and the next one starts without a gap. More would only make what arrives wait."""
HAND_OVER_S = 0.002
"""So long after a step's end what it has computed goes before the next launch, if another step runs."""
LEASE_S = 5.0
"""Well above what a hand-over takes, well below a request's deadline."""


class PrefillRole(Role):
    def __init__(self, parts: WorkerContext, push: PushParts) -> None:
        super().__init__(parts)
        self.scheduler = PrefillScheduler(
            parts.pool, parts.limits.max_batch, parts.max_chunk_tokens, parts.tail_chunk_tokens
        )
        self.push = push
        self._flights: deque[InFlightStep] = deque()
        self._done_s = 0.0
        """When the last step was seen to be done; the next one runs from then on, if it was queued."""
        self._committed: set[int] = set()
        """Requests whose KV has arrived, or was not needed, before their first tokens were known."""

    @property
    def in_flight(self) -> bool:
        return bool(self._flights) or self.push.in_flight

    def accept(self, router: bytes, request: Request) -> None:
        match request:
            case Prefill(work=work, transfer_id=transfer_id):
                live = self.take(router, work, transfer_id, len(self.scheduler.waiting))
                if live is not None:
                    sequence = self.scheduler.add(work)
                    self.push.open(sequence, transfer_id, work.deadline_s)
            case RepushKv(request_id=request_id, transfer_id=transfer_id):
                self._push_again(router, request_id, transfer_id)
            case Cancel():
                self.cancel(request)
            case _:
                self.parts.counters["dropped_wrong_role"] += 1

    def on_transfer(self, event: WorkerEvent) -> None:
        match self.push.join(event):
            case SendConfirmed(transfer_id=transfer_id):
                live = self.parts.requests.of_transfer(transfer_id)
                if live is not None:
                    self.scheduler.confirm(live.work.request_id)
            case SendCommitted(transfer_id=transfer_id):
                live = self.parts.requests.of_transfer(transfer_id)
                if live is not None:
                    self._handed_over(live.work.request_id)
            case Aborted(transfer_id=transfer_id, reason=reason):
                live = self.parts.requests.of_transfer(transfer_id)
                if live is not None and reason == WITHDRAWN:
                    self.end(live.work.request_id, reason)
                elif live is not None:
                    self._undelivered(live, reason)
            case TransferLost(rank=rank):
                self.push.clear(rank)
                why = "the transfer process was restarted"
                sent = [live for live in self.parts.requests.all() if live.transfer_id is not None]
                self.each("transfer_lost", sent, lambda live: self._undelivered(live, why))

    def step(self) -> bool:
        collected = self._collect_done()
        packed, delivered = self.push.pack(), self.push.deliver()
        worked = collected or packed + delivered > 0
        if self._may_launch(news=collected or delivered > 0):
            worked |= self._launch_next()
        self._notify_ready()
        return worked or self.in_flight

    def occupancy(self) -> Occupancy:
        scheduler = self.scheduler
        return Occupancy(
            queued=len(scheduler.waiting),
            running=len(scheduler.batch),
            holding=len(scheduler.holding),
        )

    def preemptions(self) -> int:
        return self.scheduler.batch.preemptions

    def spoil(self, sequence: Sequence, position: int) -> list[Sequence]:
        return sharing(self.scheduler.batch.spoil(sequence, position), self.scheduler.sequences())

    def sweep(self) -> None:
        """As every role, and asks after leases that have run out."""
        super().sweep()
        now_s = self.parts.clock()
        for live in self.parts.requests.all():
            if live.lease_until_s is not None and live.lease_until_s <= now_s:
                live.lease_until_s = now_s + LEASE_S
                self.parts.outbox.add(live.router, KvLeaseExpiring(live.work.request_id))

    def release(self, request_id: int, reason: str) -> None:
        live = self.parts.requests.get(request_id)
        if live is not None and live.transfer_id is not None:
            self.push.close(live.transfer_id, abort_reason=reason)
        self.scheduler.end(request_id)
        self._committed.discard(request_id)

    # ------------------------------------------------------------ steps

    def _may_launch(self, news: bool) -> bool:
        """A launch takes the host milliseconds, and what is to leave this worker would wait for its end. So
        what is known now (`news`: first tokens, packed slots) goes first, and so do packs that are on their
        way, but for so short a time that the device does not run out of steps."""
        if len(self._flights) >= MAX_FLIGHTS:
            return False
        if not self._flights or not (news or self.push.in_flight):
            return True
        return self.parts.clock() - self._done_s >= HAND_OVER_S

    def _launch_next(self) -> bool:
        plan = self.scheduler.schedule()
        if not plan:
            return False
        flight = self.launch(plan)
        if flight is None:
            return True
        self.scheduler.launched(plan)
        self._flights.append(flight)
        if not self.parts.overlap:
            self._collect_done()
            self.push.pack()
            self.push.deliver()
        return True

    def _notify_ready(self) -> None:
        for request_id in self.scheduler.take_ready():
            live = self.parts.requests.get(request_id)
            if live is not None and live.transfer_id is not None:
                self.push.ready(live.transfer_id)

    def _collect_done(self) -> bool:
        """Take the results of the steps that are done."""
        collected = False
        while self._flights and self._flights[0].launched.is_done:
            flight = self._flights.popleft()
            now_s = self.parts.clock()
            self.push.computed(flight.plan.chunks, max(flight.launched_s, self._done_s), now_s)
            self._done_s = now_s
            result = self.collect(flight, after=self._flights[0] if self._flights else None)
            for chunk, row in result.chunks if result is not None else []:
                try:
                    self._report(chunk, row)
                except Exception as error:
                    self.contain("chunk", chunk.sequence.work.request_id, error)
            collected = True
        return collected

    def _handed_over(self, request_id: int) -> None:
        """The KV is where it was wanted. The request ends when its first tokens are out."""
        sequence = self.scheduler.get(request_id)
        if sequence is not None and sequence.choices:
            self._committed.add(request_id)
        else:
            self.end(request_id, WITHDRAWN)

    def _report(self, chunk: Chunk, result: RowResult) -> None:
        """A chunk's log probabilities are kept; a prompt's end is reported, and ends choices that stop."""
        self.collect_prompt_logprobs(chunk, result)
        sequence = chunk.sequence
        live = self.parts.requests.get(sequence.work.request_id)
        if live is None or not chunk.samples or not sequence.choices:
            return
        self.report_prefill(live, sequence)
        ended = 0
        for choice, sampled in zip(chunk.samples, result.sampled, strict=True):
            ended += self.report_token(live, choice, live.work.output_tokens + 1, sampled)
        sequence.choices = []
        live.lease_until_s = self.parts.clock() + LEASE_S
        if ended == len(chunk.samples) or live.work.request_id in self._committed:
            self.end(live.work.request_id, WITHDRAWN)

    def _undelivered(self, live: RunningRequest, reason: str) -> None:
        """The transfer has ended without a commit; the request has not."""
        request_id, transfer_id = live.work.request_id, live.transfer_id
        if transfer_id is None:
            return
        self.parts.counters["transfers_undelivered"] += 1
        self.parts.requests.rename_transfer(live, None)
        self.scheduler.unconfirm(request_id)
        report = KvTransferFailed(request_id, transfer_id, f"KV was not delivered: {reason}")
        self.parts.outbox.add(live.router, report)

    def _push_again(self, router: bytes, request_id: int, transfer_id: int) -> None:
        live, sequence = self.parts.requests.get(request_id), self.scheduler.get(request_id)
        if live is None or sequence is None:
            message = "its KV is not held here any more"
            self.parts.outbox.add(router, Failed(request_id, "transfer", message, True))
            return
        if self.parts.requests.has_transfer(transfer_id):
            self.parts.counters["dropped_duplicate_request"] += 1
            return
        if live.transfer_id is not None:
            self.push.close(live.transfer_id, abort_reason=WITHDRAWN)
        self._committed.discard(request_id)
        self.parts.counters["pushes_again"] += 1
        self.scheduler.unconfirm(request_id)
        self.parts.requests.rename_transfer(live, transfer_id)
        self.push.open(sequence, transfer_id, max(live.deadline_at_s - self.parts.clock(), 0.001))
