"""Page tables that the ranks of a worker share: a step names them by number and brings only what is new.

The engine knows a sequence by the identity of its list of pages (table_slots.py), and in which order it takes
rows follows from that. So all ranks, the leading one too, run on lists made here from the same messages.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from services.engine.batch import Draw, Row
from services.protocol.messages import Sampling
from services.tensor_parallel.messages import Grown, Step, StepRow

_ELSEWHERE = Draw(choice=0, position=0, sampling=Sampling(max_tokens=1, seed=0), prompt=[], output=[])
"""A draw that rank 0 makes."""


class PageTables:
    """What a rank knows of the tables: `apply` every step in turn."""

    def __init__(self) -> None:
        self._tables: dict[int, list[int]] = {}

    def apply(self, grown: list[Grown]) -> None:
        """Raises ValueError for pages that do not follow those that are known."""
        for one in grown:
            if one.start == 0:
                self._tables[one.table] = list(one.pages)
            elif one.start == len(self._tables.get(one.table, ())):
                self._tables[one.table] += one.pages
            else:
                raise ValueError(f"pages of table {one.table} from {one.start} do not follow what is known")

    def pages(self, table: int) -> list[int]:
        """Raises ValueError."""
        try:
            return self._tables[table]
        except KeyError:
            raise ValueError(f"no page table {table}") from None

    def rows(self, step: Step) -> list[Row]:
        """The step's rows, for a rank that draws nothing."""
        self.apply(step.grown)
        return [
            Row(
                one.tokens,
                one.start,
                self.pages(one.table),
                [_ELSEWHERE] * one.draws,
                one.targets,
                drawn_by=one.drawn_by,
            )
            for one in step.rows
        ]


@dataclass(slots=True)
class _Told:
    """One table as the ranks know it. `source` is the scheduler's own list, kept so that its identity stays
    its own."""

    number: int
    source: list[int]
    pages: int
    step: int


@dataclass(slots=True)
class PageTableBook:
    """The leading rank's side: which lists are which tables, and how much of each has been told.

    At most `capacity` tables are kept, more only while one step names more; the one used least recently goes
    first.
    """

    capacity: int
    tables: PageTables = field(default_factory=PageTables)
    _told: OrderedDict[int, _Told] = field(default_factory=OrderedDict)
    _step: int = 0

    def step(self, rows: list[Row]) -> tuple[Step, list[Row]]:
        """The message for the other ranks, and the same rows for the leader's own engine."""
        self._step += 1
        grown: list[Grown] = []
        sent: list[StepRow] = []
        numbers: list[int] = []
        for row in rows:
            number = self._number(row.pages, grown)
            numbers.append(number)
            sent.append(StepRow(row.tokens, row.start, number, len(row.draws), row.targets, row.drawn_by))
        self.tables.apply(grown)
        own = [
            Row(
                row.tokens,
                row.start,
                self.tables.pages(number),
                row.draws,
                row.targets,
                row.prompt_logprobs,
                row.drawn_by,
            )
            for row, number in zip(rows, numbers, strict=True)
        ]
        return Step(grown, sent), own

    def _number(self, pages: list[int], grown: list[Grown]) -> int:
        told = self._told.get(id(pages))
        if told is None:
            told = _Told(self._take_number(), pages, 0, self._step)
            self._told[id(pages)] = told
        self._told.move_to_end(id(pages))
        told.step = self._step
        if told.pages < len(pages):
            grown.append(Grown(told.number, told.pages, pages[told.pages :]))
            told.pages = len(pages)
        return told.number

    def _take_number(self) -> int:
        if len(self._told) < self.capacity:
            return len(self._told)
        oldest = next(iter(self._told.values()))
        if oldest.step == self._step:
            return len(self._told)
        del self._told[id(oldest.source)]
        return oldest.number
