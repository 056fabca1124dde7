"""The decode role: reserve pages, take KV in, decode.

1. `ReserveKv` comes in: the request waits until there are pages for its prompt.
2. Pages are taken (less what the prefix cache has), and the receiver asks the source for the KV.
3. Arrived segments are unpacked beside the steps; when the last is done the transfer is committed.
4. `StartDecode` names the choices that go on and their first tokens; with both, they enter the batch.
5. Each step samples one token a choice, until it ends here, or the router ends it.
"""

from kvtransfer.client import TransferLost, WorkerEvent
from kvtransfer.messages import WITHDRAWN, Aborted, Arrived
from services.protocol.messages import (
    Cancel,
    DecodeStarted,
    Request,
    ReserveKv,
    StartDecode,
    WorkerTransferAddress,
)
from services.roles.decoding import DecodingRole
from services.roles.role import Occupancy, WorkerContext
from services.scheduler.decode import DecodeScheduler, Reservation
from services.scheduler.sequence import Sequence
from services.transfer.receiver import KvReceiver


class DecodeRole(DecodingRole[DecodeScheduler]):
    def __init__(self, context: WorkerContext, receiver: KvReceiver) -> None:
        super().__init__(context, DecodeScheduler)
        self.receiver = receiver
        self._sources: dict[int, WorkerTransferAddress] = {}
        self._transfer_s: dict[int, float] = {}

    def accept(self, router: bytes, request: Request) -> None:
        match request:
            case ReserveKv(work=work, transfer_id=transfer_id, source=source):
                if self.take(router, work, transfer_id, len(self.scheduler.waiting)) is not None:
                    self.scheduler.add(work)
                    self._sources[work.request_id] = source
            case StartDecode(request_id=request_id, first_tokens=first_tokens):
                running = self.context.requests.get(request_id)
                choices = range(0) if running is None else running.work.choice_numbers
                if running is None or any(one.choice not in choices for one in first_tokens):
                    self.context.counters["dropped_join"] += 1
                    return
                running.joined_s = self.context.clock()
                self._report_started(self.scheduler.join(request_id, first_tokens))
                if request_id not in self.scheduler:
                    self.end(request_id, WITHDRAWN)
            case Cancel(request_id=request_id, choice=int(choice)):
                if request_id in self.context.requests and self.scheduler.end(request_id, choice):
                    self.end(request_id, WITHDRAWN)
            case Cancel():
                self.cancel(request)
            case _:
                self.context.counters["dropped_wrong_role"] += 1

    def on_transfer(self, event: WorkerEvent) -> None:
        match event:
            case Arrived():
                self.receiver.arrived(event)
            case Aborted(reason=reason):
                ended = self.receiver.aborted(event)
                if ended is not None and reason != WITHDRAWN:  # else the router's Cancel is on its way
                    self._fail_transfer(ended, reason)
            case TransferLost(rank=rank):
                lost = self.receiver.rank_lost(rank)
                message = "KV did not arrive: the transfer process was restarted"
                found = [self.context.requests.of_transfer(transfer_id) for transfer_id in lost]
                self.each(
                    "transfer_lost",
                    [running for running in found if running is not None],
                    lambda running: self.fail(running.work.request_id, "transfer", message, True),
                )

    @property
    def in_flight(self) -> bool:
        return super().in_flight or self.receiver.in_flight

    def step(self) -> bool:
        self._settle_transfers()
        self._reserve()
        self.copy_pages(self.scheduler.start())
        return super().step() or self.receiver.in_flight

    def occupancy(self) -> Occupancy:
        scheduler = self.scheduler
        return Occupancy(
            queued=len(scheduler.waiting) + len(scheduler.batch.resuming),
            running=len(scheduler.batch),
            reserved=scheduler.reserved,
        )

    def release(self, request_id: int, reason: str) -> None:
        running = self.context.requests.get(request_id)
        if running is not None and running.transfer_id is not None:
            self.receiver.end(running.transfer_id, abort_reason=reason)
        self._sources.pop(request_id, None)
        self._transfer_s.pop(request_id, None)
        self.scheduler.end(request_id)

    # ------------------------------------------------------------ transfers

    def _reserve(self) -> None:
        """Pages for waiting prompts; a prompt that is wholly in the prefix cache has arrived at once."""
        if not self.receiver.ready:
            return
        now_s = self.context.clock()
        for sequence in self.scheduler.reserve():
            try:
                self._ask_for(sequence, now_s)
            except Exception as error:
                self.contain("reserve", sequence.work.request_id, error)

    def _ask_for(self, sequence: Sequence, now_s: float) -> None:
        """Has the KV of a prompt that has its pages sent."""
        request_id = sequence.work.request_id
        running = self.context.requests.get(request_id)
        if running is None or running.transfer_id is None:
            return
        source = self._sources.pop(request_id)
        left_s = max(running.deadline_at_s - now_s, 0.001)
        try:
            nothing_is_missing = self.receiver.open(sequence, running.transfer_id, source, left_s)
        except ValueError as error:
            self._fail_transfer(running.transfer_id, str(error))
            return
        if nothing_is_missing:
            self._arrived(request_id, 0.0)

    def _settle_transfers(self) -> None:
        settled = self.receiver.settle()
        for transfer_id, reason in settled.broken:
            self.context.counters["checksum_mismatches"] += 1
            self._fail_transfer(transfer_id, reason)
        for incoming in settled.whole:
            request_id = incoming.sequence.work.request_id
            try:
                self._arrived(request_id, incoming.transfer_s)
            except Exception as error:
                self.contain("arrival", request_id, error)

    def _arrived(self, request_id: int, transfer_s: float) -> None:
        self._transfer_s[request_id] = transfer_s
        self._report_started(self.scheduler.arrived(request_id))

    def _fail_transfer(self, transfer_id: int, reason: str) -> None:
        running = self.context.requests.of_transfer(transfer_id)
        if running is not None:
            self.fail(running.work.request_id, "transfer", f"KV did not arrive: {reason}", True)

    def _report_started(self, reservation: Reservation | None) -> None:
        if reservation is None:
            return
        prompt = reservation.prompt
        running = self.context.requests.get(prompt.work.request_id)
        if running is None or running.joined_s is None:
            return
        self.context.outbox.add(
            running.router,
            DecodeStarted(
                request_id=prompt.work.request_id,
                transfer_s=self._transfer_s.pop(prompt.work.request_id, 0.0),
                tail_s=self.context.clock() - running.joined_s,
                transferred_tokens=prompt.prompt_tokens - prompt.cached_tokens,
                cached_tokens=prompt.cached_tokens,
            ),
        )
