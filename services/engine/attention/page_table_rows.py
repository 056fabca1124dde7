"""Which row of the device's page tables holds which sequence's pages, and what has to be written to it.

A sequence is known by its list of pages, which only ever grows, or is replaced by another list. Sequences
keep their rows when others leave from between them: a step writes the pages that are new and little else.
"""

from services.engine.batch import Row


class TableSlots:
    """`place`, then `changes`, for every step."""

    def __init__(self, slots: int) -> None:
        self._held: list[list[int] | None] = [None] * slots
        self._held_pages = [0] * slots
        self._slot_of: dict[int, int] = {}  # by the list's identity; `_held` keeps it from being used again

    def place(self, rows: list[Row]) -> list[int]:
        """The row numbers in the order of their slots, which are `0 ... len(rows) - 1`."""
        count = len(rows)
        order, homeless = [-1] * count, []
        slot_of = self._slot_of
        for at, row in enumerate(rows):
            slot = slot_of.get(id(row.pages), count)
            if slot < count and order[slot] < 0:
                order[slot] = at
            else:
                homeless.append(at)
        if homeless:
            homeless.reverse()
            order = [at if at >= 0 else homeless.pop() for at in order]
        return order

    def changes(self, rows: list[Row]) -> list[tuple[int, int]]:
        """`(slot, first)` for each of the rows, which are in the order of their slots, whose pages from the
        `first` on are not in its table. From now on they count as written."""
        changed: list[tuple[int, int]] = []
        held, held_pages = self._held, self._held_pages
        for slot, row in enumerate(rows):
            pages = row.pages
            if held[slot] is not pages:
                changed.append((slot, 0))
                self._replace(slot, pages)
            elif held_pages[slot] < len(pages):
                changed.append((slot, held_pages[slot]))
                held_pages[slot] = len(pages)
        return changed

    def _replace(self, slot: int, pages: list[int]) -> None:
        before = self._held[slot]
        if before is not None and self._slot_of.get(id(before)) == slot:
            del self._slot_of[id(before)]
        self._held[slot], self._held_pages[slot] = pages, len(pages)
        self._slot_of[id(pages)] = slot
