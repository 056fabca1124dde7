"""The decode role: reserve pages, take KV in, decode.

1. `ReserveKv` comes in: the request waits until there are pages for its prompt.
2. Pages are taken (less what the prefix cache has) and the KV is asked of the source.
3. Arrived segments are unpacked beside the steps; when the last is done the transfer is committed.
4. `StartDecode` names the choices that go on and their first tokens; with both, they enter the batch.
5. Each step draws one token a choice, until it ends here, or the router ends it.
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
from services.transfer.pull_parts import PullParts


class DecodeRole(DecodingRole[DecodeScheduler]):
    def __init__(self, parts: WorkerContext, pull: PullParts) -> None:
        super().__init__(parts, DecodeScheduler)
        self.pull = pull
        self._sources: dict[int, WorkerTransferAddress] = {}
        self._transfer_s: dict[int, float] = {}

    def accept(self, router: bytes, request: Request) -> None:
        match request:
            case ReserveKv(work=work, transfer_id=transfer_id, source=source):
                if self.take(router, work, transfer_id, len(self.scheduler.waiting)) is not None:
                    self.scheduler.add(work)
                    self._sources[work.request_id] = source
            case StartDecode(request_id=request_id, first_tokens=first_tokens):
                live = self.parts.requests.get(request_id)
                if live is None or any(one.choice not in live.work.choice_numbers for one in first_tokens):
                    self.parts.counters["dropped_join"] += 1
                    return
                live.joined_s = self.parts.clock()
                self._report_started(self.scheduler.join(request_id, first_tokens))
                if request_id not in self.scheduler:
                    self.end(request_id, WITHDRAWN)
            case Cancel(request_id=request_id, choice=int(choice)):
                if request_id in self.parts.requests and self.scheduler.end(request_id, choice):
                    self.end(request_id, WITHDRAWN)
            case Cancel():
                self.cancel(request)
            case _:
                self.parts.counters["dropped_wrong_role"] += 1

    def on_transfer(self, event: WorkerEvent) -> None:
        match event:
            case Arrived():
                self.pull.unpack(event)
            case Aborted(reason=reason):
                ended = self.pull.aborted(event)
                if ended is not None and reason != WITHDRAWN:  # else the router's Cancel is on its way
                    self._fail_transfer(ended, reason)
            case TransferLost(rank=rank):
                lost = self.pull.open_ids()
                self.pull.clear(rank)
                message = "KV did not arrive: the transfer process was restarted"
                lives = [live for one in lost if (live := self.parts.requests.of_transfer(one)) is not None]
                self.each(
                    "transfer_lost",
                    lives,
                    lambda live: self.fail(live.work.request_id, "transfer", message, True),
                )

    @property
    def in_flight(self) -> bool:
        return super().in_flight or self.pull.in_flight

    def step(self) -> bool:
        self._settle_transfers()
        self._reserve()
        self.copy_pages(self.scheduler.start())
        return super().step() or self.pull.in_flight

    def occupancy(self) -> Occupancy:
        scheduler = self.scheduler
        return Occupancy(
            queued=len(scheduler.waiting) + len(scheduler.batch.resuming),
            running=len(scheduler.batch),
            reserved=scheduler.reserved,
        )

    def release(self, request_id: int, reason: str) -> None:
        live = self.parts.requests.get(request_id)
        if live is not None and live.transfer_id is not None:
            self.pull.close(live.transfer_id, abort_reason=reason)
        self._sources.pop(request_id, None)
        self._transfer_s.pop(request_id, None)
        self.scheduler.end(request_id)

    # ------------------------------------------------------------ transfers

    def _reserve(self) -> None:
        """Pages for waiting prompts; a prompt that is wholly in the prefix cache has arrived at once."""
        if not self.pull.ready:
            return
        now_s = self.parts.clock()
        for sequence in self.scheduler.reserve():
            try:
                self._ask_for(sequence, now_s)
            except Exception as error:
                self.contain("reserve", sequence.work.request_id, error)

    def _ask_for(self, sequence: Sequence, now_s: float) -> None:
        """Has the KV of a prompt that has its pages sent."""
        request_id = sequence.work.request_id
        live = self.parts.requests.get(request_id)
        if live is None or live.transfer_id is None:
            return
        source = self._sources.pop(request_id)
        left_s = max(live.deadline_at_s - now_s, 0.001)
        try:
            incoming = self.pull.open(sequence, live.transfer_id, source, left_s)
        except ValueError as error:
            self._fail_transfer(live.transfer_id, str(error))
            return
        if incoming.missing_tokens == 0:
            self._arrived(request_id, 0.0)

    def _settle_transfers(self) -> None:
        settled = self.pull.settle()
        for transfer_id, reason in settled.broken:
            self.parts.counters["checksum_mismatches"] += 1
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
        live = self.parts.requests.of_transfer(transfer_id)
        if live is not None:
            self.fail(live.work.request_id, "transfer", f"KV did not arrive: {reason}", True)

    def _report_started(self, reservation: Reservation | None) -> None:
        if reservation is None:
            return
        prompt = reservation.prompt
        live = self.parts.requests.get(prompt.work.request_id)
        if live is None or live.joined_s is None:
            return
        self.parts.outbox.add(
            live.router,
            DecodeStarted(
                request_id=prompt.work.request_id,
                transfer_s=self._transfer_s.pop(prompt.work.request_id, 0.0),
                tail_s=self.parts.clock() - live.joined_s,
                transferred_tokens=prompt.prompt_tokens - prompt.cached_tokens,
                cached_tokens=prompt.cached_tokens,
            ),
        )
