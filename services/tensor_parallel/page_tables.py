"""Page tables that the ranks of a worker share: a step names them by number and brings only what is new.

The engine knows a sequence by the identity of its list of pages (page_table_rows.py), and in which order it
takes rows follows from that. So all ranks, the leading one too, run on lists made here of the same messages.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from services.engine.batch import Row, SampleSpec
from services.protocol.messages import Sampling
from services.tensor_parallel.messages import Grown, Step, StepRow

_ELSEWHERE = SampleSpec(choice=0, position=0, sampling=Sampling(max_tokens=1, seed=0), prompt=[], output=[])
"""A sample that rank 0 takes."""


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
        """The step's rows, for a rank that samples nothing."""
        self.apply(step.grown)
        return [
            Row(
                one.tokens,
                one.start,
                self.pages(one.table),
                [_ELSEWHERE] * one.samples,
                one.targets,
                sampled_by=one.sampled_by,
            )
            for one in step.rows
        ]


@dataclass(slots=True)
class _SentTable:
    """One table as the ranks know it. `source` is the scheduler's own list, kept so that its identity stays
    its own."""

    number: int
    source: list[int]
    pages: int
    step: int


@dataclass(slots=True)
class SentPageTables:
    """The leading rank's side: which lists are which tables, and how much of each has been sent.

    At most `capacity` tables are kept, more only while one step names more; the one used least recently goes
    first.
    """

    capacity: int
    tables: PageTables = field(default_factory=PageTables)
    _sent: OrderedDict[int, _SentTable] = field(default_factory=OrderedDict)
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
            sent.append(StepRow(row.tokens, row.start, number, len(row.samples), row.targets, row.sampled_by))
        self.tables.apply(grown)
        own = [
            Row(
                row.tokens,
                row.start,
                self.tables.pages(number),
                row.samples,
                row.targets,
                row.prompt_logprobs,
                row.sampled_by,
            )
            for row, number in zip(rows, numbers, strict=True)
        ]
        return Step(grown, sent), own

    def _number(self, pages: list[int], grown: list[Grown]) -> int:
        sent = self._sent.get(id(pages))
        if sent is None:
            sent = _SentTable(self._take_number(), pages, 0, self._step)
            self._sent[id(pages)] = sent
        self._sent.move_to_end(id(pages))
        sent.step = self._step
        if sent.pages < len(pages):
            grown.append(Grown(sent.number, sent.pages, pages[sent.pages :]))
            sent.pages = len(pages)
        return sent.number

    def _take_number(self) -> int:
        if len(self._sent) < self.capacity:
            return len(self._sent)
        oldest = next(iter(self._sent.values()))
        if oldest.step == self._step:
            return len(self._sent)
        del self._sent[id(oldest.source)]
        return oldest.number
