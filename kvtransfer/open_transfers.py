"""The client's book of open transfers: a worker never hears of a transfer that it has ended, nor twice of the
same use of a slot.
"""

from kvtransfer.messages import (
    Aborted,
    Arrived,
    SendCommitted,
    SendConfirmed,
    SendGranted,
    SlotUse,
)

TransferEvent = SendConfirmed | SendGranted | Arrived | SendCommitted | Aborted


class OpenTransfers:
    """`freed` are slots to give back at once; emptied by the client."""

    def __init__(self) -> None:
        self._sends: set[int] = set()
        self._receives: dict[int, set[SlotUse]] = {}
        """Open receives, each with the slot uses that have arrived for it."""
        self._assigned_generation: dict[int, int] = {}
        """The newest one of each slot that was ever assigned."""
        self.freed: list[SlotUse] = []

    def open_send(self, transfer_id: int) -> None:
        self._sends.add(transfer_id)

    def open_receive(self, transfer_id: int) -> None:
        self._receives[transfer_id] = set()

    def committed(self, transfer_id: int) -> None:
        self._receives.pop(transfer_id, None)

    def assigned(self, slots: list[SlotUse]) -> bool:
        """Takes note of send slots. False: they were said before; packed twice, other tokens would be taken
        for a slot's."""
        newest = self._assigned_generation
        if any(use.generation <= newest.get(use.slot, 0) for use in slots):
            return False
        newest.update((use.slot, use.generation) for use in slots)
        return True

    def follow(self, event: TransferEvent) -> bool:
        """Takes note of an event. False: the worker has ended that transfer already and is not to hear of
        it; slots that the event brings go straight back."""
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
        if isinstance(event, SendConfirmed | SendGranted):
            return event.transfer_id in self._sends
        return self.end(event.transfer_id)

    def end(self, transfer_id: int) -> bool:
        """False if it was not open."""
        known = transfer_id in self._receives or transfer_id in self._sends
        self._receives.pop(transfer_id, None)
        self._sends.discard(transfer_id)
        return known

    def clear(self) -> None:
        """The transfer process's life is over: nothing is open, nothing goes back."""
        self._sends.clear()
        self._receives.clear()
        self._assigned_generation.clear()
        self.freed.clear()
