"""What surrounds the decode graphs, on a CPU: packed inputs, page tables by difference, rows in their slots.

A graph is replaced by what it records: the forward over the same input memory.
"""

from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.attention.page_table_rows import TableSlots
from services.engine.batch import Row, SampleSpec
from services.engine.decode_graphs import DecodeGraphs, ladder
from services.engine.engine import Engine
from services.engine.errors import RowError
from services.engine.host_copy import pinned, unpacked
from services.protocol.messages import Sampling
from tests.checkpoints import make_checkpoint
from tests.engine.harness import GREEDY, Sequence, prompt_of, run_ahead, run_together, start_engine
from tests.engine.test_nonfinite import check_a_decoded_token, check_overflowing_values

SAMPLED = Sampling(max_tokens=1, seed=11, temperature=0.9, top_p=0.95)


class Replayed:
    def __init__(self, replay: Callable[[], Any]) -> None:
        self.replay = replay
        self.is_reset = False

    def reset(self) -> None:
        self.is_reset = True


@pytest.fixture
def pageable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU no memory can be pinned."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))


@pytest.fixture
def engine(tmp_path: Any, pageable: None) -> Engine:
    """Its decode steps go through the graphs' inputs, for batches up to 8."""
    engine = start_engine(make_checkpoint("qwen3", tmp_path / "tiny", seed=2, eos=False), pages=128)
    graphs = DecodeGraphs(engine.decoder, engine.pool, engine.layout, 8, 200, engine.steps.sampled)
    for batch in ladder(8):
        replay = partial(graphs._forward, graphs._inputs(batch), batch)
        graphs._graphs[batch] = Replayed(replay)  # type: ignore[assignment]
    engine._graphs = graphs
    return engine


def test_a_rehearsal_leaves_nothing_behind(engine: Engine) -> None:
    """On a GPU it launches no kernel; here every step of it is computed, into page 0."""
    wanted = run_together(engine, [Sequence(prompt_of(23), list(range(18)), SAMPLED, chunk=7)], 8)
    engine._warm_up(engine.pool, 2)
    assert run_together(engine, [Sequence(prompt_of(23), list(range(18)), SAMPLED, chunk=7)], 8) == wanted


def test_a_closed_engine_holds_no_graph(engine: Engine) -> None:
    """NCCL would wait for them when the group is left."""
    assert engine._graphs is not None
    captured: list[Any] = list(engine._graphs._graphs.values())
    engine.close()
    engine.close()
    assert engine._graphs is None
    assert captured and all(graph.is_reset for graph in captured)


def test_a_token_that_is_not_finite(engine: Engine) -> None:
    check_a_decoded_token(engine)


def test_values_that_are_not_finite(engine: Engine) -> None:
    check_overflowing_values(engine)


@pytest.mark.parametrize("run", [run_together, run_ahead])
def test_graphs_give_the_tokens_of_plain_steps(engine: Engine, run: Any) -> None:
    """Batches that shrink from the front, so that sequences move into free slots, and places stay empty."""
    outputs = []
    for with_graphs in (True, False):
        if not with_graphs:
            engine._graphs = None
        sequences = []
        for at, length in enumerate((1, 7, 16, 23, 40)):
            pages = list(range(at * 18, at * 18 + 18))
            sequences.append(Sequence(prompt_of(length), pages, (SAMPLED, GREEDY)[at % 2], chunk=7))
        for first, total in ((0, 6), (2, 13), (4, 20)):
            run(engine, sequences[first:], total)
        outputs.append([sequence.output for sequence in sequences])
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row([5], 8, [1, 2]), "2 pages do not cover position 8"),
        (Row([5], 3, [128]), "page out of range"),
        (Row([5], 3, [-1]), "page out of range"),
        (Row([320], 3, [1]), "token out of range"),
        (Row([5], 200, list(range(60))), "position out of range"),
        (Row([5], -1, [1]), "position out of range"),
    ],
)
def test_impossible_rows_are_refused_before_anything_runs(engine: Engine, row: Row, message: str) -> None:
    row.samples = [SampleSpec(0, row.start + 1, GREEDY, [], [])]
    samples = [SampleSpec(0, 5, GREEDY, [], [])]
    good = Row([5], 4, [1, 2], samples)
    engine.execute([Row([1, 2, 3, 4], 0, [1, 2]), Row([9, 8, 7, 6], 0, [3, 4])])
    expected = engine.execute([good])
    held = engine.pool.data.clone()
    beside = Row([6], 4, [3, 4], samples)
    with pytest.raises(RowError, match=message):
        engine.execute([beside, row])
    assert torch.equal(engine.pool.data, held)
    # the tables that the refused step did not write do not count as written
    found = engine.execute([beside])
    assert engine.execute([good]) == expected
    assert found == engine.execute([Row([6], 4, [3, 4], samples)]) != expected


def test_packed_columns_come_out_as_they_went_in(pageable: None) -> None:
    random = np.random.default_rng(1)
    columns = {
        "odd": random.integers(0, 9, 3, dtype=np.int32),
        "table": random.integers(0, 9, (2, 5), dtype=np.int64),
        "none": np.zeros((0, 4), dtype=np.int32),
        "chance": random.random(7),
        "bias": random.random(1, dtype=np.float32),
    }
    packed = pinned(list(columns.values()))
    for name, tensor in unpacked(packed, columns).items():
        assert np.array_equal(tensor.numpy(), columns[name])
        assert tensor.numpy().dtype == columns[name].dtype
        assert (tensor.data_ptr() - packed.data_ptr()) % 16 == 0 or tensor.numel() == 0


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_slots_mirror_the_page_tables(seed: int) -> None:
    """Against tables that are written anew in every step; and who stays does not move without need."""
    random, slots, table = Random(seed), TableSlots(8), [[0] * 40 for _ in range(8)]
    alive: list[list[int]] = []
    for _ in range(30):
        for _ in range(random.randrange(3)):
            if alive and random.random() < 0.5:
                alive.pop(random.randrange(len(alive)))
            elif len(alive) < 8:
                alive.insert(random.randint(0, len(alive)), [random.randrange(99) for _ in range(3)])
        for pages in alive:
            if random.random() < 0.3 and len(pages) < 40:
                pages.append(random.randrange(99))
        rows = [Row([0], 0, pages) for pages in alive]
        order = slots.place(rows)
        assert sorted(order) == list(range(len(rows)))
        ordered = [rows[at] for at in order]
        for slot, first in slots.changes(ordered):
            pages = ordered[slot].pages
            table[slot][first : len(pages)] = pages[first:]
        for slot, row in enumerate(ordered):
            assert table[slot][: len(row.pages)] == row.pages
        assert not slots.changes([rows[at] for at in slots.place(rows)])


def test_a_sequence_keeps_its_slot_when_others_leave() -> None:
    slots = TableSlots(8)
    rows = [Row([0], 0, [at]) for at in range(5)]
    slots.changes([rows[at] for at in slots.place(rows)])
    del rows[1]
    ordered = [rows[at] for at in slots.place(rows)]
    assert [row.pages for row in ordered] == [[0], [4], [2], [3]]
    assert slots.changes(ordered) == [(1, 0)]
