"""The prefill role: run prompts in chunks, sample first tokens, send their KV, hold it until it has arrived.

1. `Prefill` comes in: the request is queued and its transfer opened.
2. The decode side confirms its reservation and grants slots; confirmed prompts run first.
3. What a chunk has computed is packed into assigned slots as soon as it is done, and moved while the next
   chunk runs.
4. The prompt's end samples the first token of every choice; the router has them at once.
5. The KV is held until the decode side has committed it. A request whose choices all ended with their
   first token is released immediately.
6. KV that cannot be delivered (the decode worker or a transfer process is gone) is held as well, until the
   router names another transfer by `RepushKv`, or cancels: nothing is computed a second time.
7. What is held for longer than `LEASE_S` is reported. The word that the KV has arrived dies with a transfer
   process, and then only the router knows that the request went on without us.

No turn waits for the device: up to `MAX_STEPS_IN_FLIGHT` steps are queued, and collected once they are done.
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
from services.roles.role import InFlightStep, Occupancy, Role, WorkerContext, sharing
from services.roles.running_requests import RunningRequest
from services.scheduler.prefill import PrefillScheduler
from services.scheduler.sequence import Chunk, Sequence
from services.transfer.sender import KvSender

MAX_STEPS_IN_FLIGHT = 2
"""One runs, and the next one starts without a gap. More would only make what arrives wait."""
HAND_OVER_S = 0.002
"""So long after a step's end what it has computed goes before the next launch, if another step runs."""
LEASE_S = 5.0
"""Well above what a hand-over takes, well below a request's deadline."""


class PrefillRole(Role):
    def __init__(self, context: WorkerContext, sender: KvSender) -> None:
        super().__init__(context)
        self.scheduler = PrefillScheduler(
            context.pool, context.limits.max_batch, context.max_chunk_tokens, context.tail_chunk_tokens
        )
        self.sender = sender
        self._steps_in_flight: deque[InFlightStep] = deque()
        self._done_s = 0.0
        """When the last step was seen to be done; the next one runs from then on, if it was queued."""
        self._committed: set[int] = set()
        """Requests whose KV has arrived, or was not needed, before their first tokens were known."""

    @property
    def in_flight(self) -> bool:
        return bool(self._steps_in_flight) or self.sender.in_flight

    def accept(self, router: bytes, request: Request) -> None:
        match request:
            case Prefill(work=work, transfer_id=transfer_id):
                running = self.take(router, work, transfer_id, len(self.scheduler.waiting))
                if running is not None:
                    sequence = self.scheduler.add(work)
                    self.sender.open(sequence, transfer_id, work.deadline_s)
            case RepushKv(request_id=request_id, transfer_id=transfer_id):
                self._repush(router, request_id, transfer_id)
            case Cancel():
                self.cancel(request)
            case _:
                self.context.counters["dropped_wrong_role"] += 1

    def on_transfer(self, event: WorkerEvent) -> None:
        match self.sender.on_event(event):
            case SendConfirmed(transfer_id=transfer_id):
                running = self.context.requests.of_transfer(transfer_id)
                if running is not None:
                    self.scheduler.confirm(running.work.request_id)
            case SendCommitted(transfer_id=transfer_id):
                running = self.context.requests.of_transfer(transfer_id)
                if running is not None:
                    self._handed_over(running.work.request_id)
            case Aborted(transfer_id=transfer_id, reason=reason):
                running = self.context.requests.of_transfer(transfer_id)
                if running is not None and reason == WITHDRAWN:
                    self.end(running.work.request_id, reason)
                elif running is not None:
                    self._undelivered(running, reason)
            case TransferLost(rank=rank):
                self.sender.rank_lost(rank)
                why = "the transfer process was restarted"
                sent = [running for running in self.context.requests.all() if running.transfer_id is not None]
                self.each("transfer_lost", sent, lambda running: self._undelivered(running, why))

    def step(self) -> bool:
        collected = self._collect_done()
        packed, delivered = self.sender.pack(), self.sender.deliver()
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
        now_s = self.context.clock()
        for running in self.context.requests.all():
            if running.lease_until_s is not None and running.lease_until_s <= now_s:
                running.lease_until_s = now_s + LEASE_S
                self.context.outbox.add(running.router, KvLeaseExpiring(running.work.request_id))

    def release(self, request_id: int, reason: str) -> None:
        running = self.context.requests.get(request_id)
        if running is not None and running.transfer_id is not None:
            self.sender.end(running.transfer_id, abort_reason=reason)
        self.scheduler.end(request_id)
        self._committed.discard(request_id)

    # ------------------------------------------------------------ steps

    def _may_launch(self, news: bool) -> bool:
        """A launch takes the host milliseconds, and what is to leave this worker would wait for its end. So
        what is known now (`news`: first tokens, packed slots) goes first, and so do packs that are on their
        way, but for so short a time that the device does not run out of steps."""
        if len(self._steps_in_flight) >= MAX_STEPS_IN_FLIGHT:
            return False
        if not self._steps_in_flight or not (news or self.sender.in_flight):
            return True
        return self.context.clock() - self._done_s >= HAND_OVER_S

    def _launch_next(self) -> bool:
        plan = self.scheduler.schedule()
        if not plan:
            return False
        step = self.launch(plan)
        if step is None:
            return True
        self.scheduler.launched(plan)
        self._steps_in_flight.append(step)
        if not self.context.overlap:
            self._collect_done()
            self.sender.pack()
            self.sender.deliver()
        return True

    def _notify_ready(self) -> None:
        for request_id in self.scheduler.take_ready():
            running = self.context.requests.get(request_id)
            if running is not None and running.transfer_id is not None:
                self.sender.ready(running.transfer_id)

    def _collect_done(self) -> bool:
        """Take the results of the steps that are done."""
        collected = False
        while self._steps_in_flight and self._steps_in_flight[0].launched.is_done:
            step = self._steps_in_flight.popleft()
            now_s = self.context.clock()
            self.sender.computed(step.plan.chunks, max(step.launched_s, self._done_s), now_s)
            self._done_s = now_s
            result = self.collect(step, after=self._steps_in_flight[0] if self._steps_in_flight else None)
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
        running = self.context.requests.get(sequence.work.request_id)
        if running is None or not chunk.samples or not sequence.choices:
            return
        self.report_prefill(running, sequence)
        ended = 0
        for choice, sampled in zip(chunk.samples, result.sampled, strict=True):
            ended += self.report_token(running, choice, running.work.output_tokens + 1, sampled)
        sequence.choices = []
        running.lease_until_s = self.context.clock() + LEASE_S
        if ended == len(chunk.samples) or running.work.request_id in self._committed:
            self.end(running.work.request_id, WITHDRAWN)

    def _undelivered(self, running: RunningRequest, reason: str) -> None:
        """The transfer has ended without a commit; the request has not."""
        request_id, transfer_id = running.work.request_id, running.transfer_id
        if transfer_id is None:
            return
        self.context.counters["transfers_undelivered"] += 1
        self.context.requests.rename_transfer(running, None)
        self.scheduler.unconfirm(request_id)
        report = KvTransferFailed(request_id, transfer_id, f"KV was not delivered: {reason}")
        self.context.outbox.add(running.router, report)

    def _repush(self, router: bytes, request_id: int, transfer_id: int) -> None:
        running, sequence = self.context.requests.get(request_id), self.scheduler.get(request_id)
        if running is None or sequence is None:
            message = "its KV is not held here any more"
            self.context.outbox.add(router, Failed(request_id, "transfer", message, True))
            return
        if self.context.requests.has_transfer(transfer_id):
            self.context.counters["dropped_duplicate_request"] += 1
            return
        if running.transfer_id is not None:
            self.sender.end(running.transfer_id, abort_reason=WITHDRAWN)
        self._committed.discard(request_id)
        self.context.counters["pushes_again"] += 1
        self.scheduler.unconfirm(request_id)
        self.context.requests.rename_transfer(running, transfer_id)
        self.sender.open(sequence, transfer_id, max(running.deadline_at_s - self.context.clock(), 0.001))
