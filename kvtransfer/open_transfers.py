"""The client's table of open transfers. By it the client passes no event about a transfer that the worker has
ended, and none twice about the same use of a slot.
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
    """The transfers that the worker has opened and not ended. `freed` are slots to give back at once; the
    client empties it."""

    def __init__(self) -> None:
        self._sends: set[int] = set()
        self._receives: dict[int, set[SlotUse]] = {}
        """Open receives, each with the slot uses that have arrived for it."""
        self._assigned_generation: dict[int, int] = {}
        """By slot, the newest generation that was ever assigned."""
        self.freed: list[SlotUse] = []

    def open_send(self, transfer_id: int) -> None:
        self._sends.add(transfer_id)

    def open_receive(self, transfer_id: int) -> None:
        self._receives[transfer_id] = set()

    def committed(self, transfer_id: int) -> None:
        self._receives.pop(transfer_id, None)

    def assigned(self, slots: list[SlotUse]) -> bool:
        """Records assigned send slots. False: they are a repetition; packed twice, other tokens would be
        taken for a slot's."""
        newest = self._assigned_generation
        if any(use.generation <= newest.get(use.slot, 0) for use in slots):
            return False
        newest.update((use.slot, use.generation) for use in slots)
        return True

    def follow(self, event: TransferEvent) -> bool:
        """Records an event. False: the worker has ended that transfer already, and the event is not for it;
        slots that the event brings go straight back."""
        if isinstance(event, Arrived):
            uses = [SlotUse(one.slot, one.generation) for one in event.segments]
            arrived = self._receives.get(event.transfer_id)
            if arrived is None:
                self.freed.extend(uses)
                return False
            if not arrived.isdisjoint(uses):
                return False  # A repetition: counted twice, a transfer would seem whole before it is.
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
        """The transfer process's incarnation has ended: nothing is open, nothing goes back."""
        self._sends.clear()
        self._receives.clear()
        self._assigned_generation.clear()
        self.freed.clear()
