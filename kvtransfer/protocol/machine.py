"""The state machine of all transfers of one process: both directions over one slot pool, pure.

Inputs are method calls, with the time as an argument; the actions that follow gather in `outbox`. After any
batch of inputs, `settle` hands out the slots that have become free: to senders first, because a slot assigned
for sending comes back by this process's own doing, one granted to a peer only by the peer's.
"""

from kvtransfer.messages import (
    Abort,
    Commit,
    Filled,
    Freed,
    OpenReceive,
    OpenSend,
    SendReady,
    TransferAddress,
)
from kvtransfer.protocol.limits import TransferLimits
from kvtransfer.protocol.outbox import Destination, Outbox
from kvtransfer.protocol.peer_messages import (
    CancelTransfer,
    Closed,
    Committed,
    Grant,
    Offer,
    PeerMessage,
    Ready,
    Written,
)
from kvtransfer.protocol.receiver import Receiver
from kvtransfer.protocol.sender import Sender
from kvtransfer.protocol.slots import Direction, SlotPool

TransferCommand = OpenReceive | OpenSend | SendReady | Filled | Freed | Commit | Abort


class TransferMachine:
    """Sender, receiver and their pool. Nothing that a worker or a peer sends makes it raise."""

    def __init__(self, limits: TransferLimits) -> None:
        self.pool = SlotPool(limits.slots)
        self.outbox = Outbox()
        self.sender = Sender(self.pool, limits, self.outbox)
        self.receiver = Receiver(self.pool, limits, self.outbox)

    def set_limits(self, limits: TransferLimits) -> None:
        """For a worker of another geometry, after `worker_gone`. The number of slots stays."""
        self.sender.limits = limits
        self.receiver.limits = limits

    def on_command(self, command: TransferCommand, now_s: float) -> None:
        """Handles a command of the worker."""
        if isinstance(command, Filled):
            self.sender.filled(command, now_s)
        elif isinstance(command, Freed):
            self._freed(command, now_s)
        elif isinstance(command, SendReady):
            self.sender.ready(command.transfer_id)
        elif isinstance(command, OpenReceive):
            self.receiver.open(command, now_s)
        elif isinstance(command, OpenSend):
            self.sender.open(command, now_s)
        elif isinstance(command, Commit):
            self.receiver.commit(command.transfer_id, now_s)
        else:
            sending = self.sender.abort(command.transfer_id, command.reason, now_s)
            receiving = self.receiver.abort(command.transfer_id, command.reason, now_s)
            if not sending and not receiving:
                self.outbox.drops["abort_unknown"] += 1

    def on_destination(
        self, destination: Destination, message: PeerMessage, remote_slots: int, now_s: float
    ) -> None:
        """Handles a message of a peer that receives from this process and has `remote_slots` slots."""
        if isinstance(message, Grant):
            self.sender.on_grant(destination, message, remote_slots)
        elif isinstance(message, Offer):
            self.sender.on_offer(destination, message, now_s)
        elif isinstance(message, Committed):
            self.sender.on_committed(destination, message.transfer_id, now_s)
        elif isinstance(message, CancelTransfer):
            self.sender.on_cancel(destination, message, now_s)
        else:
            self.outbox.drops["wrong_way"] += 1

    def on_source(self, source: TransferAddress, message: PeerMessage, now_s: float) -> None:
        """Handles a message of a peer that sends to this process."""
        if isinstance(message, Written):
            self.receiver.on_written(source, message, now_s)
        elif isinstance(message, Ready):
            self.receiver.on_ready(source, message.transfer_id)
        elif isinstance(message, Closed):
            self.receiver.on_closed(source, message.transfer_id, now_s)
        elif isinstance(message, CancelTransfer):
            self.receiver.on_cancel(source, message, now_s)
        else:
            self.outbox.drops["wrong_way"] += 1

    def worker_gone(self, reason: str, now_s: float) -> None:
        """The worker is gone: nobody packs, unpacks or waits any more."""
        self.sender.worker_gone(reason, now_s)
        self.receiver.worker_gone(reason, now_s)

    def tick(self, now_s: float) -> None:
        self.sender.tick(now_s)
        self.receiver.tick(now_s)

    def settle(self, now_s: float) -> None:
        """Hands out free slots. To be called after every batch of inputs."""
        self.sender.assign(now_s)
        self.receiver.grant(now_s)

    def next_deadline_s(self) -> float | None:
        """When `tick` has something to do again; None: never, unless something happens."""
        deadlines = (self.sender.next_deadline_s(), self.receiver.next_deadline_s())
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def _freed(self, command: Freed, now_s: float) -> None:
        for use in command.slots:
            holder = self.pool.holder(use.slot)
            if holder is not None and holder.direction is Direction.SEND:
                self.sender.returned(use, now_s)
            else:
                self.receiver.freed(use, now_s)
