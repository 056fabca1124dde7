"""The transfer process's endpoint for its worker: one worker at a time, in one incarnation.

A worker that is attached and reachable keeps its place; another is refused and may ask again. A worker that
is not attached gets `NotAttached`, by which it learns that this process was restarted.
"""

import logging

from kvtransfer.messages import (
    Attached,
    AttachRefused,
    AttachWorker,
    Command,
    Event,
    NotAttached,
    Ping,
)
from kvtransfer.net.channel import Server

log = logging.getLogger(__name__)

WorkerServer = Server[Command, Event]


class WorkerPort:
    """Receives from the attached worker and sends to it. `epoch` is this process's own."""

    def __init__(self, server: WorkerServer, epoch: int) -> None:
        self._server, self._epoch = server, epoch
        self._identity: bytes | None = None
        self.attached: AttachWorker | None = None

    def receive(self) -> list[AttachWorker | Command]:
        """The commands of the attached worker. `accept` or `refuse` has to answer an `AttachWorker`."""
        received: list[AttachWorker | Command] = []
        for identity, messages in self._server.receive():
            for message in messages:
                if isinstance(message, AttachWorker):
                    if self._taken_by_another(identity):
                        log.warning("worker epoch %d refused: another is attached", message.worker_epoch)
                        self._server.send(identity, [AttachRefused("another worker is attached")])
                    else:
                        self._identity = identity
                        received.append(message)
                elif identity != self._identity or self._stale(message):
                    self._server.send(identity, [NotAttached(self._epoch)])
                    break
                else:
                    received.append(message)
        return received

    def accept(self, command: AttachWorker, reply: Attached) -> None:
        self.attached = command
        log.info("worker epoch %d attached", command.worker_epoch)
        self.send([reply])

    def refuse(self, reason: str) -> None:
        log.warning("worker refused: %s", reason)
        self.send([AttachRefused(reason)])
        self.detach()

    def send(self, events: list[Event]) -> bool:
        """False: nobody is attached, or the worker's connection is gone."""
        return self._identity is not None and self._server.send(self._identity, events)

    def detach(self) -> None:
        self._identity = None
        self.attached = None

    def _taken_by_another(self, identity: bytes) -> bool:
        if self._identity is None or self._identity == identity:
            return False
        # An empty frame is no message to the worker, but shows whether its connection still stands.
        return self._server.send(self._identity, [])

    def _stale(self, message: Command) -> bool:
        return isinstance(message, Ping) and (
            self.attached is None or message.worker_epoch != self.attached.worker_epoch
        )
