"""The state machine of outgoing transfers: it assigns slots to the worker, posts writes to the mover, and
reports them to the destination.

    1. `open` and `on_offer`, in either order       WAITING or OFFERED → CONFIRMED
    2. `on_grant`          remote slots that may be written, kept first come first served; the worker is
                           notified how many
    3. `assign`            the worker has as many local slots as prompts with pages have grants: what is
                           assigned will be packed, and what is packed can be moved. An assigned slot belongs
                           to no transfer before it is packed: none waits for tokens that are still being
                           computed, and no two transfers can ever wait for each other's slots
    4. `filled`            packed segments are paired with grants and posted, a few to a write
    5. `write_done`        local slots are free, the destination is notified what lies where
    6. `on_committed`      the worker may free its KV                                CONFIRMED → ENDED

A failure at any point leads to ENDED, through CLOSING while a write is in flight: local slots stay in
quarantine until the mover is done with them, and only then is `Closed` sent to the destination. A slot that
the worker has packed for a transfer that has ended stays assigned to the worker.
"""

from collections import OrderedDict

from kvtransfer.messages import (
    Aborted,
    Filled,
    OpenSend,
    Segment,
    SendCommitted,
    SendConfirmed,
    SendGranted,
    SendSlots,
    SlotUse,
)
from kvtransfer.protocol.limits import TransferLimits
from kvtransfer.protocol.outbox import Destination, Outbox, SlotCopy, Write
from kvtransfer.protocol.peer_messages import CancelTransfer, Closed, Grant, Offer, Ready, Written
from kvtransfer.protocol.send import UNOPENED, InFlightWrite, OutgoingTransfer, SendState, placed
from kvtransfer.protocol.slots import Direction, SlotPool

REMEMBERED_ENDS = 8192
PIECES_A_WRITE = 2
"""The other side unpacks, and local slots come back, while the next write runs; fewer would cost more to
begin and to end than the link takes to move them."""


class Sender:
    """The state of all outgoing transfers. Time comes in as `now_s`; what is to be done goes to `outbox`."""

    def __init__(self, pool: SlotPool, limits: TransferLimits, outbox: Outbox) -> None:
        self._pool, self.limits, self._out = pool, limits, outbox
        self._transfers: dict[int, OutgoingTransfer] = {}
        self._writes: dict[int, InFlightWrite] = {}
        self._next_write_id = 1
        self._assigned: dict[int, SlotUse] = {}
        """By slot, what the worker has been assigned and has neither filled nor given back."""
        self._ended: OrderedDict[int, None] = OrderedDict()
        """Lately ended transfers, so that an offer that comes too late is refused at once."""

    @property
    def open_transfers(self) -> int:
        """Transfers the worker still waits for."""
        return sum(t.state in (SendState.WAITING, SendState.CONFIRMED) for t in self._transfers.values())

    def uses(self, destination: Destination) -> bool:
        """Whether a write to this destination may be in flight."""
        return any(t.destination == destination and t.writes for t in self._transfers.values())

    # ------------------------------------------------------------ the worker's side

    def open(self, command: OpenSend, now_s: float) -> None:
        transfer_id, deadline_s = command.transfer_id, now_s + command.deadline_s
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            if len(self._transfers) >= self.limits.max_transfers:
                self._out.to_worker.append(Aborted(transfer_id, "too many open transfers"))
            elif transfer_id in self._ended:
                self._out.to_worker.append(Aborted(transfer_id, "the destination has given it up"))
            else:
                self._transfers[transfer_id] = OutgoingTransfer(transfer_id, SendState.WAITING, deadline_s)
        elif transfer.state in UNOPENED:
            transfer.deadline_s = deadline_s
            self._confirm(transfer)
        else:
            self._out.drops["send_open_twice"] += 1

    def ready(self, transfer_id: int) -> None:
        """The worker has pages for the prompt."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            if transfer_id not in self._ended:
                self._out.drops["ready_unknown"] += 1
        elif not transfer.ready:
            transfer.ready = True
            if transfer.state is SendState.CONFIRMED:
                self._send_ready(transfer)

    def filled(self, command: Filled, now_s: float) -> None:
        """Posts what the worker has packed; a segment that does not fit the transfer fails it."""
        transfer = self._transfers.get(command.transfer_id)
        pieces: list[SlotCopy] = []
        local: list[SlotUse] = []
        remote: list[Segment] = []
        fault: str | None = None
        for segment in command.segments:
            use = SlotUse(segment.slot, segment.generation)
            if self._assigned.get(segment.slot) != use:
                self._out.drops["filled_not_lent"] += 1
                continue
            del self._assigned[segment.slot]
            self._pool.fill(use, now_s)
            local.append(use)
            if transfer is None or transfer.state is not SendState.CONFIRMED:
                self._out.drops["filled_late"] += 1
            elif fault is None and (fault := transfer.fault(segment)) is None:
                grant = transfer.grants.popleft()
                transfer.packed.add(segment.start_token, segment.start_token + segment.token_count)
                pieces.append(SlotCopy(segment.slot, grant.slot, segment.byte_count))
                remote.append(placed(segment, grant))
        if transfer is None or fault is not None or len(pieces) < len(local):
            self._abandon(local, now_s)
            if transfer is not None and fault is not None:
                self._out.drops[fault] += 1
                self._fail(transfer, f"the worker's segment is {fault}", now_s)
            return
        for at in range(0, len(pieces), PIECES_A_WRITE):
            part = slice(at, at + PIECES_A_WRITE)
            self._post(transfer, pieces[part], local[part], remote[part], now_s)

    def returned(self, use: SlotUse, now_s: float) -> None:
        """The worker gives back an assigned slot that it has not filled."""
        if self._assigned.get(use.slot) != use:
            self._out.drops["freed_stale"] += 1
            return
        del self._assigned[use.slot]
        self._pool.release(use, now_s)

    def abort(self, transfer_id: int, reason: str, now_s: float) -> bool:
        """The worker gives up; it gets no reply. False if no such transfer is open."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.state is SendState.CLOSING:
            self._remember(transfer_id)
            return False
        self._fail(transfer, reason, now_s, notify_worker=False)
        return True

    def worker_gone(self, reason: str, now_s: float) -> None:
        """The worker is gone. Nobody waits for anything any more, and nobody packs: assigned slots are free
        at once."""
        for transfer in list(self._transfers.values()):
            if transfer.state is not SendState.CLOSING:
                self._fail(transfer, reason, now_s, notify_worker=False)
        for use in list(self._assigned.values()):
            self.returned(use, now_s)

    # ------------------------------------------------------------ the destination's side

    def on_offer(self, destination: Destination, message: Offer, now_s: float) -> None:
        transfer = self._transfers.get(message.transfer_id)
        if transfer is None:
            refusal = self._refusal(message)
            if refusal is not None:
                self._send(destination, CancelTransfer(message.transfer_id, refusal))
                self._send(destination, Closed(message.transfer_id))
                return
            transfer = OutgoingTransfer(
                message.transfer_id, SendState.OFFERED, now_s + self.limits.offer_timeout_s
            )
            self._transfers[message.transfer_id] = transfer
        elif transfer.state is not SendState.WAITING or self._is_bad(message):
            self._out.drops["offer_twice"] += 1
            return
        transfer.destination = destination
        transfer.offered(message, self.limits)
        if transfer.state is SendState.WAITING:
            self._confirm(transfer)

    def on_grant(self, destination: Destination, message: Grant, remote_slots: int) -> None:
        """Records a grant. `remote_slots` is how many slots the destination has, by its hello."""
        transfer = self._find(destination, message.transfer_id, "grant")
        if transfer is None:
            return
        if transfer.state not in (SendState.OFFERED, SendState.CONFIRMED):
            self._out.drops["grant_late"] += len(message.slots)
            return
        known = len(transfer.grants)
        for use in message.slots:
            if use.slot >= remote_slots:
                self._out.drops["grant_out_of_range"] += 1
            elif use.generation <= transfer.grant_generations.get(use.slot, 0):
                self._out.drops["grant_stale_generation"] += 1
            else:
                transfer.grant_generations[use.slot] = use.generation
                transfer.grants.append(use)
        if transfer.state is SendState.CONFIRMED and len(transfer.grants) > known:
            self._out.to_worker.append(SendGranted(transfer.transfer_id, len(transfer.grants) - known))

    def on_committed(self, destination: Destination, transfer_id: int, now_s: float) -> None:
        transfer = self._find(destination, transfer_id, "committed", closed_if_unknown=True)
        if transfer is None:
            return
        if transfer.state is SendState.OFFERED:
            transfer.transition(SendState.EARLY_COMMITTED)
            self._send(destination, Closed(transfer_id))
        elif transfer.state is SendState.EARLY_COMMITTED:
            self._send(destination, Closed(transfer_id))
        elif transfer.state is SendState.CONFIRMED:
            self._out.to_worker.append(SendCommitted(transfer_id))
            self._finish(transfer, now_s)

    def on_cancel(self, destination: Destination, message: CancelTransfer, now_s: float) -> None:
        waiting = self._transfers.get(message.transfer_id)
        if waiting is not None and waiting.state is SendState.WAITING:
            # Its offer was lost. One that came later would name slots that `Closed` has made free.
            self._fail(waiting, message.reason, now_s)
            self._send(destination, Closed(message.transfer_id))
            return
        transfer = self._find(destination, message.transfer_id, "cancel", closed_if_unknown=True)
        if transfer is None or transfer.state is SendState.CLOSING:
            return
        self._fail(transfer, message.reason, now_s, notify_destination=False)

    def destination_lost(self, destination: Destination, reason: str, now_s: float) -> None:
        for transfer in list(self._transfers.values()):
            if transfer.destination == destination and transfer.state is not SendState.CLOSING:
                self._fail(transfer, reason, now_s)

    # ------------------------------------------------------------ the mover's side

    def write_done(self, write_id: int, now_s: float) -> None:
        flight, transfer = self._landed(write_id, now_s)
        for one in flight.remote:
            self._out.spans.note(
                flight.transfer_id, "send", one.start_token, one.token_count, flight.filled_s, now_s
            )
        if transfer.state is SendState.CONFIRMED:
            self._send(transfer.destination, Written(flight.transfer_id, list(flight.remote)))
        elif not transfer.writes:
            self._end(transfer)

    def write_failed(self, write_id: int, reason: str, now_s: float) -> None:
        """Nothing of the write is in flight any more."""
        _, transfer = self._landed(write_id, now_s)
        if transfer.state is SendState.CONFIRMED:
            self._fail(transfer, reason, now_s)
        elif not transfer.writes:
            self._end(transfer)

    # ------------------------------------------------------------ time and slots

    def tick(self, now_s: float) -> None:
        for transfer in list(self._transfers.values()):
            if transfer.state is not SendState.CLOSING and now_s >= transfer.deadline_s:
                unopened = transfer.state in UNOPENED
                self._fail(transfer, "no such request here" if unopened else "deadline", now_s)

    def next_deadline_s(self) -> float | None:
        return min(
            (t.deadline_s for t in self._transfers.values() if t.state is not SendState.CLOSING),
            default=None,
        )

    def assign(self, now_s: float) -> None:
        """Assigns free slots to the worker, in all as many as there are grants that could be used at once."""
        pool = self._pool
        if not pool.free:
            return
        wanted = sum(transfer.wanted_slots() for transfer in self._transfers.values()) - len(self._assigned)
        uses = [pool.take(0, Direction.SEND, now_s) for _ in range(min(pool.free, wanted))]
        if uses:
            self._assigned |= {use.slot: use for use in uses}
            self._out.to_worker.append(SendSlots(uses))

    # ------------------------------------------------------------ internals

    def _find(
        self, destination: Destination, transfer_id: int, what: str, *, closed_if_unknown: bool = False
    ) -> OutgoingTransfer | None:
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            if closed_if_unknown:
                self._remember(transfer_id)
                self._send(destination, Closed(transfer_id))
            else:
                self._out.drops[f"{what}_unknown"] += 1
            return None
        if transfer.destination != destination:
            self._out.drops[f"{what}_wrong_peer"] += 1
            if closed_if_unknown:  # True whatever else goes on: nothing of it is in flight to *this* peer.
                self._send(destination, Closed(transfer_id))
            return None
        return transfer

    def _refusal(self, message: Offer) -> str | None:
        if message.transfer_id in self._ended:
            return "the source has given it up"
        if self._is_bad(message):
            return f"no tokens [{message.start_token}, {message.end_token}) of {message.kv_heads} heads here"
        if len(self._transfers) >= self.limits.max_transfers:
            return "too many open transfers"
        return None

    def _is_bad(self, offer: Offer) -> bool:
        return offer.end_token < offer.start_token or offer.kv_heads > self.limits.kv_heads

    def _confirm(self, transfer: OutgoingTransfer) -> None:
        confirmed = SendConfirmed(
            transfer.transfer_id,
            transfer.start_token,
            transfer.end_token,
            transfer.kv_heads,
            transfer.segment_tokens,
            transfer.tp,
        )
        self._out.to_worker.append(confirmed)
        if transfer.state is SendState.EARLY_COMMITTED:
            self._out.to_worker.append(SendCommitted(transfer.transfer_id))
            self._end(transfer, send_closed=False)
        else:
            transfer.transition(SendState.CONFIRMED)
            if transfer.grants:
                self._out.to_worker.append(SendGranted(transfer.transfer_id, len(transfer.grants)))
            if transfer.ready:
                self._send_ready(transfer)

    def _send_ready(self, transfer: OutgoingTransfer) -> None:
        if transfer.end_token > transfer.start_token:  # else it may have ended there
            self._send(transfer.destination, Ready(transfer.transfer_id))

    def _fail(
        self,
        transfer: OutgoingTransfer,
        reason: str,
        now_s: float,
        *,
        notify_worker: bool = True,
        notify_destination: bool = True,
    ) -> None:
        if notify_worker and transfer.state in (SendState.WAITING, SendState.CONFIRMED):
            self._out.to_worker.append(Aborted(transfer.transfer_id, reason))
        if notify_destination and transfer.state in (SendState.OFFERED, SendState.CONFIRMED):
            self._send(transfer.destination, CancelTransfer(transfer.transfer_id, reason))
        self._finish(transfer, now_s)

    def _finish(self, transfer: OutgoingTransfer, now_s: float) -> None:
        """Ends the transfer as far as the worker goes; sends `Closed` to the destination when it is true."""
        transfer.grants.clear()
        if not transfer.writes:
            self._end(transfer)
            return
        transfer.transition(SendState.CLOSING)
        for write_id in transfer.writes:
            for use in self._writes[write_id].local:
                self._pool.quarantine(use, now_s)

    def _end(self, transfer: OutgoingTransfer, *, send_closed: bool = True) -> None:
        if send_closed and transfer.state in (SendState.OFFERED, SendState.CONFIRMED, SendState.CLOSING):
            self._send(transfer.destination, Closed(transfer.transfer_id))
        transfer.transition(SendState.ENDED)
        del self._transfers[transfer.transfer_id]
        self._remember(transfer.transfer_id)

    def _landed(self, write_id: int, now_s: float) -> tuple[InFlightWrite, OutgoingTransfer]:
        flight = self._writes.pop(write_id)
        transfer = self._transfers[flight.transfer_id]
        transfer.writes.discard(write_id)
        for use in flight.local:
            self._pool.release(use, now_s)
        return flight, transfer

    def _post(
        self,
        transfer: OutgoingTransfer,
        pieces: list[SlotCopy],
        local: list[SlotUse],
        remote: list[Segment],
        now_s: float,
    ) -> None:
        write_id, self._next_write_id = self._next_write_id, self._next_write_id + 1
        transfer.writes.add(write_id)
        self._writes[write_id] = InFlightWrite(transfer.transfer_id, tuple(local), tuple(remote), now_s)
        self._out.writes.append(Write(write_id, transfer.destination, transfer.transfer_id, tuple(pieces)))

    def _abandon(self, local: list[SlotUse], now_s: float) -> None:
        """Frees slots that are packed and will not be posted."""
        for use in local:
            self._pool.release(use, now_s)

    def _remember(self, transfer_id: int) -> None:
        self._ended[transfer_id] = None
        if len(self._ended) > REMEMBERED_ENDS:
            self._ended.popitem(last=False)

    def _send(self, destination: Destination, message: CancelTransfer | Closed | Ready | Written) -> None:
        self._out.to_destinations.append((destination, message))
