"""The worker's client of its transfer process: commands, events and the mapped staging buffer.

It is for a single-threaded loop: poll `socket`, call `receive` when something is there, queue commands by the
methods named like them, `flush` once a step, `tick` now and then. Nothing blocks but the constructor.

If the transfer process is restarted, the client attaches again by itself and maps the new buffer; the worker
then gets one `TransferLost` event, upon which it has to drop every transfer it had. Until the new `Attached`
comes, `ready` is False and commands are dropped: they would all be about transfers that no longer exist.
"""

import logging
import mmap
import time
from dataclasses import dataclass
from pathlib import Path

import zmq

from kvtransfer.buffer.staging import receive_staging
from kvtransfer.codecs import WORKER_COMMANDS, WORKER_EVENTS
from kvtransfer.errors import AttachError, TransferConfigError
from kvtransfer.messages import (
    MAX_SEGMENTS_PER_MESSAGE,
    VERSION,
    Abort,
    AskSpans,
    Attached,
    AttachRefused,
    AttachWorker,
    Command,
    Commit,
    Event,
    Filled,
    Freed,
    KvGeometry,
    NotAttached,
    OpenReceive,
    OpenSend,
    Ping,
    Segment,
    SendReady,
    SendSlots,
    SlotUse,
    Stats,
    TransferAddress,
    TransferSpans,
)
from kvtransfer.net.channel import ChannelKeys, Link
from kvtransfer.net.connection_watch import ConnectionWatch
from kvtransfer.open_transfers import OpenTransfers, TransferEvent
from kvtransfer.protocol.layout import tokens_per_slot

log = logging.getLogger(__name__)

PING_S = 1.0
SILENCE_S = 5.0
ATTACH_RETRY_S = 1.0
REFUSED_RETRY_S = 0.2


@dataclass(frozen=True, slots=True)
class TransferLost:
    """The transfer process's incarnation `old_epoch` has ended, and with it every transfer and every slot
    use. The worker must not touch slots that were named before, nor pass them to `freed`."""

    old_epoch: int
    rank: int = 0
    """The rank whose process it was."""


@dataclass(frozen=True, slots=True)
class SlotsAssigned:
    """Send slots that the transfer process of a rank has assigned to the worker; see `SendSlots`."""

    slots: list[SlotUse]
    rank: int = 0


WorkerEvent = TransferEvent | SlotsAssigned | TransferLost | TransferSpans


def _freed(slots: list[SlotUse]) -> list[Freed]:
    step = MAX_SEGMENTS_PER_MESSAGE
    return [Freed(slots[at : at + step]) for at in range(0, len(slots), step)]


class TransferClient:
    """One connection of a worker to its transfer process. The constructor attaches: it raises AttachError if
    that fails within `timeout_s`, TransferConfigError for a bad endpoint.

    Of a worker of several ranks, it serves rank `rank` of `tp`; without `maps`, the rank maps the buffer.
    """

    def __init__(
        self,
        endpoint: str,
        worker_epoch: int,
        geometry: KvGeometry,
        *,
        keys: ChannelKeys | None = None,
        timeout_s: float = 30.0,
        rank: int = 0,
        tp: int = 1,
        maps: bool = True,
    ) -> None:
        self._worker_epoch, self._geometry = worker_epoch, geometry
        self._rank, self._tp, self._maps = rank, tp, maps
        self._dropped: dict[str, int] = {}
        self._link: Link[Event, Command] = Link(
            endpoint, WORKER_EVENTS, WORKER_COMMANDS, keys=keys, on_drop=self._on_drop
        )
        self._watch = ConnectionWatch(self._link.socket)
        self._attached: Attached | None = None
        self._map: mmap.mmap | None = None
        self._view: memoryview | None = None
        self._commands: list[Command] = []
        self._transfers = OpenTransfers()
        self._lost: list[WorkerEvent] = []
        self._asked_at_s = float("-inf")
        self._received_at_s = 0.0
        self._unanswered = 0
        self.refusal = ""
        """Why the last attempt to attach was refused, if it was."""
        self.last_stats: Stats | None = None
        self.last_stats_at_s = 0.0
        """By the clock that `receive` is given."""
        try:
            self._attach_within(timeout_s)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------ what is attached

    @property
    def ready(self) -> bool:
        return self._attached is not None

    @property
    def socket(self) -> "zmq.Socket[bytes]":
        """For a `zmq.Poller`; the same until `close`."""
        return self._link.socket

    @property
    def attached(self) -> Attached:
        """Raises AttachError while `ready` is False."""
        if self._attached is None:
            raise AttachError("the transfer process is not attached")
        return self._attached

    @property
    def address(self) -> TransferAddress:
        return self.attached.address

    @property
    def slots(self) -> int:
        return self.attached.slots

    @property
    def slot_bytes(self) -> int:
        return self.attached.slot_bytes

    @property
    def checksum(self) -> bool:
        return self.attached.checksum

    @property
    def tokens_per_slot(self) -> int:
        return tokens_per_slot(self._geometry, self.attached.slot_bytes, self._tp)

    @property
    def staging(self) -> memoryview | None:
        """The whole buffer; None with device memory (open `attached.cuda_ipc_handle` instead)."""
        return self._view

    def slot_view(self, slot: int) -> memoryview:
        """The slot's bytes. Raises AttachError without host memory, IndexError for no such slot."""
        if self._view is None:
            raise AttachError("there is no host staging buffer")
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot {slot}: there are {self.slots}")
        return self._view[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    # ------------------------------------------------------------ commands

    def open_receive(
        self,
        transfer_id: int,
        source: TransferAddress,
        start_token: int,
        end_token: int,
        deadline_s: float,
        kv_heads: int = 0,
    ) -> None:
        self._transfers.open_receive(transfer_id)
        self._queue(OpenReceive(transfer_id, source, start_token, end_token, deadline_s, kv_heads))

    def open_send(self, transfer_id: int, deadline_s: float) -> None:
        self._transfers.open_send(transfer_id)
        self._queue(OpenSend(transfer_id, deadline_s))

    def send_ready(self, transfer_id: int) -> None:
        """The prompt has its pages, and keeps them: the transfer process may assign slots."""
        self._queue(SendReady(transfer_id))

    def filled(self, transfer_id: int, segments: list[Segment]) -> None:
        """Hands packed send slots over. The worker must not write them any more."""
        for at in range(0, len(segments), MAX_SEGMENTS_PER_MESSAGE):
            self._queue(Filled(transfer_id, segments[at : at + MAX_SEGMENTS_PER_MESSAGE]))

    def freed(self, slots: list[SlotUse]) -> None:
        """Gives back receive slots, which the worker must not read any more, or assigned send slots, which it
        must not write any more."""
        self._transfers.freed.extend(slots)

    def commit(self, transfer_id: int) -> None:
        self._transfers.committed(transfer_id)
        self._queue(Commit(transfer_id))

    def abort(self, transfer_id: int, reason: str) -> None:
        """Gives a transfer up. No event answers it, and none about this transfer comes any more. The worker
        must still pass slots that it has seen in `Arrived` to `freed`."""
        self._queue(Abort(transfer_id, reason[:1024]))
        self._transfers.end(transfer_id)

    def ask_spans(self, transfer_id: int) -> None:
        """Asks for the recorded spans of a transfer. `TransferSpans` answers."""
        self._queue(AskSpans(transfer_id))

    def flush(self) -> None:
        """Sends the queued commands as one frame. While not `ready`, drops them."""
        if self._attached is None:
            self._forget_commands()
            return
        # Freed slots go first: what follows in the frame may be given them.
        frame: list[Command] = [*_freed(self._transfers.freed), *self._commands]
        if frame and not self._link.send(frame):
            log.warning("the transfer process takes no commands: queue full")
            return
        self._transfers.freed.clear()
        self._commands.clear()

    # ------------------------------------------------------------ events

    def receive(self, now_s: float) -> list[WorkerEvent]:
        """The events that have arrived, oldest first. To be called in every step, readable or not. `now_s` is
        any clock that only grows, the same as for `tick`."""
        events, self._lost = self._lost, []
        for event in self._link.receive():
            self._received_at_s = now_s
            self._unanswered = 0
            if isinstance(event, Attached):
                if self._is_other_incarnation(event.address.epoch):
                    events = self._lose() or events
                self._on_attached(event)
            elif isinstance(event, AttachRefused):
                self.refusal = event.reason
                self._asked_at_s = now_s + REFUSED_RETRY_S - ATTACH_RETRY_S
            elif isinstance(event, NotAttached):
                events = self._lose() or events  # what came before it is of a buffer that is gone
                if now_s - self._asked_at_s >= ATTACH_RETRY_S:
                    self._ask(now_s)
            elif self._attached is None:
                self._on_drop("event_before_attached")
            elif isinstance(event, Stats):
                if self._is_other_incarnation(event.epoch):
                    events = self._lose() or events
                else:
                    self.last_stats, self.last_stats_at_s = event, now_s
            elif isinstance(event, SendSlots):
                if self._transfers.assigned(event.slots):
                    events.append(SlotsAssigned(event.slots, self._rank))
            elif isinstance(event, TransferSpans) or self._transfers.follow(event):
                events.append(event)
        return events

    def tick(self, now_s: float) -> None:
        """Pings a quiet transfer process, and asks again to be attached. Cheap: call it every step."""
        if self._watch.was_cut() and self._attached is not None:
            log.warning("the connection to the transfer process was cut")
            self._lost.extend(self._lose())
        if self._attached is None:
            if now_s - self._asked_at_s >= ATTACH_RETRY_S:
                self._ask(now_s)
        elif now_s - max(self._received_at_s, self._asked_at_s) >= PING_S:
            self._asked_at_s = now_s
            self._link.send([Ping(self._worker_epoch)])
            self._unanswered += 1
            if self._unanswered > SILENCE_S / PING_S and not self._link.socket.poll(0):
                # Dead, or stopped: if it comes back, attaching again ends what it still has.
                log.warning("the transfer process has been silent for %d s", SILENCE_S)
                self._lost.extend(self._lose())

    def quiet_s(self, now_s: float) -> float:
        """How long nothing has arrived; a live process sends statistics every second."""
        return now_s - self._received_at_s

    def close(self) -> None:
        """Unmaps the buffer and closes the sockets; the transfer process notices, and cancels what is open.
        Idempotent."""
        self._attached = None
        self._unmap()
        self._watch.close()
        self._link.close()

    # ------------------------------------------------------------ internals

    def _queue(self, command: Command) -> None:
        self._commands.append(command)

    def _attach_within(self, timeout_s: float) -> None:
        until_s = time.monotonic() + timeout_s
        while self._attached is None:
            now_s = time.monotonic()
            self.refusal = self._link.mismatch or self.refusal
            if now_s >= until_s:
                why = f": {self.refusal}" if self.refusal else ""
                raise AttachError(f"no transfer process at {self._link.endpoint} in {timeout_s} s{why}")
            self.tick(now_s)
            self._link.socket.poll(50)
            self.receive(time.monotonic())

    def _ask(self, now_s: float) -> None:
        self._asked_at_s = now_s
        self._link.send([AttachWorker(self._worker_epoch, self._geometry, VERSION, self._rank, self._tp)])

    def _is_other_incarnation(self, epoch: int) -> bool:
        """Whether the client is attached to an incarnation that has ended: its answer lay in the queue while
        nobody looked, and the process behind it died meanwhile."""
        return self._attached is not None and self._attached.address.epoch != epoch

    def _on_attached(self, event: Attached) -> None:
        if self._attached is not None:
            self._on_drop("attached_twice")
            return
        self._unmap()
        if event.staging_socket is not None and self._maps:
            try:
                size_bytes = event.slots * event.slot_bytes
                self._map = receive_staging(Path(event.staging_socket), size_bytes, timeout_s=2.0)
            except TransferConfigError as error:
                # It has just died, or is another incarnation already.
                log.warning("staging buffer not mapped: %s", error)
                self.refusal = str(error)
                return  # `tick` asks again.
            self._view = memoryview(self._map)
        self._attached = event
        self.refusal = ""
        log.info("attached to transfer process, epoch %d, mover %s", event.address.epoch, event.mover)

    def _lose(self) -> list[WorkerEvent]:
        if self._attached is None:
            return []
        lost = TransferLost(self._attached.address.epoch, self._rank)
        self._attached = None
        self.last_stats = None
        self._transfers.clear()
        self._forget_commands()
        self._unmap()
        return [lost]

    def _unmap(self) -> None:
        """Views that the worker still has keep the old buffer mapped until it drops them."""
        view, self._view = self._view, None
        mapping, self._map = self._map, None
        if view is not None and mapping is not None:
            try:
                view.release()
                mapping.close()
            except BufferError:
                log.info("the former staging buffer is still in use")

    def _forget_commands(self) -> None:
        self._commands.clear()
        self._transfers.freed.clear()

    def _on_drop(self, reason: str) -> None:
        self._dropped[reason] = self._dropped.get(reason, 0) + 1
