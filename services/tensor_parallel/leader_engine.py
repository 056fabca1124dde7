"""The engine of a worker's rank 0: it sends whatever it is called to do to the other ranks first."""

import contextlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from services.config import WorkerConfig
from services.engine.batch import Row
from services.engine.engine import Engine
from services.engine.events import Event
from services.engine.launched import Launched
from services.engine.models.model_config import ModelConfig
from services.engine.rank_group import DistributedGroup
from services.tensor_parallel.messages import (
    AllocatePool,
    CaptureGraphs,
    CopyPages,
    Done,
    LoadWeights,
    MeasureActivations,
    RankCommand,
    RankMemory,
    ReportMemory,
)
from services.tensor_parallel.page_tables import SentPageTables
from services.tensor_parallel.rank_pool import START_TIMEOUT_S, STEP_TIMEOUT_S, RankError, RankPool

_IPC = "ipc://"
TABLES_PER_SEQUENCE = 4
"""Of the sequences a batch holds: those that wait, or were preempted, come back."""


class LeaderEngine(Engine):
    """Of sizes, it returns the largest of all ranks'. An error in any rank is the worker's end."""

    def __init__(self, config: WorkerConfig, model: ModelConfig) -> None:
        """Starts the other ranks, which meet through a file beside the endpoint that the worker listens at.
        Raises `RankError`, `RankGroupError`."""
        store = _meeting_place(config.listen)
        store.unlink(missing_ok=True)
        self.ranks = RankPool(config, store)
        try:
            with self.ranks.within(START_TIMEOUT_S, "the meeting of the ranks"):
                group = DistributedGroup(config, store)
            super().__init__(config, model, group)
        except BaseException:
            self.ranks.close()
            raise
        self._store = store
        self.limit_bytes = 1 << 62
        """What every rank's allocator is capped at, with the pool."""
        self._page_tables = SentPageTables(TABLES_PER_SEQUENCE * config.max_batch)

    # ------------------------------------------------------------ start

    def load(self, progress: Callable[[int, int], None]) -> int:
        return self._together(LoadWeights(), lambda: super(LeaderEngine, self).load(progress))

    def measure_activations(self) -> int:
        return self._together(MeasureActivations(), super().measure_activations)

    def allocate_pool(self, pages: int) -> int:
        return self._together(
            AllocatePool(pages, self.limit_bytes), lambda: super(LeaderEngine, self).allocate_pool(pages)
        )

    def capture_graphs(self) -> int:
        return self._together(CaptureGraphs(), super().capture_graphs)

    def cap_allocator(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        super().cap_allocator(limit_bytes)

    def rank_memory(self) -> list[RankMemory]:
        """What the other ranks measured, once the graphs are captured."""
        self.ranks.send(ReportMemory())
        found = self.ranks.answers(STEP_TIMEOUT_S)
        return [answer for answer in found if isinstance(answer, RankMemory)]

    # ------------------------------------------------------------ steps

    def launch(self, rows: list[Row]) -> Launched:
        if not rows:
            return super().launch(rows)
        step, own = self._page_tables.step(rows)
        self.ranks.send(step)
        try:
            with self.ranks.within(STEP_TIMEOUT_S, "a step"):
                launched = super().launch(own)
        except (RuntimeError, ValueError, IndexError) as error:
            raise RankError(f"a step failed in rank 0, and no rank can go on alone: {error}") from error
        if launched.done is not None:
            launched.done = _Watched(launched.done, self.ranks)
        return launched

    def copy_pages(self, pairs: list[tuple[int, int]]) -> None:
        if pairs:
            self.ranks.send(CopyPages(pairs))
            super().copy_pages(pairs)

    def close(self) -> None:
        """The ranks leave. Idempotent."""
        with self.ranks.within(STEP_TIMEOUT_S, "the leaving of the ranks"):
            self.ranks.stop()
            super().close()
            self.ranks.close()
        self._store.unlink(missing_ok=True)
        if not self.config.listen.startswith(_IPC):
            with contextlib.suppress(FileNotFoundError):
                self._store.parent.rmdir()

    def _together(self, command: RankCommand, own: Callable[[], int]) -> int:
        self.ranks.send(command)
        what = f"{type(command).__name__} of the ranks"
        with self.ranks.within(START_TIMEOUT_S, what):
            mine = own()
            answers = self.ranks.answers(START_TIMEOUT_S)
        sizes = [mine]
        for rank, answer in enumerate(answers, 1):
            if not isinstance(answer, Done):
                raise RankError(f"rank {rank} answers {what} with {answer!r}")
            sizes.append(answer.byte_count)
        return max(sizes)


def _meeting_place(listen: str) -> Path:
    """In the private directory of an `ipc://` endpoint; for others in a new one."""
    if listen.startswith(_IPC):
        return Path(listen.removeprefix(_IPC) + ".ranks")
    return Path(tempfile.mkdtemp(prefix="baton-ranks.")) / "store"


class _Watched:
    """A step's event whose wait the watcher sees, and which does not stay away for ever."""

    def __init__(self, event: Event, ranks: RankPool) -> None:
        self._event, self._ranks = event, ranks
        self._launched_s = time.monotonic()

    def query(self) -> bool:
        """Raises `RankError` when the time is up."""
        if self._event.query():
            return True
        if time.monotonic() > self._launched_s + STEP_TIMEOUT_S:
            raise RankError(f"a step is not done after {STEP_TIMEOUT_S:g} s: a rank hangs")
        return False

    def synchronize(self) -> None:
        with self._ranks.within(STEP_TIMEOUT_S, "a step"):
            self._event.synchronize()

    def wait(self, stream: torch.cuda.Stream) -> None:
        self._event.wait(stream)
