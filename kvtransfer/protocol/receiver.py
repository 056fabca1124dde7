"""The state machine of incoming transfers: it offers and grants, and checks the reports of writes.

    1. `open`           the worker has pages: connect to the source, then offer            CONNECTING → OPEN
    2. `grant`          free slots go to the open transfers, those with fewest first
    3. `on_written`     each segment is checked against its grant, then given to the worker
    4. `commit`         all there: notify the source, void what is left of the grants      OPEN → COMMITTED
    5. `on_closed`      the source has nothing in flight: quarantined slots are free       → ENDED

A failure at any point (`abort`, `on_cancel`, a deadline, a lost source) leads to CANCELLED, where slots that
the source may still write stay in quarantine until it sends `Closed` or its incarnation is known to have
ended. Nothing that a peer or a worker sends raises here: what is not allowed is dropped and counted.
"""

from kvtransfer.messages import Aborted, Arrived, OpenReceive, Segment, SlotUse, TransferAddress
from kvtransfer.protocol.limits import TransferLimits
from kvtransfer.protocol.outbox import Outbox
from kvtransfer.protocol.peer_messages import CancelTransfer, Committed, Grant, Offer, Written
from kvtransfer.protocol.receive import CLOSING, IncomingSegments, ReceiveState
from kvtransfer.protocol.slots import Direction, SlotPool, SlotState


class Receiver:
    """The state of all incoming transfers. Time comes in as `now_s`; what is to be done goes to `outbox`."""

    def __init__(self, pool: SlotPool, limits: TransferLimits, outbox: Outbox) -> None:
        self._pool, self.limits, self._out = pool, limits, outbox
        self._transfers: dict[int, IncomingSegments] = {}
        self._ready: set[TransferAddress] = set()

    @property
    def open_transfers(self) -> int:
        """Transfers the worker still waits for."""
        return sum(t.state not in CLOSING for t in self._transfers.values())

    def uses(self, source: TransferAddress) -> bool:
        """Whether any transfer, or any quarantined slot, still depends on this incarnation of this source."""
        return any(t.source == source for t in self._transfers.values())

    # ------------------------------------------------------------ the worker's side

    def open(self, command: OpenReceive, now_s: float) -> None:
        out, transfer_id = self._out, command.transfer_id
        if transfer_id in self._transfers:
            out.drops["receive_open_twice"] += 1
            return
        if command.end_token < command.start_token:
            out.drops["receive_bad_range"] += 1
            out.to_worker.append(Aborted(transfer_id, "end_token lies before start_token"))
            return
        limits = self.limits
        if command.kv_heads > limits.kv_heads:
            out.drops["receive_bad_heads"] += 1
            out.to_worker.append(Aborted(transfer_id, f"there are {limits.kv_heads} heads here"))
            return
        if len(self._transfers) >= limits.max_transfers:
            out.to_worker.append(Aborted(transfer_id, "too many open transfers"))
            return
        kv_heads = command.kv_heads or limits.kv_heads
        transfer = IncomingSegments(
            transfer_id,
            command.source,
            command.start_token,
            command.end_token,
            now_s + command.deadline_s,
            kv_heads,
            limits.token_bytes_of(kv_heads),
            limits.segment_tokens_of(kv_heads),
        )
        self._transfers[transfer_id] = transfer
        if command.source in self._ready:
            self._offer(transfer, now_s)
        else:
            out.connects.append(command.source)

    def commit(self, transfer_id: int, now_s: float) -> None:
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.state not in (ReceiveState.CONNECTING, ReceiveState.OPEN):
            self._out.drops["commit_unknown"] += 1
        elif transfer.arrived.tokens < transfer.end_token - transfer.start_token:
            self._out.drops["commit_incomplete"] += 1
            self._fail(transfer, "committed before every token had arrived", now_s)
        elif transfer.state is ReceiveState.CONNECTING:
            transfer.transition(ReceiveState.COMMIT_PENDING)
        else:
            self._commit(transfer, now_s)

    def abort(self, transfer_id: int, reason: str, now_s: float) -> bool:
        """The worker gives up; it gets no reply. False if no such transfer is open."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.state in CLOSING:
            return False
        self._fail(transfer, reason, now_s, notify_worker=False)
        return True

    def freed(self, use: SlotUse, now_s: float) -> None:
        """The worker has unpacked, or dropped, a FILLED receive slot."""
        holder = self._pool.holder(use.slot)
        if holder is None or holder.generation != use.generation or holder.state is not SlotState.FILLED:
            self._out.drops["freed_stale"] += 1
            return
        self._pool.release(use, now_s)

    def worker_gone(self, reason: str, now_s: float) -> None:
        """Nobody waits for anything any more, and nobody reads any slot."""
        for transfer in list(self._transfers.values()):
            if transfer.state not in CLOSING:
                self._fail(transfer, reason, now_s, notify_worker=False)
        for use in self._pool.uses(Direction.RECEIVE, SlotState.FILLED):
            self._pool.release(use, now_s)

    # ------------------------------------------------------------ the source's side

    def source_ready(self, source: TransferAddress, now_s: float) -> None:
        """The source is connected, for the first time or again after a loss in the same incarnation."""
        self._ready.add(source)
        for transfer in self._of(source):
            if transfer.state in CLOSING:
                self._send_outcome(transfer, now_s)
            else:
                self._offer(transfer, now_s)

    def source_lost(self, source: TransferAddress, reason: str, now_s: float) -> None:
        """The source has no connection, but may be alive, and writing."""
        self._ready.discard(source)
        for transfer in self._of(source):
            if transfer.state not in CLOSING:
                self._fail(transfer, reason, now_s)
            if transfer.state is not ReceiveState.ENDED and not transfer.granted:
                self._end(transfer, now_s)

    def source_gone(self, source: TransferAddress, reason: str, now_s: float) -> None:
        """That incarnation has ended and nothing it sent can arrive any more: quarantine ends."""
        self.source_lost(source, reason, now_s)
        for transfer in self._of(source):
            self._end(transfer, now_s)

    def on_ready(self, source: TransferAddress, transfer_id: int) -> None:
        transfer = self._find(source, transfer_id, "ready")
        if transfer is not None:
            transfer.ready = True

    def on_written(self, source: TransferAddress, message: Written, now_s: float) -> None:
        transfer = self._find(source, message.transfer_id, "written")
        if transfer is None:
            return
        if transfer.state is not ReceiveState.OPEN:
            self._out.drops["written_late"] += len(message.segments)
            return
        accepted: list[Segment] = []
        for segment in message.segments:
            fault = transfer.fault(segment)
            if fault is not None:
                self._out.drops[fault] += 1
                continue
            use = transfer.granted.pop(segment.slot)
            transfer.arrived.add(segment.start_token, segment.start_token + segment.token_count)
            self._pool.fill(use, now_s)
            transfer.ready = True
            accepted.append(segment)
            self._out.spans.note(
                transfer.transfer_id, "arrive", segment.start_token, segment.token_count, now_s, now_s
            )
        if accepted:
            self._out.to_worker.append(Arrived(transfer.transfer_id, accepted))

    def on_cancel(self, source: TransferAddress, message: CancelTransfer, now_s: float) -> None:
        transfer = self._find(source, message.transfer_id, "cancel")
        if transfer is not None and transfer.state not in CLOSING:
            self._fail(transfer, message.reason, now_s, notify_source=False)

    def on_closed(self, source: TransferAddress, transfer_id: int, now_s: float) -> None:
        transfer = self._find(source, transfer_id, "closed")
        if transfer is None:
            return
        if transfer.state not in CLOSING:
            # Nothing of the source is in flight and nothing will start, so there is no quarantine either.
            self._fail(transfer, "closed by the source", now_s, notify_source=False)
        if transfer.state is not ReceiveState.ENDED:
            self._end(transfer, now_s)

    # ------------------------------------------------------------ time and slots

    def tick(self, now_s: float) -> None:
        """Deadlines, repeated `Committed` and `CancelTransfer`, and the last resort against sources that
        never answer."""
        for transfer in list(self._transfers.values()):
            if transfer.state not in CLOSING:
                if now_s >= transfer.deadline_s:
                    self._fail(transfer, "deadline", now_s)
            elif now_s >= transfer.closing_since_s + self.limits.quarantine_s:
                self._out.drops["quarantine_expired"] += len(transfer.granted)
                self._end(transfer, now_s)
            elif now_s >= transfer.resend_at_s:
                self._send_outcome(transfer, now_s)

    def next_deadline_s(self) -> float | None:
        return min(
            (t.resend_at_s if t.state in CLOSING else t.deadline_s for t in self._transfers.values()),
            default=None,
        )

    def grant(self, now_s: float) -> None:
        """Grants free slots to the open transfers, one at a time: to those that are ready first, then to
        those that have fewest, oldest first."""
        pool, limits = self._pool, self.limits
        wanting = [
            t for t in self._transfers.values() if t.state is ReceiveState.OPEN and t.needs_slots() > 0
        ]
        unready_slots = sum(len(t.granted) for t in self._transfers.values() if not t.ready)
        open_transfers = sum(t.state is ReceiveState.OPEN for t in self._transfers.values()) if wanting else 0
        given: dict[int, list[SlotUse]] = {}
        while wanting and pool.free and pool.in_use(Direction.RECEIVE) < limits.receive_slots:
            transfer = min(wanting, key=lambda t: (not t.ready, len(t.granted)))
            full = not transfer.ready and unready_slots >= limits.unready_slots
            if full or len(transfer.granted) >= self._slot_quota(transfer, open_transfers):
                wanting.remove(transfer)
                continue
            unready_slots += not transfer.ready
            use = pool.take(transfer.transfer_id, Direction.RECEIVE, now_s)
            transfer.granted[use.slot] = use
            given.setdefault(transfer.transfer_id, []).append(use)
            if transfer.needs_slots() <= 0:
                wanting.remove(transfer)
        for transfer_id, uses in given.items():
            self._out.to_sources.append((self._transfers[transfer_id].source, Grant(transfer_id, uses)))

    def _slot_quota(self, transfer: IncomingSegments, open_transfers: int) -> int:
        limits, free = self.limits, self._pool.free
        if transfer.arrived.tokens:
            return limits.slots_per_transfer
        few = limits.idle_slots_per_transfer if 2 * free >= len(self._pool) else 1
        if not transfer.ready:
            return few
        return max(few, limits.before_data(free, len(transfer.granted), open_transfers))

    # ------------------------------------------------------------ internals

    def _of(self, source: TransferAddress) -> list[IncomingSegments]:
        return [t for t in self._transfers.values() if t.source == source]

    def _find(self, source: TransferAddress, transfer_id: int, what: str) -> IncomingSegments | None:
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            self._out.drops[f"{what}_unknown"] += 1
            return None
        if transfer.source != source:
            self._out.drops[f"{what}_wrong_peer"] += 1
            return None
        return transfer

    def _offer(self, transfer: IncomingSegments, now_s: float) -> None:
        if transfer.state not in (ReceiveState.CONNECTING, ReceiveState.COMMIT_PENDING):
            return
        offer = Offer(
            transfer.transfer_id,
            transfer.start_token,
            transfer.end_token,
            transfer.kv_heads,
            transfer.segment_tokens,
            self.limits.tp,
        )
        self._out.to_sources.append((transfer.source, offer))
        if transfer.state is ReceiveState.COMMIT_PENDING:
            self._commit(transfer, now_s)
        else:
            transfer.transition(ReceiveState.OPEN)

    def _commit(self, transfer: IncomingSegments, now_s: float) -> None:
        transfer.transition(ReceiveState.COMMITTED)
        self._begin_closing(transfer, now_s)
        self._send_outcome(transfer, now_s)

    def _fail(
        self,
        transfer: IncomingSegments,
        reason: str,
        now_s: float,
        *,
        notify_worker: bool = True,
        notify_source: bool = True,
    ) -> None:
        """Fails a transfer that the worker still waits for. A commit already given needs no answer."""
        transfer.reason = reason
        if notify_worker and transfer.state is not ReceiveState.COMMIT_PENDING:
            self._out.to_worker.append(Aborted(transfer.transfer_id, reason))
        if transfer.state is not ReceiveState.OPEN:
            self._end(transfer, now_s)
            return
        transfer.transition(ReceiveState.CANCELLED)
        self._begin_closing(transfer, now_s)
        if notify_source:
            self._send_outcome(transfer, now_s)

    def _begin_closing(self, transfer: IncomingSegments, now_s: float) -> None:
        transfer.closing_since_s = now_s
        transfer.resend_at_s = now_s + self.limits.resend_s
        for use in transfer.granted.values():
            self._pool.quarantine(use, now_s)

    def _send_outcome(self, transfer: IncomingSegments, now_s: float) -> None:
        transfer.resend_at_s = now_s + self.limits.resend_s
        if transfer.source not in self._ready:
            return
        if transfer.state is ReceiveState.COMMITTED:
            self._out.to_sources.append((transfer.source, Committed(transfer.transfer_id)))
        else:
            self._out.to_sources.append(
                (transfer.source, CancelTransfer(transfer.transfer_id, transfer.reason))
            )

    def _end(self, transfer: IncomingSegments, now_s: float) -> None:
        transfer.transition(ReceiveState.ENDED)
        for use in transfer.granted.values():
            self._pool.release(use, now_s)
        transfer.granted.clear()
        del self._transfers[transfer.transfer_id]
