"""An engine without tensors, whose KV cache says whether it is right.

The KV of a token is one *cell*: a hash of all tokens up to it, with the token itself. What is read back of a
sequence must be a chain of such cells from its first token on; a page, slot or segment that is lost, stale,
foreign or misplaced breaks the chain, and the engine raises. The next token is sampled from the last cell, so
that `continuation` knows every right answer from the prompt alone.
"""

import struct
import zlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from kvtransfer.messages import KvGeometry
from services.engine.batch import Row, RowResult, SampledToken, SampleSpec
from services.engine.events import StartAfter
from services.engine.kv.copies import Copy
from services.engine.kv.run_table import SlotRun
from services.engine.kv.segments import SlotBuffer
from tests.sim.kernel import Violation

VOCABULARY = 997
EOS = 0
"""One draw in `EOS_EVERY` ends a choice."""
EOS_EVERY = 23
PAGE_TOKENS = 4
GEOMETRY = KvGeometry("simulated", 1, 1, 8, "float32")
CELL_BYTES = GEOMETRY.token_bytes
COPIES = CELL_BYTES // 8
EMPTY = -1
MASK = (1 << 63) - 1


def cell_after(before: int, token: int) -> int:
    mixed = (before * 6364136223846793005 + token * 1442695040888963407 + 1013904223) & MASK
    return ((mixed ^ (mixed >> 29)) & ~1023 & MASK) | token


def sampled_after(cell: int, choice: int, seed: int) -> int:
    value = (cell_after(cell, (choice * 131 + seed) % VOCABULARY)) >> 13
    return EOS if value % EOS_EVERY == 0 else 1 + value % (VOCABULARY - 1)


def continuation(prompt: list[int], choice: int, seed: int, max_tokens: int) -> list[int]:
    """The right answer."""
    cell, output = 0, []
    for token in prompt:
        cell = cell_after(cell, token)
    while len(output) < max_tokens:
        output.append(sampled_after(cell, choice, seed))
        if output[-1] == EOS:
            break
        cell = cell_after(cell, output[-1])
    return output


class SimEngine:
    """What a worker and its role ask of an engine. `fails` is asked before every step."""

    device = SimpleNamespace(type="cpu")
    geometry = GEOMETRY
    vocab_size = VOCABULARY
    eos_token_ids = (EOS,)

    def __init__(self, pages: int) -> None:
        self._cells = [EMPTY] * (pages * PAGE_TOKENS)
        self._sampled: list[int] = []
        self.queued_step = 0
        self.fail_steps = 0
        self.fail_on_launch = False

    def launch(self, rows: list[Row]) -> SimpleNamespace:
        fails, self.fail_steps = self.fail_steps > 0, max(0, self.fail_steps - 1)
        if fails and self.fail_on_launch:
            raise RuntimeError("the simulated device failed")
        results = [RowResult([SampledToken(token) for token in self._row(row)]) for row in rows]
        self._sampled = [sampled.token for result in results for sampled in result.sampled]
        self.queued_step += 1

        def collect() -> list[RowResult]:
            if fails:
                raise RuntimeError("the simulated device failed")
            return results

        return SimpleNamespace(collect=collect, is_done=True, done=None)

    def copy_pages(self, pairs: list[tuple[int, int]]) -> None:
        size = PAGE_TOKENS
        for source, target in pairs:
            page = self._cells[source * size : (source + 1) * size]
            self._cells[target * size : (target + 1) * size] = page
        self.queued_step += bool(pairs)

    def passed_step(self) -> int:
        """Every step is done when its call returns."""
        return self.queued_step

    def fence(self, copy: Copy) -> None:
        """Every copy is done when its call returns."""

    def close(self) -> None:
        """Nothing is held."""

    def pack(
        self, runs: Sequence[SlotRun], buffer: SlotBuffer, with_checksums: bool, after: StartAfter
    ) -> Copy:
        contents = []
        for run in runs:
            cells = self._read(run.pages, run.start_token + run.token_count)[run.start_token :]
            data = b"".join(struct.pack("<q", cell) * COPIES for cell in cells)
            _slot(buffer, run.slot)[: len(data)] = data
            contents.append(data)
        return _copied(contents, with_checksums)

    def unpack(
        self, runs: Sequence[SlotRun], buffer: SlotBuffer, with_checksums: bool, after: StartAfter
    ) -> Copy:
        """With checksums, what arrives in pieces is for whoever judges the copy."""
        contents = []
        for run in runs:
            data = bytes(_slot(buffer, run.slot)[: run.token_count * CELL_BYTES])
            for index, at in enumerate(range(0, len(data), CELL_BYTES)):
                copies = set(struct.unpack_from(f"<{COPIES}q", data, at))
                token = run.start_token + index
                if len(copies) != 1 and not with_checksums:
                    raise Violation(f"token {token} arrives in pieces of different writes")
                self._write(run.pages, token, copies.pop() if len(copies) == 1 else EMPTY)
            contents.append(data)
        return _copied(contents, with_checksums)

    def synchronize(self) -> None:
        """Everything is done when its call returns."""

    # ------------------------------------------------------------ inner workings

    def _row(self, row: Row) -> list[int]:
        tokens = row.tokens if row.sampled_by < 0 else [self._sampled[row.sampled_by]]
        before = self._read(row.pages, row.start)
        cell = before[-1] if before else 0
        for position, token in enumerate(tokens, row.start):
            cell = cell_after(cell, token)
            self._write(row.pages, position, cell)
        return [self._draw(cell, draw, row.start + len(tokens)) for draw in row.samples]

    def _draw(self, cell: int, draw: SampleSpec, position: int) -> int:
        if draw.position != position:
            raise Violation(f"a draw for position {draw.position} follows {position} tokens")
        return sampled_after(cell, draw.choice, draw.sampling.seed)

    def _read(self, pages: list[int], count: int) -> list[int]:
        """The first `count` cells of a sequence, which must be a chain."""
        cells: list[int] = []
        size = PAGE_TOKENS
        for page in pages[: -(-count // size)]:
            cells += self._cells[page * size : (page + 1) * size]
        del cells[count:]
        before = 0
        for position, cell in enumerate(cells):
            if cell != cell_after(before, cell & 1023):
                raise Violation(f"token {position} of {count} is read from KV that is not its own")
            before = cell
        if len(cells) < count:
            raise Violation(f"{len(pages)} pages do not hold {count} tokens")
        return cells

    def _write(self, pages: list[int], position: int, cell: int) -> None:
        self._cells[pages[position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS] = cell


def _slot(buffer: SlotBuffer, slot: int) -> memoryview:
    assert isinstance(buffer.memory, memoryview)
    return buffer.memory[slot * buffer.slot_bytes : (slot + 1) * buffer.slot_bytes]


def _copied(contents: list[bytes], with_checksums: bool) -> Copy:
    found = [zlib.crc32(data) for data in contents]
    checksums: Any = SimpleNamespace(values=lambda: found) if with_checksums else None
    return Copy([len(data) for data in contents], None, checksums)
