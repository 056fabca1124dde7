"""The client's book of open transfers: what the worker has opened, and which slots it has been lent.

It keeps two promises. A lent slot is never forgotten when its transfer ends, in whatever order the end and
the loan cross on the way. And a worker never hears of a transfer that it has ended.
"""

from dataclasses import dataclass, field

from kvtransfer.messages import (
    Aborted,
    Arrived,
    Segment,
    SendCommitted,
    SendConfirmed,
    SendSlots,
    SlotUse,
)

TransferEvent = SendConfirmed | SendSlots | Arrived | SendCommitted | Aborted


@dataclass(slots=True)
class _Send:
    """The slot uses `lent` so far, and those `unfilled` among them."""

    lent: set[SlotUse] = field(default_factory=set)
    unfilled: set[SlotUse] = field(default_factory=set)


class OpenTransfers:
    """`returning` are lent slots to give back once no pack is running, `freed` receive slots to free at
    once; both are emptied by the client."""

    def __init__(self) -> None:
        self._sends: dict[int, _Send] = {}
        self._receives: dict[int, set[SlotUse]] = {}
        """Open receives, each with the slot uses that have arrived for it."""
        self.returning: list[SlotUse] = []
        self.freed: list[SlotUse] = []

    def open_send(self, transfer_id: int) -> None:
        self._sends[transfer_id] = _Send()

    def open_receive(self, transfer_id: int) -> None:
        self._receives[transfer_id] = set()

    def filled(self, transfer_id: int, segments: list[Segment]) -> None:
        send = self._sends.get(transfer_id)
        if send is not None:
            send.unfilled.difference_update(SlotUse(one.slot, one.generation) for one in segments)

    def committed(self, transfer_id: int) -> None:
        self._receives.pop(transfer_id, None)

    def follow(self, event: TransferEvent) -> bool:
        """Takes note of an event. False: the worker has ended that transfer already and is not to hear of
        it; slots that the event brings go straight back."""
        if isinstance(event, SendSlots):
            send = self._sends.get(event.transfer_id)
            if send is None:
                self.returning.extend(event.slots)
                return False
            if not send.lent.isdisjoint(event.slots):
                return False  # said twice; packed twice, other tokens would be taken for the slot's
            send.lent.update(event.slots)
            send.unfilled.update(event.slots)
            return True
        if isinstance(event, Arrived):
            uses = [SlotUse(one.slot, one.generation) for one in event.segments]
            arrived = self._receives.get(event.transfer_id)
            if arrived is None:
                self.freed.extend(uses)
                return False
            if not arrived.isdisjoint(uses):
                return False  # said twice; counted twice, a transfer would seem whole before it is
            arrived.update(uses)
            return True
        if isinstance(event, SendConfirmed):
            return event.transfer_id in self._sends
        return self.end(event.transfer_id)

    def end(self, transfer_id: int) -> bool:
        """False if it was not open."""
        receiving = self._receives.pop(transfer_id, None) is not None
        send = self._sends.pop(transfer_id, None)
        if send is not None:
            self.returning.extend(sorted(send.unfilled, key=lambda use: use.slot))
        return receiving or send is not None

    def clear(self) -> None:
        """The transfer process's life is over: nothing is open, nothing goes back."""
        self._sends.clear()
        self._receives.clear()
        self.returning.clear()
        self.freed.clear()
