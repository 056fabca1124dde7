"""Pack and unpack against an independent numpy statement of the canonical layout."""

from array import array
from itertools import chain
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.errors import ChecksumMismatch, SegmentError
from services.engine.events import NOW
from services.engine.kv.checksum import BLOCK_WORDS, checksum, queue_checksums
from services.engine.kv.copies import Copy, CopyStream
from services.engine.kv.layout import KvLayout
from services.engine.kv.pool import KvPool
from services.engine.kv.run_table import RUN_FIELDS, RunTable, SlotRun
from services.engine.kv.segments import SlotBuffer
from services.engine.kv.staging_view import StagingError, host_view
from services.engine.step_events import StepEvents

CPU = torch.device("cpu")
LAYERS, KV_HEADS, HEAD_DIM = 3, 2, 4
HEADS = range(KV_HEADS)
SLOT_BYTES = 2048


def _pool(page_size: int, dtype: torch.dtype = torch.float32, pages: int = 40, seed: int = 0) -> KvPool:
    pool = KvPool(KvLayout(LAYERS, KV_HEADS, page_size, HEAD_DIM), pages, dtype, CPU)
    pool.data.normal_(generator=torch.Generator().manual_seed(seed))
    return pool


def _run(pages: list[int], start: int, count: int, slot: int = 0, heads: range = HEADS) -> SlotRun:
    return SlotRun(pages, start, count, slot, heads)


def _buffer(memory: bytearray | None = None, slots: int = 1) -> SlotBuffer:
    memory = bytearray(b"\xee" * (slots * SLOT_BYTES)) if memory is None else memory
    return SlotBuffer(memoryview(memory), len(memory) // slots)


def _bytes(buffer: SlotBuffer, slot: int) -> bytes:
    assert isinstance(buffer.memory, memoryview)
    return bytes(buffer.memory[slot * buffer.slot_bytes : (slot + 1) * buffer.slot_bytes])


def _pack(pool: KvPool, buffer: SlotBuffer, *runs: SlotRun) -> Copy:
    copy = CopyStream(pool, 8, StepEvents()).pack(runs, buffer, True, NOW)
    assert copy.is_done
    return copy


def _canonical(pool: KvPool, run: SlotRun) -> bytes:
    """The layout, spelled out one element vector at a time."""
    data, size = pool.data.view(torch.uint8).numpy(), pool.layout.page_size_tokens
    vectors = [
        data[run.pages[token // size], layer, side, head, token % size].tobytes()
        for head in run.heads
        for layer in range(LAYERS)
        for side in range(2)
        for token in range(run.start_token, run.start_token + run.token_count)
    ]
    return b"".join(vectors)


@st.composite
def _cuts(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Adjacent runs of one sequence: first tokens and numbers of tokens."""
    start = draw(st.integers(0, 20))
    runs = []
    for count in draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)):
        runs.append((start, count))
        start += count
    return runs


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 17),
    st.integers(1, 17),
    st.lists(st.tuples(_cuts(), st.sampled_from([range(2), range(1), range(1, 2)])), min_size=1, max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.randoms(use_true_random=False),
)
def test_round_trip_between_page_sizes(
    from_size: int,
    to_size: int,
    sequences: list[tuple[list[tuple[int, int]], range]],
    dtype: torch.dtype,
    random: Random,
) -> None:
    """Of several sequences at once, with ranges of heads that have other numbers on the other side."""
    pages_each = 50
    source, destination = (
        _pool(size, dtype, pages=pages_each * len(sequences), seed=size) for size in (from_size, to_size)
    )
    slots = sum(len(cuts) for cuts, _ in sequences) + 1
    order = random.sample(range(slots), slots)
    packs: list[SlotRun] = []
    unpacks: list[SlotRun] = []
    tables = [random.sample(range(source.pages), source.pages) for _ in range(2)]
    for at, (cuts, heads) in enumerate(sequences):
        own = slice(at * pages_each, (at + 1) * pages_each)
        there = heads if len(heads) == 2 else range(1 - heads.start, 2 - heads.start)
        for start, count in cuts:
            slot = order[len(packs)]
            packs.append(SlotRun(tables[0][own], start, count, slot, heads))
            unpacks.append(SlotRun(tables[1][own], start, count, slot, there))
    random.shuffle(unpacks)

    buffer = _buffer(slots=slots)
    packed = _pack(source, buffer, *packs)
    for number, run in enumerate(packs):
        expected = _canonical(source, run)
        assert packed.byte_counts[number] == len(expected)
        found = _bytes(buffer, run.slot)
        assert found == expected + b"\xee" * (SLOT_BYTES - len(expected))
        assert packed.checksum(number) == checksum(torch.frombuffer(bytearray(expected), dtype=torch.uint8))
    assert set(_bytes(buffer, order[-1])) == {0xEE}

    before = destination.data.clone()
    unpacked = CopyStream(destination, 8, StepEvents()).unpack(unpacks, buffer, True, NOW)
    touched = torch.zeros_like(before, dtype=torch.bool)
    for number, run in enumerate(unpacks):
        unpacked.judge(number, packed.checksum([one.slot for one in packs].index(run.slot)))
        expected = _canonical(destination, run)
        assert expected == _bytes(buffer, run.slot)[: len(expected)]
        for token in range(run.start_token, run.start_token + run.token_count):
            page = run.pages[token // to_size]
            touched[page, :, :, run.heads.start : run.heads.stop, token % to_size] = True
    assert torch.equal(destination.data[~touched], before[~touched])


def test_a_head_range_is_contiguous_whatever_the_tokens() -> None:
    """What lets ranks of different tensor parallelism exchange whole regions."""
    pool, slot = _pool(4), bytearray(1 << 14)
    (byte_count,) = _pack(pool, _buffer(slot), _run(list(range(40)), 3, 11)).byte_counts
    second_head = np.frombuffer(slot[byte_count // 2 : byte_count], dtype=np.float32).reshape(
        LAYERS, 2, 11, HEAD_DIM
    )
    for token in range(3, 14):
        expected = pool.data[token // 4, :, :, 1, token % 4].numpy()
        np.testing.assert_array_equal(second_head[:, :, token - 3], expected)


def test_non_finite_numbers_do_not_enter_the_pool() -> None:
    pool, slot = _pool(4), bytearray(1 << 14)
    (byte_count,) = _pack(pool, _buffer(slot), _run([0, 1], 0, 8)).byte_counts
    np.frombuffer(slot, dtype=np.float32)[: byte_count // 8] = np.nan
    CopyStream(pool, 8, StepEvents()).unpack([_run([0, 1], 0, 7)], _buffer(slot), False, NOW)
    assert bool(pool.data.isfinite().all())


def test_a_wrong_checksum_is_told_when_it_is_judged() -> None:
    """By the number of the run: the others are judged by what is in their own slots."""
    pool, memory = _pool(4), bytearray(1 << 14)
    buffer, pages = _buffer(memory, slots=2), list(range(4))
    digests = _pack(pool, buffer, _run(pages, 0, 8, 1), _run(pages, 8, 8, 0)).checksums()
    assert digests is not None and len(set(digests)) == 2
    copies = CopyStream(pool, 8, StepEvents())
    runs = [_run([4, 5, 6, 7], 0, 8, 1), _run([4, 5, 6, 7], 8, 8, 0)]
    moved = copies.unpack(runs, buffer, True, NOW)
    for run, digest in enumerate(digests):
        moved.judge(run, digest)
    memory[17] ^= 1
    moved = copies.unpack(runs, buffer, True, NOW)
    moved.judge(0, digests[0])
    with pytest.raises(ChecksumMismatch, match=f"the sender packed {digests[1]:016x}"):
        moved.judge(1, digests[1])
    moved.judge(1, None)
    with pytest.raises(ChecksumMismatch, match="was not computed"):
        copies.unpack(runs, buffer, False, NOW).judge(0, digests[0])


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (_run([0, 1], 0, 9), "2 pages do not cover tokens up to 8"),
        (_run([0, 40], 0, 8), "page out of range: the pool has 40"),
        (_run([0, -1], 0, 8), "page out of range"),
        (_run([0], -1, 1), "start >= 0"),
        (_run([0], 0, 0), "tokens >= 1"),
        (_run(list(range(40)), 0, 160), "does not fit the slot"),
        (_run([0], 0, 1, slot=2), "does not fit the slot: 2 of 2 slots"),
        (_run([0], 0, 1, slot=-1), "does not fit the slot"),
        (_run([0], 0, 1, heads=range(2, 3)), "the pool has 2 heads"),
        (_run([0], 0, 1, heads=range(-1, 1)), "the pool has 2 heads"),
        (_run([0], 0, 1, heads=range(1, 1)), "the pool has 2 heads"),
    ],
)
def test_impossible_segments_are_refused(run: SlotRun, message: str) -> None:
    """And none of those beside it is moved."""
    pool, memory = _pool(4), bytearray(8192)
    before = pool.data.clone()
    for copy in (CopyStream(pool, 8, StepEvents()).pack, CopyStream(pool, 8, StepEvents()).unpack):
        with pytest.raises(SegmentError, match=message):
            copy([_run([3], 0, 1, slot=0), run], _buffer(memory, slots=2), False, NOW)
    assert not any(memory) and torch.equal(pool.data, before)
    with pytest.raises(SegmentError, match="no runs"):
        CopyStream(pool, 8, StepEvents()).pack([], _buffer(memory), False, NOW)


def test_slots_are_views_not_copies() -> None:
    buffer = bytearray(64)
    view = host_view(memoryview(buffer)[16:32])
    view.fill_(7)
    assert bytes(buffer) == bytes(16) + b"\x07" * 16 + bytes(32)
    with pytest.raises(StagingError, match="read-only"):
        host_view(memoryview(bytes(4)))


# ---------------------------------------------------------------- the checksum


def _random_bytes(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("count", [1, 7, 8, 9, 4096, 8 * BLOCK_WORDS, 8 * BLOCK_WORDS + 5, 24 * BLOCK_WORDS])
def test_checksum_sees_every_kind_of_damage(count: int) -> None:
    data = _random_bytes(count)
    whole = checksum(data)
    assert 0 <= whole < 2**63
    assert checksum(data.clone()) == whole
    places = {0, count // 2, count - 1}
    for place in places:
        for bit in (0, 7):
            data[place] ^= 1 << bit
            assert checksum(data) != whole
            data[place] ^= 1 << bit
    if count > 1:
        assert checksum(data[:-1]) != whole
        assert checksum(torch.cat((data, data.new_zeros(1)))) != whole
    assert checksum(data) == whole


def test_checksum_sees_swaps_and_cancelling_changes() -> None:
    words = _random_bytes(24 * BLOCK_WORDS).view(torch.int64)
    whole = checksum(words.view(torch.uint8))
    for first, second in ((0, 1), (5, BLOCK_WORDS + 5), (BLOCK_WORDS - 1, BLOCK_WORDS)):
        swapped = words.clone()
        swapped[[first, second]] = words[[second, first]]
        assert checksum(swapped.view(torch.uint8)) != whole
    blocks = words.view(3, -1)[[1, 0, 2]].contiguous()
    assert checksum(blocks.view(-1).view(torch.uint8)) != whole
    for change in (1, 1 << 31, 1 << 62, -(1 << 63)):
        cancelling = words.clone()
        cancelling[10] += change
        cancelling[20] -= change
        assert checksum(cancelling.view(torch.uint8)) != whole


def test_a_slot_has_the_same_checksum_whatever_lies_in_others() -> None:
    """Of fewer blocks, and of bytes that fill no word, beside longer ones."""
    slot_bytes, counts = 24 * BLOCK_WORDS + 8, [24 * BLOCK_WORDS, 5, 8 * BLOCK_WORDS + 3]
    staging = _random_bytes(3 * slot_bytes)
    fields = [(2 - at, count >> 3, *[0] * (RUN_FIELDS - 2)) for at, count in enumerate(counts)]
    table = RunTable(array("i", chain.from_iterable(fields)), counts, 1, 1)
    found = queue_checksums(staging, slot_bytes, torch.empty(0, dtype=torch.int32), table).values()
    slots = staging.view(3, slot_bytes).flip(0)
    assert found == [checksum(slot[:count]) for slot, count in zip(slots, counts, strict=True)]


def test_checksum_tells_lengths_of_zeros_apart() -> None:
    assert len({checksum(torch.zeros(n, dtype=torch.uint8)) for n in (1, 8, 16, 4096, 8 * BLOCK_WORDS)}) == 5


def test_checksums_look_random() -> None:
    """3,000 one-bit variations of one slot give 3,000 values whose bits are even."""
    data, seen = torch.zeros(375, dtype=torch.uint8), []
    for bit in range(3000):
        data[bit // 8] = 1 << (bit % 8)
        seen.append(checksum(data))
        data[bit // 8] = 0
    assert len(set(seen)) == len(seen)
    for bit in range(63):
        assert 0.44 < sum(value >> bit & 1 for value in seen) / len(seen) < 0.56
