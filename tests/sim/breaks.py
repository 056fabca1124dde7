"""Ways to break the shipped code, each of which the simulation must find: it is worth what it finds."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from kvtransfer.messages import SlotUse, TransferAddress
from kvtransfer.protocol.peer_messages import Closed, Grant
from kvtransfer.protocol.receive import IncomingSegments
from kvtransfer.protocol.receiver import Receiver
from kvtransfer.protocol.sender import Sender
from router.routing.attempt import Attempt, WorkerMessage
from services.protocol.messages import Cancel
from services.roles.role import Role
from services.scheduler.batch import RunningBatch
from services.scheduler.decode import Reservation
from services.scheduler.pages import PagePool
from services.transfer.receiver import KvReceiver
from tests.sim import faults


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    with patch.object(owner, name, value):
        yield


def grants_are_taken_twice() -> Any:
    """A repeated `Grant` is a new one."""
    on_grant = Sender.on_grant

    def broken(self: Sender, destination: int, message: Grant, remote_slots: int) -> None:
        transfer = self._transfers.get(message.transfer_id)
        if transfer is not None:
            transfer.grant_generations.clear()
        on_grant(self, destination, message, remote_slots)

    return replaced(Sender, "on_grant", broken)


def slots_are_free_early() -> Any:
    """What was granted is free when its transfer fails, whatever its sender still does."""
    start_closing = Receiver._start_closing

    def broken(self: Receiver, transfer: IncomingSegments, now_s: float) -> None:
        start_closing(self, transfer, now_s)
        for use in transfer.granted.values():
            self._pool.release(use, now_s)
        transfer.granted.clear()

    return replaced(Receiver, "_start_closing", broken)


def silence_is_death() -> Any:
    """A source that cannot be reached is taken for dead. It shows where a write lands just after its
    connection was cut, so connections are all that breaks here."""

    def broken(self: Receiver, source: TransferAddress, reason: str, now_s: float) -> None:
        self._ready.discard(source)
        for transfer in self._of(source):
            if transfer.state.value == "open":
                self._fail(transfer, reason, now_s)
            if transfer.state.value != "ended" and transfer.transfer_id in self._transfers:
                self._end(transfer, now_s)

    @contextmanager
    def connections_only() -> Iterator[None]:
        weights = tuple(int(kind == "disconnect") for kind in faults.KINDS)
        with replaced(Receiver, "source_lost", broken), replaced(faults, "WEIGHTS", weights):
            yield

    return connections_only()


def closed_is_said_early() -> Any:
    """The sender says that nothing is in flight while a write is."""
    close = Sender._close

    def broken(self: Sender, transfer: Any, now_s: float) -> None:
        if transfer.writes:
            self._say(transfer.destination, Closed(transfer.transfer_id))
        close(self, transfer, now_s)

    return replaced(Sender, "_close", broken)


def assigned_slots_are_forgotten() -> Any:
    """A slot that comes back after its transfer's end stays assigned."""
    returned = Sender.returned

    def broken(self: Sender, use: SlotUse, now_s: float) -> None:
        if self._transfers:
            returned(self, use, now_s)

    return replaced(Sender, "returned", broken)


def cancels_are_forgotten() -> Any:
    """A request whose choices all end with their first token is not cancelled on the decode side."""
    first_tokens = Attempt._on_first_tokens

    def broken(self: Attempt, report: Any, now_s: float) -> Sequence[WorkerMessage]:
        sends = first_tokens(self, report, now_s)
        return [send for send in sends if not isinstance(send.message, Cancel)]

    return replaced(Attempt, "_on_first_tokens", broken)


def commits_come_early() -> Any:
    """The last segment is not waited for."""
    arrived = KvReceiver.arrived

    def broken(self: KvReceiver, event: Any) -> None:
        incoming = self._slices.get(event.transfer_id)
        if incoming is not None and incoming.first_arrival_s is None:
            incoming.missing_tokens = max(1, incoming.missing_tokens - 4)
        arrived(self, event)

    return replaced(KvReceiver, "arrived", broken)


def joined_is_arrived() -> Any:
    """Decoding begins when the first tokens are known, with or without the KV."""
    return replaced(Reservation, "complete", property(lambda self: self.first_tokens is not None))


def pages_are_not_shared() -> Any:
    """Choices of one request use the prompt's last page without holding it."""
    fork = RunningBatch.fork

    def broken(self: RunningBatch, prompt: Any, first_tokens: Any) -> Any:
        with patch.object(PagePool, "share", lambda pool, pages: None):
            return fork(self, prompt, first_tokens)

    return replaced(RunningBatch, "fork", broken)


def ends_keep_the_transfer() -> Any:
    """A request that fails here is forgotten without a word to the transfer process."""
    end = Role.end

    def broken(self: Role, request_id: int, reason: str) -> None:
        running = self.context.requests.get(request_id)
        if running is not None and reason != "withdrawn":
            self.context.requests._by_transfer.pop(running.transfer_id or 0, None)
            running.transfer_id = None
        end(self, request_id, reason)

    return replaced(Role, "end", broken)


BREAKS: dict[str, Callable[[], Any]] = {
    one.__name__: one
    for one in (
        grants_are_taken_twice,
        slots_are_free_early,
        silence_is_death,
        closed_is_said_early,
        assigned_slots_are_forgotten,
        cancels_are_forgotten,
        commits_come_early,
        joined_is_arrived,
        pages_are_not_shared,
        ends_keep_the_transfer,
    )
}
