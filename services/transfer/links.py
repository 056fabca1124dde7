"""The links to the transfer processes of a worker's ranks, which the worker's loop drives as one."""

from collections.abc import Sequence

import zmq

from kvtransfer.client import TransferClient, WorkerEvent
from kvtransfer.messages import SlotCounts, Stats
from services.protocol.messages import WorkerTransferAddress


class TransferRanks:
    """`clients[i]` is that of rank i. Slices of a transfer have ids of their own, so events need no rank."""

    def __init__(self, clients: Sequence[TransferClient]) -> None:
        self.clients = list(clients)

    @property
    def ready(self) -> bool:
        """Whether all are attached."""
        return all(client.ready for client in self.clients)

    @property
    def address(self) -> WorkerTransferAddress:
        """Only while `ready`."""
        first, *others = (client.address for client in self.clients)
        return WorkerTransferAddress(first.endpoint, first.epoch, tuple(others))

    @property
    def sockets(self) -> "list[zmq.Socket[bytes]]":
        return [client.socket for client in self.clients]

    @property
    def slots(self) -> int:
        """Of all ranks; only while `ready`."""
        return sum(client.slots for client in self.clients)

    def tick(self, now_s: float) -> None:
        for client in self.clients:
            client.tick(now_s)

    def receive(self, now_s: float) -> list[WorkerEvent]:
        return [event for client in self.clients for event in client.receive(now_s)]

    def ask_spans(self, transfer_id: int) -> None:
        """Asks for what is remembered of the slice between both ranks 0, which stands for the whole."""
        self.clients[0].ask_spans(transfer_id)

    def flush(self) -> None:
        for client in self.clients:
            client.flush()

    def close(self) -> None:
        for client in self.clients:
            client.close()

    # ------------------------------------------------------------ stats

    def stats(self) -> list[Stats]:
        """The last stats of every rank's process, in the order of ranks; empty while one is missing."""
        found = [client.last_stats for client in self.clients]
        return [stats for stats in found if stats is not None] if None not in found else []

    @property
    def stats_at_s(self) -> float:
        """When the oldest of them came."""
        return min(client.last_stats_at_s for client in self.clients)


def total_counts(stats: list[Stats]) -> SlotCounts:
    """The slots of all ranks."""
    counts = [one.counts for one in stats]
    return SlotCounts(
        free=sum(one.free for one in counts),
        granted=sum(one.granted for one in counts),
        filled=sum(one.filled for one in counts),
        quarantined=sum(one.quarantined for one in counts),
    )
