"""Packs and unpacks on a stream of their own: exact beside steps, ordered by events, never waited for."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from services.engine.engine import Engine
from services.engine.moves import Move
from services.messages import Sampling
from tests.checkpoints import make_checkpoint
from tests.engine.harness import Sequence, prompt_of, run_ahead, start_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
SAMPLED = Sampling(max_tokens=1, seed=11, temperature=0.9, top_p=0.95)
SLEEP_CYCLES = 200_000_000
"""About a tenth of a second: longer than anything that must not wait for it."""
PAGES = list(range(10))
TOKENS = 30


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    model_dir = tmp_path_factory.mktemp("moves")
    make_checkpoint("qwen3", model_dir, seed=4, eos=False)
    engine = start_engine(model_dir, device="cuda")
    engine.capture_graphs()
    warm(engine)
    return engine


def warm(engine: Engine) -> None:
    """Kernels are compiled and pools have blocks before anything is timed or forbidden to wait."""
    slot = new_slot()
    engine.pack(PAGES, 0, TOKENS, slot, True).wait()
    engine.unpack(PAGES, 0, TOKENS, slot, True).wait()
    run_ahead(engine, [Sequence(prompt_of(9), list(range(100, 110)), SAMPLED)], 3)


def new_slot() -> torch.Tensor:
    return torch.zeros(1 << 16, dtype=torch.uint8, device="cuda")


def fill_pages(engine: Engine, seed: int) -> None:
    """Finite random KV in the pages that are moved, so that a stale byte is seen."""
    data = engine.pool.data
    values = torch.randn(data[PAGES].shape, generator=torch.Generator().manual_seed(seed))
    data[PAGES] = values.to(data.dtype).cuda()
    torch.cuda.synchronize()


@contextmanager
def nothing_may_wait() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def busy_elsewhere() -> torch.cuda.Event:
    """An event that passes a tenth of a second from now, on a stream that nobody else uses."""
    stream, event = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
        event.record()
    return event


def test_tokens_are_the_same_while_segments_move(engine: Engine) -> None:
    """Sixty steps, each beside packs of one sequence's pages and unpacks into another's; then the copy's KV
    decodes like the original."""

    def sequences() -> list[Sequence]:
        return [
            Sequence(prompt_of(n), list(range(40 + 20 * at, 60 + 20 * at)), SAMPLED, chunk=7)
            for at, n in enumerate((5, 16, 23))
        ]

    moved = Sequence(prompt_of(TOKENS), [*PAGES, 10, 11, 12, 13, 14], SAMPLED)
    moved.take(engine.execute([moved.next_row()])[0])
    kept = list(moved.output)
    expected = run_ahead(engine, sequences(), 20)

    slots, moves = [new_slot() for _ in range(4)], []
    launch = engine.launch
    target = list(range(20, 35))

    def launch_beside(rows):  # type: ignore[no-untyped-def]
        mark = engine.mark()
        launched = launch(rows)
        slot = slots[len(moves) // 2 % 4]
        moves.append(engine.pack(moved.pages, 0, TOKENS, slot, True, mark))
        moves.append(engine.unpack(target, 0, TOKENS, slot, True, mark))
        return launched

    engine.launch = launch_beside  # type: ignore[method-assign]
    try:
        assert run_ahead(engine, sequences(), 20) == expected
    finally:
        engine.launch = launch  # type: ignore[method-assign]
    assert len(moves) >= 40
    moves[-1].wait()
    assert len({move.checksum() for move in moves}) == 1
    copy = Sequence(moved.prompt, target, SAMPLED)
    copy.done_tokens, copy.output = TOKENS, list(kept)
    assert run_ahead(engine, [copy], 8) == run_ahead(engine, [moved], 8)


def test_the_host_waits_for_none_of_it(engine: Engine) -> None:
    fill_pages(engine, 1)
    sequence = Sequence(prompt_of(9), list(range(100, 110)), SAMPLED)
    sequence.take(engine.execute([sequence.next_row()])[0])
    slot, other = new_slot(), new_slot()
    row = sequence.next_row()
    torch.cuda.synchronize()
    with nothing_may_wait():
        torch.cuda._sleep(SLEEP_CYCLES)
        launched = engine.launch([row])
        packed = engine.pack(PAGES, 0, TOKENS, slot, True, launched.done)
        unpacked = engine.unpack(list(range(20, 30)), 0, TOKENS, other, True, launched.done)
        engine.hold_steps(unpacked)
        later = engine.mark()
        assert not (launched.is_done or packed.is_done or unpacked.is_done)
        assert later is not None and not later.query()
    launched.collect()
    unpacked.wait()
    assert packed.is_done and packed.checksum() is not None


def test_a_pack_starts_after_its_mark_and_needs_no_later_step(engine: Engine) -> None:
    fill_pages(engine, 2)
    engine.pack(PAGES, 0, TOKENS, expected := new_slot(), False).wait()
    fill_pages(engine, 3)
    engine.pack(PAGES, 0, TOKENS, other := new_slot(), False).wait()
    assert not torch.equal(expected, other)

    pages = torch.tensor(PAGES, device="cuda")
    wanted = engine.pool.data[PAGES].clone()
    torch.cuda.synchronize()
    fill_pages(engine, 2)
    torch.cuda._sleep(SLEEP_CYCLES)
    engine.pool.data.index_copy_(0, pages, wanted)  # the step that computes what is packed
    mark = engine.mark()
    torch.cuda._sleep(SLEEP_CYCLES)  # the next one
    end = engine.mark()
    found = new_slot_beside()
    move = engine.pack(PAGES, 0, TOKENS, found, False, mark)
    move.wait()
    assert end is not None and not end.query(), "it waited for the step after its own"
    torch.cuda.synchronize()
    assert torch.equal(found, other)


def new_slot_beside() -> torch.Tensor:
    """Zeroed on a stream of its own, so that it is not queued behind the steps."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        slot = new_slot()
    stream.synchronize()
    return slot


@pytest.mark.parametrize("held", [True, False])
def test_a_step_does_not_overtake_a_move_that_was_given_up(engine: Engine, held: bool) -> None:
    """Pages whose unpack still runs get a new owner, who writes them. Unheld, the unpack comes last: that is
    what makes the first case mean anything."""
    fill_pages(engine, 4)
    engine.pack(PAGES, 0, 4, slot := new_slot(), False).wait()
    page, source = 30, 31
    engine.pool.data[source] = 1.0
    torch.cuda.synchronize()
    move: Move = engine.unpack([page], 0, 4, slot, False, busy_elsewhere())
    if held:
        engine.hold_steps(move)
    engine.copy_pages([(source, page)])
    torch.cuda.synchronize()
    assert bool((engine.pool.data[page] == 1.0).all()) == held
