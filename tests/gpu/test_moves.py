"""Packs and unpacks on a stream of their own: exact beside steps, ordered by events, never waited for."""

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from services.engine.engine import Engine
from services.engine.events import ALL_QUEUED_STEPS, NOW, EventPassed, StartAfter, StepsUpTo
from services.engine.kv import pack_kernels as kv_segment
from services.engine.kv.copies import Copy, CopyStream
from services.engine.kv.pinned_ring import FIRST_WORDS, TableRing
from services.engine.kv.pool import KvPool
from services.engine.kv.run_table import SlotRun
from services.engine.kv.segments import SlotBuffer
from services.engine.step_events import StepEvents
from services.protocol.messages import Sampling
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
FIRST_TABLES = 8
SLOT_BYTES = 1 << 16


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
    pack(engine, PAGES, TOKENS, slot, True).wait()
    unpack(engine, PAGES, TOKENS, slot, True).wait()
    run_ahead(engine, [Sequence(prompt_of(9), list(range(100, 110)), SAMPLED)], 3)


def new_slot(slots: int = 1) -> torch.Tensor:
    return torch.zeros(slots * SLOT_BYTES, dtype=torch.uint8, device="cuda")


def copy_one(
    unpacks: bool,
    engine: Engine,
    pages: list[int],
    tokens: int,
    slot: torch.Tensor,
    checked: bool = False,
    after: StartAfter = ALL_QUEUED_STEPS,
) -> Copy:
    """One run, from the sequence's first token on, into or out of a buffer of one slot."""
    run = SlotRun(pages, 0, tokens, 0, range(engine.layout.kv_heads))
    verb = engine.copies.unpack if unpacks else engine.copies.pack
    with torch.inference_mode():
        return verb([run], SlotBuffer(slot, SLOT_BYTES), checked, after)


pack = partial(copy_one, False)
unpack = partial(copy_one, True)


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

    slots, copies = [new_slot() for _ in range(4)], []
    launch = engine.launch
    target = list(range(20, 35))

    def launch_beside(rows):  # type: ignore[no-untyped-def]
        steps_before = engine.copies.steps_event()
        assert steps_before is not None
        launched = launch(rows)
        slot = slots[len(copies) // 2 % 4]
        copies.append(pack(engine, moved.pages, TOKENS, slot, True, EventPassed(steps_before)))
        copies.append(unpack(engine, target, TOKENS, slot, True, EventPassed(steps_before)))
        return launched

    engine.launch = launch_beside  # type: ignore[method-assign]
    try:
        assert run_ahead(engine, sequences(), 20) == expected
    finally:
        engine.launch = launch  # type: ignore[method-assign]
    assert len(copies) >= 40
    copies[-1].wait()
    assert len({copy.checksum(0) for copy in copies}) == 1
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
        step = StepsUpTo(engine.queued_step)
        packed = pack(engine, PAGES, TOKENS, slot, True, step)
        unpacked = unpack(engine, list(range(20, 30)), TOKENS, other, True, step)
        engine.fence(unpacked)
        later = engine.copies.steps_event()
        assert not (launched.is_done or packed.is_done or unpacked.is_done)
        assert later is not None and not later.query()
    launched.collect()
    unpacked.wait()
    assert packed.is_done and packed.checksum(0) is not None


def test_a_pack_starts_after_its_event_and_needs_no_later_step(engine: Engine) -> None:
    fill_pages(engine, 2)
    pack(engine, PAGES, TOKENS, expected := new_slot()).wait()
    fill_pages(engine, 3)
    pack(engine, PAGES, TOKENS, other := new_slot()).wait()
    assert not torch.equal(expected, other)

    pages = torch.tensor(PAGES, device="cuda")
    wanted = engine.pool.data[PAGES].clone()
    torch.cuda.synchronize()
    fill_pages(engine, 2)
    torch.cuda._sleep(SLEEP_CYCLES)
    engine.pool.data.index_copy_(0, pages, wanted)  # the step that computes what is packed
    step = engine.copies.steps_event()
    torch.cuda._sleep(SLEEP_CYCLES)  # the next one
    end = engine.copies.steps_event()
    found = new_slot_beside()
    assert step is not None
    move = pack(engine, PAGES, TOKENS, found, after=EventPassed(step))
    move.wait()
    assert end is not None and not end.query(), "it waited for the step after its own"
    torch.cuda.synchronize()
    assert torch.equal(found, other)


def test_steps_are_known_by_number_as_they_pass(engine: Engine) -> None:
    """And a pack behind one of them starts when that one is done, whatever is queued after it."""
    sequence = Sequence(prompt_of(9), list(range(100, 110)), SAMPLED)
    sequence.take(engine.execute([sequence.next_row()])[0])
    torch.cuda.synchronize()
    before = engine.queued_step
    assert engine.passed_step() == before
    torch.cuda._sleep(SLEEP_CYCLES)
    launched = engine.launch([sequence.next_row()])
    engine.copy_pages([(120, 121)])
    engine.copy_pages([])
    assert (engine.queued_step, engine.passed_step()) == (before + 2, before)
    torch.cuda._sleep(SLEEP_CYCLES)
    engine.copy_pages([(120, 121)])
    run = SlotRun(PAGES, 0, TOKENS, 0, range(engine.layout.kv_heads))
    move = engine.pack([run], SlotBuffer(new_slot_beside(), SLOT_BYTES), False, StepsUpTo(before + 1))
    assert not move.is_done
    move.wait()
    assert launched.is_done and before + 1 <= engine.passed_step() < before + 3
    with pytest.raises(ValueError, match="not queued yet"):
        engine.pack([run], SlotBuffer(new_slot(), SLOT_BYTES), False, StepsUpTo(before + 4))
    torch.cuda.synchronize()
    assert engine.passed_step() == before + 3


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
    pack(engine, PAGES, 4, slot := new_slot()).wait()
    page, source = 30, 31
    engine.pool.data[source] = 1.0
    torch.cuda.synchronize()
    move: Copy = unpack(engine, [page], 4, slot, after=EventPassed(busy_elsewhere()))
    if held:
        engine.fence(move)
    engine.copy_pages([(source, page)])
    torch.cuda.synchronize()
    assert bool((engine.pool.data[page] == 1.0).all()) == held


SLOTS = 24
HEADS_OF = (slice(None), slice(0, 1), slice(1, 2))


def many_runs(engine: Engine, first_page: int) -> list[SlotRun]:
    """Eight runs of each of three sequences, of which one moves all its heads, and each a page that is shared
    by runs."""
    every = range(engine.layout.kv_heads)
    size = engine.layout.page_size_tokens
    runs = []
    for at, heads in enumerate(HEADS_OF):
        pages = list(range(first_page + 20 * at, first_page + 20 * (at + 1)))
        for one in range(8):
            start = one * (size + 1)
            count = size + 1 if one < 7 else 1
            runs.append(SlotRun(pages, start, count, at * 8 + one, every[heads]))
    return runs


def test_many_slots_take_one_launch_and_no_wait(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several sequences with ranges of heads, there and back, beside a device that is busy."""
    pages = list(range(128))
    data = engine.pool.data
    data[pages] = torch.randn(data[pages].shape, device="cuda").to(data.dtype)
    former = data.clone()
    buffer = SlotBuffer(new_slot(SLOTS), SLOT_BYTES)
    packs, unpacks = many_runs(engine, 0), many_runs(engine, 64)
    launches = []
    launch = kv_segment.move_runs_kernel

    def counted(*arguments: object, **options: object) -> None:
        launches.append(options)
        launch(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(kv_segment, "move_runs_kernel", counted)
    torch.cuda.synchronize()
    with nothing_may_wait():
        torch.cuda._sleep(SLEEP_CYCLES)
        with torch.inference_mode():
            packed = engine.copies.pack(packs, buffer, True, ALL_QUEUED_STEPS)
            unpacked = engine.copies.unpack(unpacks, buffer, True, NOW)
        assert not packed.is_done and not unpacked.is_done
    assert launches == [{"unpack": False}, {"unpack": True}]
    unpacked.wait()
    sums = packed.checksums()
    assert sums is not None and len(set(sums)) == SLOTS
    for run, expected in enumerate(sums):
        unpacked.judge(run, expected)
    size = engine.layout.page_size_tokens
    moved = torch.zeros(data.shape, dtype=torch.bool, device="cuda")
    for one, other in zip(packs, unpacks, strict=True):
        for token in range(one.start_token, one.start_token + one.token_count):
            heads = slice(one.heads.start, one.heads.stop)
            source = former[one.pages[token // size], :, :, heads, token % size]
            page = other.pages[token // size]
            assert torch.equal(data[page, :, :, heads, token % size], source)
            moved[page, :, :, heads, token % size] = True
    assert torch.equal(data[~moved], former[~moved])


def test_tables_that_are_still_read_are_not_written_again(engine: Engine) -> None:
    """Forty launches queued behind a busy device, each with a table of its own; then as many again, which
    find the former ones' memory."""
    pool = KvPool(engine.layout, 64, engine.kv_dtype, engine.device)
    pool.data[:] = torch.arange(64, device="cuda").view(64, 1, 1, 1, 1, 1).to(pool.data.dtype)
    copies, heads = CopyStream(pool, 8, StepEvents()), range(engine.layout.kv_heads)
    memories = [new_slot() for _ in range(40)]
    torch.cuda.synchronize()
    rings = []
    for rounds in range(2):
        busy = EventPassed(busy_elsewhere())
        queued = [
            copies.pack([SlotRun([at + rounds], 0, 1, 0, heads)], SlotBuffer(memory, SLOT_BYTES), False, busy)
            for at, memory in enumerate(memories)
        ]
        assert not queued[0].is_done
        queued[-1].wait()
        used = queued[0].byte_counts[0]
        found = [memory[:used].view(pool.data.dtype).unique().tolist() for memory in memories]
        assert found == [[at + rounds] for at in range(40)]
        rings.append(len(copies._segments.ring))
    assert rings[0] == rings[1] == 40


def test_a_table_longer_than_all_before_gets_memory_that_is_large_enough() -> None:
    ring = TableRing(torch.device("cuda"), FIRST_TABLES)
    sizes = []
    for count in (3, 3 * FIRST_WORDS, *[1] * FIRST_TABLES):
        words = array("i", range(count))
        sent = ring.send(words)
        done = torch.cuda.Event()
        done.record()
        ring.used(done)
        torch.cuda.synchronize()
        assert sent[: len(words)].tolist() == list(words)
        sizes.append(len(sent))
    assert len(ring) == FIRST_TABLES
    assert [at for at, size in enumerate(sizes) if size == 4 * FIRST_WORDS] == [1, 1 + FIRST_TABLES]
