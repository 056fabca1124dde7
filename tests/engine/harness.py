"""Runs the engine on tiny checkpoints: what a scheduler would do, in its simplest form."""

from pathlib import Path
from typing import Any

import torch

from services.config import WorkerConfig
from services.engine.batch import Row, RowResult, SampleSpec
from services.engine.engine import Engine
from services.engine.events import ALL_QUEUED_STEPS
from services.engine.kv.run_table import SlotRun
from services.engine.kv.segments import Memory, SlotBuffer
from services.engine.launched import Launched
from services.engine.models.model_config import read_model_config
from services.protocol.messages import Sampling

GREEDY = Sampling(max_tokens=1, seed=1, temperature=0.0)


def start_engine(model_dir: Path, pages: int = 128, **config: Any) -> Engine:
    """An engine with weights and a pool, ready to execute."""
    engine = new_engine(model_dir, **config)
    engine.load(lambda done_bytes, total_bytes: None)
    engine.allocate_pool(pages)
    return engine


def new_engine(model_dir: Path, **config: Any) -> Engine:
    values = {"page_size_tokens": 4, "max_batch": 8, "max_chunk_tokens": 64} | config
    worker = WorkerConfig("worker", "unified", model_dir, "ipc://unused", **values)
    return Engine(worker, read_model_config(model_dir))


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 300, (length,), generator=generator).tolist()


class Sequence:
    """A prompt on its way through the engine, with pages of its own."""

    def __init__(
        self,
        prompt: list[int],
        pages: list[int],
        sampling: Sampling = GREEDY,
        choice: int = 0,
        chunk: int = 1 << 30,
    ) -> None:
        self.prompt, self.pages, self.sampling, self.choice, self.chunk = (
            prompt,
            pages,
            sampling,
            choice,
            chunk,
        )
        self.done_tokens = 0
        self.output: list[int] = []

    def next_row(self) -> Row:
        """The next prefill chunk, or the next decode token."""
        if self.done_tokens < len(self.prompt):
            tokens = self.prompt[self.done_tokens : self.done_tokens + self.chunk]
        else:
            tokens = self.output[-1:]
        end = self.done_tokens + len(tokens)
        samples = []
        if end >= len(self.prompt):
            samples = [SampleSpec(self.choice, end, self.sampling, self.prompt, self.output)]
        row = Row(tokens, self.done_tokens, self.pages, samples)
        self.done_tokens = end
        return row

    def row_after(self, draw: int) -> Row:
        """The token that the launch before draws as its `draw`-th. For sampling that looks at no output."""
        row = Row([-1], self.done_tokens, self.pages, sampled_by=draw)
        self.done_tokens += 1
        row.samples = [SampleSpec(self.choice, self.done_tokens, self.sampling, [], [])]
        return row

    def take(self, result: RowResult) -> None:
        self.output.extend(sampled.token for sampled in result.sampled)


def run_together(engine: Engine, sequences: list[Sequence], output_tokens: int) -> list[list[int]]:
    """Step all sequences at once, chunks beside decodes, until each has its tokens."""
    while running := [s for s in sequences if len(s.output) < output_tokens]:
        for sequence, result in zip(running, engine.execute([s.next_row() for s in running]), strict=True):
            sequence.take(result)
    return [sequence.output for sequence in sequences]


def run_ahead(engine: Engine, sequences: list[Sequence], output_tokens: int) -> list[list[int]]:
    """Like `run_together`, but every step is launched before the one before it is collected."""
    left = {sequence: output_tokens - len(sequence.output) for sequence in sequences}
    sample_of: dict[Sequence, int] = {}
    in_flight: tuple[list[Sequence], Launched] | None = None
    while in_flight is not None or any(left.values()):
        running = [sequence for sequence in sequences if left[sequence]]
        rows = [one.row_after(sample_of[one]) if one in sample_of else one.next_row() for one in running]
        before, in_flight = in_flight, (running, engine.launch(rows)) if rows else None
        sampled_rows = [sequence for sequence, row in zip(running, rows, strict=True) if row.samples]
        sample_of = {sequence: number for number, sequence in enumerate(sampled_rows)}
        for sequence in sampled_rows:
            left[sequence] -= 1
        if before is not None:
            for sequence, result in zip(before[0], before[1].collect(), strict=True):
                sequence.take(result)
    return [sequence.output for sequence in sequences]


def packed(
    engine: Engine, pages: list[int], start: int, count: int, slot: Memory, with_checksum: bool = True
) -> tuple[int, int | None]:
    """A pack that is waited for: its bytes and their checksum."""
    run = SlotRun(pages, start, count, 0, range(engine.layout.kv_heads))
    copy = engine.pack([run], SlotBuffer(slot, len(slot)), with_checksum, ALL_QUEUED_STEPS)
    copy.wait()
    return copy.byte_counts[0], copy.checksum(0)


def unpacked(
    engine: Engine, pages: list[int], start: int, count: int, slot: Memory, expected: int | None
) -> None:
    """An unpack that is waited for and judged."""
    run = SlotRun(pages, start, count, 0, range(engine.layout.kv_heads))
    copy = engine.unpack([run], SlotBuffer(slot, len(slot)), expected is not None, ALL_QUEUED_STEPS)
    copy.wait()
    copy.judge(0, expected)


def scattered_pages(count: int, sequences: int, pool_pages: int) -> list[list[int]]:
    """Page tables that are neither contiguous nor ordered."""
    shuffled = torch.randperm(pool_pages, generator=torch.Generator().manual_seed(7)).tolist()
    return [shuffled[at * count : (at + 1) * count] for at in range(sequences)]
