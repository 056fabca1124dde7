"""The client's book of open transfers: what the worker has opened, and which slots it has been lent.

It keeps two promises. A lent slot is never forgotten when its transfer ends, in whatever order the end and
the loan cross on the way. And a worker never hears of a transfer that it has ended.
"""

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


class OpenTransfers:
    """`returning` are lent slots to give back once no pack is running, `freed` receive slots to free at
    once; both are emptied by the client."""

    def __init__(self) -> None:
        self._lent: dict[int, dict[int, SlotUse]] = {}
        """Open sends, each with the slots lent for it and not filled, by slot number."""
        self._receives: dict[int, set[SlotUse]] = {}
        """Open receives, each with the slot uses that have arrived for it."""
        self.returning: list[SlotUse] = []
        self.freed: list[SlotUse] = []

    def open_send(self, transfer_id: int) -> None:
        self._lent[transfer_id] = {}

    def open_receive(self, transfer_id: int) -> None:
        self._receives[transfer_id] = set()

    def filled(self, transfer_id: int, segments: list[Segment]) -> None:
        lent = self._lent.get(transfer_id, {})
        for segment in segments:
            lent.pop(segment.slot, None)

    def committed(self, transfer_id: int) -> None:
        self._receives.pop(transfer_id, None)

    def follow(self, event: TransferEvent) -> bool:
        """Takes note of an event. False: the worker has ended that transfer already and is not to hear of
        it; slots that the event brings go straight back."""
        if isinstance(event, SendSlots):
            lent = self._lent.get(event.transfer_id)
            if lent is None:
                self.returning.extend(event.slots)
                return False
            lent.update((use.slot, use) for use in event.slots)
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
            return event.transfer_id in self._lent
        return self.end(event.transfer_id)

    def end(self, transfer_id: int) -> bool:
        """False if it was not open."""
        receiving = self._receives.pop(transfer_id, None) is not None
        lent = self._lent.pop(transfer_id, None)
        self.returning.extend((lent or {}).values())
        return receiving or lent is not None

    def clear(self) -> None:
        """The transfer process's life is over: nothing is open, nothing goes back."""
        self._lent.clear()
        self._receives.clear()
        self.returning.clear()
        self.freed.clear()
