"""Pack and unpack against an independent numpy statement of the canonical layout."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.attention_plan import KvLayout
from services.engine.errors import ChecksumMismatch, SegmentError
from services.engine.kv_pool import KvPool
from services.engine.moves import Moves
from services.engine.ops.checksum import BLOCK_WORDS, checksum
from services.engine.segments import Slot, pack, unpack
from services.engine.staging_view import StagingError, host_view

CPU = torch.device("cpu")
LAYERS, KV_HEADS, HEAD_DIM = 3, 2, 4


def _pool(page_size: int, dtype: torch.dtype = torch.float32, pages: int = 40, seed: int = 0) -> KvPool:
    pool = KvPool(KvLayout(LAYERS, KV_HEADS, page_size, HEAD_DIM), pages, dtype, CPU)
    pool.data.normal_(generator=torch.Generator().manual_seed(seed))
    return pool


def _packed(pool: KvPool, pages: list[int], start: int, count: int, slot: Slot) -> tuple[int, int | None]:
    move = Moves(pool).pack(pages, start, count, slot, True, None)
    assert move.is_done
    return move.byte_count, move.checksum()


def _canonical(pool: KvPool, pages: list[int], start: int, count: int) -> bytes:
    """The layout, spelled out one element vector at a time."""
    data, size = pool.data.view(torch.uint8).numpy(), pool.layout.page_size_tokens
    runs = [
        data[pages[token // size], layer, side, head, token % size].tobytes()
        for head in range(KV_HEADS)
        for layer in range(LAYERS)
        for side in range(2)
        for token in range(start, start + count)
    ]
    return b"".join(runs)


@st.composite
def _runs(draw: st.DrawFn) -> tuple[int, int, int, int]:
    start = draw(st.integers(0, 30))
    return draw(st.integers(1, 17)), draw(st.integers(1, 17)), start, draw(st.integers(1, 40 - start))


@settings(max_examples=150, deadline=None)
@given(
    _runs(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.randoms(use_true_random=False),
)
def test_round_trip_between_page_sizes(
    run: tuple[int, int, int, int], dtype: torch.dtype, random: np.random.Generator
) -> None:
    from_size, to_size, start, count = run
    source, destination = _pool(from_size, dtype), _pool(to_size, dtype, seed=1)
    source_pages, destination_pages = list(range(40)), list(range(40))
    random.shuffle(source_pages)
    random.shuffle(destination_pages)
    slot = bytearray(b"\xee" * 16384)

    byte_count, digest = _packed(source, source_pages, start, count, memoryview(slot))
    assert bytes(slot[:byte_count]) == _canonical(source, source_pages, start, count)
    assert set(slot[byte_count:]) <= {0xEE}

    before = destination.data.clone()
    Moves(destination).unpack(destination_pages, start, count, memoryview(slot), True, None).judge(digest)
    assert _canonical(destination, destination_pages, start, count) == bytes(slot[:byte_count])
    touched = torch.zeros_like(before, dtype=torch.bool)
    for token in range(start, start + count):
        touched[destination_pages[token // to_size], :, :, :, token % to_size] = True
    assert torch.equal(destination.data[~touched], before[~touched])


def test_a_head_range_is_contiguous_whatever_the_tokens() -> None:
    """What lets ranks of different tensor parallelism exchange whole regions."""
    pool, slot = _pool(4), bytearray(1 << 14)
    byte_count, _ = pack(pool, list(range(40)), 3, 11, memoryview(slot), False)
    second_head = np.frombuffer(slot[byte_count // 2 : byte_count], dtype=np.float32).reshape(
        LAYERS, 2, 11, HEAD_DIM
    )
    for token in range(3, 14):
        expected = pool.data[token // 4, :, :, 1, token % 4].numpy()
        np.testing.assert_array_equal(second_head[:, :, token - 3], expected)


def test_some_heads_travel_alone() -> None:
    """What a rank sends to one that shares some of its heads is those heads' range of the whole segment."""
    pool, other = _pool(4), _pool(8, seed=1)
    whole, part = bytearray(1 << 14), bytearray(1 << 14)
    byte_count, _ = pack(pool, list(range(40)), 3, 11, memoryview(whole), False)
    half_count, _ = pack(pool, list(range(40)), 3, 11, memoryview(part), False, range(1, 2))
    assert half_count * 2 == byte_count
    assert part[:half_count] == whole[half_count:byte_count]
    before = other.data.clone()
    unpack(other, list(range(40)), 3, 11, memoryview(part), False, range(1))
    for token in range(3, 14):
        came = other.data[token // 8, :, :, 0, token % 8]
        assert torch.equal(came, pool.data[token // 4, :, :, 1, token % 4])
    assert torch.equal(other.data[:, :, :, 1], before[:, :, :, 1])
    for heads in (range(2, 3), range(-1, 1), range(1, 1)):
        with pytest.raises(SegmentError, match="the pool has 2 heads"):
            pack(pool, [0], 0, 1, memoryview(part), False, heads)


def test_non_finite_numbers_do_not_enter_the_pool() -> None:
    pool, slot = _pool(4), bytearray(1 << 14)
    byte_count, _ = pack(pool, [0, 1], 0, 8, memoryview(slot), False)
    np.frombuffer(slot, dtype=np.float32)[: byte_count // 8] = np.nan
    unpack(pool, [0, 1], 0, 7, memoryview(slot), False)
    assert bool(pool.data.isfinite().all())


def test_a_wrong_checksum_is_told_when_it_is_judged() -> None:
    pool, slot = _pool(4), bytearray(1 << 14)
    _, digest = _packed(pool, list(range(4)), 0, 16, memoryview(slot))
    assert digest is not None
    moves = Moves(pool)
    moves.unpack(list(range(4, 8)), 0, 16, memoryview(slot), True, None).judge(digest)
    slot[17] ^= 1
    with pytest.raises(ChecksumMismatch, match=f"the sender packed {digest:016x}"):
        moves.unpack(list(range(4, 8)), 0, 16, memoryview(slot), True, None).judge(digest)
    with pytest.raises(ChecksumMismatch, match="was not computed"):
        moves.unpack(list(range(4, 8)), 0, 16, memoryview(slot), False, None).judge(digest)


@pytest.mark.parametrize(
    ("pages", "start", "count", "message"),
    [
        ([0, 1], 0, 9, "2 pages do not cover tokens up to 8"),
        ([0, 40], 0, 8, "page out of range: the pool has 40"),
        ([0, -1], 0, 8, "page out of range"),
        ([0], -1, 1, "start >= 0"),
        ([0], 0, 0, "tokens >= 1"),
        (list(range(40)), 0, 160, "does not fit the slot"),
    ],
)
def test_impossible_segments_are_refused(pages: list[int], start: int, count: int, message: str) -> None:
    pool, slot = _pool(4), bytearray(4096)
    with pytest.raises(SegmentError, match=message):
        pack(pool, pages, start, count, memoryview(slot), False)
    with pytest.raises(SegmentError, match=message):
        unpack(pool, pages, start, count, memoryview(slot), False)


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
