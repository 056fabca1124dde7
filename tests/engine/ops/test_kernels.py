"""The kernels against their references, on a CPU in Triton's interpreter.

The checks also serve the tests on a GPU (tests/gpu/test_kernels.py), compiled and larger. The interpreter
cannot multiply matrices of bfloat16, so attention is tried here in float32 and float16.
"""

from array import array
from itertools import chain
from random import Random

import pytest
import torch
from torch import Tensor

from services.engine.attention import decode_attention as decode
from services.engine.attention import prefill_attention as prefill
from services.engine.kv import checksum
from services.engine.kv import pack_kernels as kv_segment
from services.engine.kv.layout import KvLayout
from services.engine.kv.pool import KvPool
from services.engine.kv.run_table import RUN_FIELDS, RunTable, RunTables, SlotRun
from services.engine.models.rope import rotation
from services.engine.ops import qkv, rms_norm, swiglu
from tests.engine.interpreter import interpreted

TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
"""Absolute and relative: two roundings of the dtype. Attention gets a quarter of the absolute one, since
its results are means, and small."""
SMALL_TILE = decode.DecodeLaunch(block_keys=16)
EPS = 1e-6
CPU = torch.device("cpu")


def random(
    *shape: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU, seed: int = 0
) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return values.to(dtype).to(device)


def same(found: Tensor, expected: Tensor, factor: float = 1.0) -> None:
    """Equal up to `factor` times the absolute tolerance; NaN is never equal."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(found.float(), expected.float(), atol=tolerance * factor, rtol=tolerance)


def check_norms(dtype: torch.dtype, device: torch.device, tokens: int, size: int) -> None:
    x, residual = (random(tokens, size, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
    weight = random(size, dtype=dtype, device=device)
    expected = torch.nn.functional.rms_norm(x.float(), (size,), weight.float(), EPS).to(dtype)
    same(rms_norm.rms_norm_kernel(x, weight, EPS), expected)
    same(rms_norm.rms_norm_kernel(x.view(1, tokens, size), weight, EPS), expected[None])

    total = residual + x
    normed, kept = rms_norm.add_rms_norm_kernel(x, residual, weight, EPS)
    assert kept.data_ptr() == residual.data_ptr()
    same(kept, total)
    same(normed, torch.nn.functional.rms_norm(total.float(), (size,), weight.float(), EPS).to(dtype))


def check_head_norm(dtype: torch.dtype, device: torch.device, tokens: int, heads: int, head_dim: int) -> None:
    wide = random(tokens, heads + 3, head_dim, dtype=dtype, device=device)
    weight = random(heads, head_dim, dtype=dtype, device=device)
    expected = torch.nn.functional.rms_norm(wide[:, :heads].float(), (head_dim,), None, EPS) * weight.float()
    same(rms_norm.head_rms_norm_kernel(wide[:, :heads], weight, EPS), expected.to(dtype))


def check_swiglu(dtype: torch.dtype, device: torch.device, tokens: int, size: int) -> None:
    gate_up = random(tokens, 2 * size, dtype=dtype, device=device) * 4
    gate, up = gate_up.float().chunk(2, dim=-1)
    same(swiglu.silu_mul_kernel(gate_up), (torch.nn.functional.silu(gate) * up).to(dtype))


def check_qkv(
    dtype: torch.dtype, device: torch.device, tokens: int, heads: int, layout: KvLayout, norm: bool
) -> None:
    kv_heads, size, dim = layout.kv_heads, layout.page_size_tokens, layout.head_dim
    pages, layer = -(-tokens // size) + 2, layout.layers - 1
    product = random(tokens, heads + 2 * kv_heads, dim, dtype=dtype, device=device)
    product[0, heads, 0], product[0, heads + kv_heads, :2] = (
        float("inf"),
        torch.tensor([torch.nan, -torch.inf]),
    )
    weights = random(heads + kv_heads, dim, dtype=dtype, device=device) if norm else None
    frequencies = 100.0 ** -(torch.arange(0, dim, 2, device=device) / dim)
    cos, sin = rotation(torch.arange(5, 5 + tokens, device=device), frequencies, 1.1)
    place = torch.randperm(pages * size, generator=torch.Generator().manual_seed(3))[:tokens].to(device)
    row = (place // size) * (layout.layers * 2 * kv_heads * size) + place % size
    index = (row[:, None] + torch.arange(2 * kv_heads, device=device) * size).view(tokens, 2 * kv_heads)
    index[-1] = -1  # a place of the launch that no token uses
    wide, pool = (KvPool(layout, pages, kind, device) for kind in (torch.float32, dtype))
    wide.data.fill_(7.0)
    pool.data.fill_(7.0)
    expected = qkv.qkv_to_pool_reference(
        product.float(),
        None if weights is None else weights.float(),
        EPS,
        cos,
        sin,
        wide.layer_rows[layer],
        index.view(-1),
        torch.zeros(tokens, dtype=torch.int32, device=device),
    )
    marks = torch.zeros(tokens, dtype=torch.int32, device=device)
    found = qkv.qkv_to_pool_kernel(
        product,
        weights,
        EPS,
        cos,
        sin,
        pool.layer_rows[layer],
        index.view(-1),
        marks,
        launch=qkv.QkvLaunch(block_heads=4),
    )
    same(found, expected.to(dtype))
    assert marks.nonzero().view(-1).tolist() == [0]
    finite_max = torch.finfo(dtype).max
    assert pool.data.isfinite().all()
    assert pool.data.min() == -finite_max
    same(pool.data, wide.data.clamp(-finite_max, finite_max).to(dtype))


def filled_pool(layout: KvLayout, pages: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    pool = KvPool(layout, pages, dtype, device).data
    pool.copy_(random(*pool.shape))
    return pool


def page_tables(lengths: list[int], pages: int, size: int, device: torch.device) -> Tensor:
    """Distinct random pages; what no token needs is far out of range, so that reading it shows."""
    order = iter(torch.randperm(pages, generator=torch.Generator().manual_seed(4)).tolist())
    tables = torch.full((len(lengths), max(-(-n // size) for n in lengths) + 1), 1 << 28, dtype=torch.int32)
    for at, length in enumerate(lengths):
        used = -(-length // size)
        tables[at, :used] = torch.tensor([next(order) for _ in range(used)], dtype=torch.int32)
    return tables.to(device)


def safe(tables: Tensor, pages: int) -> Tensor:
    """The same tables for a reference that gathers whole rows of them before it masks."""
    return tables.masked_fill(tables >= pages, 0)


def check_decode(
    dtype: torch.dtype,
    device: torch.device,
    lengths: list[int],
    heads: int,
    layout: KvLayout,
    window: int | None,
    splits: int,
    launch: decode.DecodeLaunch | None = None,
) -> None:
    size, dim, layer = layout.page_size_tokens, layout.head_dim, layout.layers - 1
    pages = sum(-(-n // size) for n in lengths) + 1
    pool = filled_pool(layout, pages, dtype, device)
    tables = page_tables(lengths, pages, size, device)
    queries = random(len(lengths), heads + 2, dim, dtype=dtype, device=device)[:, :heads] * 2
    counts = torch.tensor(lengths, dtype=torch.int32, device=device)
    expected = decode.decode_attention_reference(
        queries, pool, layer, safe(tables, pages), counts, dim**-0.5, window
    )
    found = decode.decode_attention_kernel(
        queries, pool, layer, tables, counts, dim**-0.5, window, splits=splits, launch=launch
    )
    same(found, expected, 0.25)
    again = torch.full_like(found, 5.0)
    decode.decode_attention_kernel(
        queries,
        pool,
        layer,
        tables,
        counts,
        dim**-0.5,
        window,
        out=again,
        splits=splits,
        launch=launch,
    )
    assert torch.equal(again, found)


def check_prefill(
    dtype: torch.dtype,
    device: torch.device,
    chunks: list[tuple[int, int]],
    heads: int,
    layout: KvLayout,
    window: int | None,
    block_rows: int | None,
    block_keys: int | None,
    dispatched: bool = False,
) -> None:
    """`chunks` are (tokens before, tokens asking) of each sequence; one token lies between two chunks.
    `dispatched`: the kernel that the device prefers, rather than the one that every GPU has."""
    size, dim, layer = layout.page_size_tokens, layout.head_dim, layout.layers - 1
    lengths = [before + count for before, count in chunks]
    pages = sum(-(-n // size) for n in lengths) + 1
    pool = filled_pool(layout, pages, dtype, device)
    tables = page_tables(lengths, pages, size, device)
    starts, tokens = [], 0
    for _, count in chunks:
        starts.append(tokens)
        tokens += count + 1
    queries = random(tokens, heads, dim, dtype=dtype, device=device) * 2
    columns = (starts, [count for _, count in chunks], [before for before, _ in chunks])
    first, counts, before = (torch.tensor(column, dtype=torch.int32, device=device) for column in columns)
    expected, found = (torch.full_like(queries, 5.0) for _ in range(2))  # of tokens between: kept
    prefill.prefill_attention_reference(
        queries, pool, layer, first, counts, before, safe(tables, pages), dim**-0.5, window, expected
    )
    arguments = (queries, pool, layer, first, counts, before, tables, max(columns[1]) + 3, dim**-0.5, window)
    if dispatched:
        prefill.prefill_attention(*arguments, out=found)
    else:
        prefill.prefill_attention_kernel(
            *arguments,
            out=found,
            block_rows=block_rows,
            block_keys=block_keys,
        )
    same(found, expected, 0.25)


def random_runs(layout: KvLayout, seed: int, largest: int) -> tuple[list[SlotRun], int, int]:
    """Runs of several sequences, some of them next to each other on one page, with ranges of heads; the pages
    and the slots that they need."""
    rng = Random(seed)
    size = layout.page_size_tokens
    runs: list[SlotRun] = []
    tables: list[list[int]] = []
    for _ in range(rng.randint(1, 4)):
        start, first_head = rng.randrange(2 * size), rng.randrange(layout.kv_heads)
        heads = range(first_head, rng.randint(first_head + 1, layout.kv_heads))
        pages: list[int] = []
        tables.append(pages)
        for _ in range(rng.randint(1, 3)):
            count = rng.choice((1, rng.randint(1, size), largest, rng.randint(1, largest)))
            runs.append(SlotRun(pages, start, count, 0, heads))
            start += count
        pages += range(-(-start // size))
    order = list(range(sum(map(len, tables)) + 2))
    rng.shuffle(order)
    for pages in tables:
        pages[:] = [order.pop() for _ in pages]
    rng.shuffle(runs)
    slots = rng.sample(range(len(runs) + 3), len(runs))
    page_count = sum(map(len, tables)) + 2
    return [run._replace(slot=slot) for run, slot in zip(runs, slots, strict=True)], page_count, len(runs) + 3


def check_segments(
    dtype: torch.dtype, device: torch.device, layout: KvLayout, seed: int, largest: int
) -> None:
    """One launch for all runs; no other byte of slots and pages is touched."""
    runs, pages, slots = random_runs(layout, seed, largest)
    tables = RunTables(layout, pages, dtype.itemsize)
    slot_bytes = max(len(run.heads) * run.token_count for run in runs) * tables.head_bytes + 16
    table = tables.of(runs, slots, slot_bytes)
    sent = torch.frombuffer(table.words, dtype=torch.int32).to(device)
    pool = filled_pool(layout, pages, dtype, device)
    generator = torch.Generator().manual_seed(seed)
    expected = torch.randint(0, 256, (slots * slot_bytes,), dtype=torch.uint8, generator=generator).to(device)
    found = expected.clone()
    before = expected.clone()
    kv_segment.move_runs_reference(pool, expected, slot_bytes, sent, table, unpack=False)
    kv_segment.move_runs_kernel(pool, found, slot_bytes, sent, table, unpack=False)
    assert torch.equal(found, expected) and not torch.equal(found, before)

    numbers = random(slots * slot_bytes // dtype.itemsize, dtype=dtype, device=device, seed=9)
    numbers[::101] = torch.nan
    numbers[1::101] = torch.inf
    numbers[2::101] = -torch.inf
    staging, other, former = numbers.view(torch.uint8), pool.clone(), pool.clone()
    kv_segment.move_runs_reference(pool, staging, slot_bytes, sent, table, unpack=True)
    kv_segment.move_runs_kernel(other, staging, slot_bytes, sent, table, unpack=True)
    assert torch.equal(other, pool) and not torch.equal(pool, former)


def check_checksum(device: torch.device, words: int) -> None:
    """Sums of blocks, the last of which may be short, with bits in every place; of slots of all lengths."""
    counts, slot_words = [words, 1, -(-words // 2)], words + 2
    fields = [(2 - at, count, *[0] * (RUN_FIELDS - 2)) for at, count in enumerate(counts)]
    table = RunTable(array("i", chain.from_iterable(fields)), [8 * count for count in counts], 1, 1)
    data = torch.randint(
        -(2**63), 2**63 - 1, (3 * slot_words,), generator=torch.Generator().manual_seed(words)
    )
    sent = torch.frombuffer(table.words, dtype=torch.int32).to(device)
    found = checksum.slot_sums_kernel(data.to(device), slot_words, sent, table).cpu().sum(dim=2, keepdim=True)
    assert torch.equal(found, checksum.slot_sums_reference(data.view(torch.uint8), 8 * slot_words, table))
    for at, count in enumerate(counts):
        first = (2 - at) * slot_words
        whole = count - count % checksum.BLOCK_WORDS
        parts = data[first : first + whole], data[first + whole : first + count]
        expected = torch.cat([checksum.block_sums_reference(part) for part in parts if len(part)])
        assert torch.equal(found[at, : len(expected)], expected)
        assert not found[at, len(expected) :].any()


@interpreted
@pytest.mark.parametrize("words", [1, checksum.PART_WORDS, 5000, checksum.BLOCK_WORDS + 3])
def test_checksums(words: int) -> None:
    check_checksum(CPU, words)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(dtype: torch.dtype) -> None:
    check_norms(dtype, CPU, tokens=5, size=48)
    check_head_norm(dtype, CPU, tokens=3, heads=5, head_dim=24)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu(dtype: torch.dtype) -> None:
    check_swiglu(dtype, CPU, tokens=3, size=1100)


@interpreted
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_qkv(dtype: torch.dtype, norm: bool) -> None:
    layout = KvLayout(layers=2, kv_heads=2, page_size_tokens=4, head_dim=24)
    check_qkv(dtype, CPU, tokens=7, heads=6, layout=layout, norm=norm)


@interpreted
@pytest.mark.parametrize("splits", [1, 3, 4])
@pytest.mark.parametrize("window", [None, 1, 21])
def test_decode(window: int | None, splits: int) -> None:
    layout = KvLayout(layers=2, kv_heads=2, page_size_tokens=4, head_dim=24)
    check_decode(torch.float32, CPU, [37, 0, 1, 64, 17], 6, layout, window, splits)


@interpreted
def test_decode_in_float16_with_pages_larger_than_a_block() -> None:
    layout = KvLayout(layers=1, kv_heads=1, page_size_tokens=32, head_dim=32)
    check_decode(torch.float16, CPU, [70, 33], 4, layout, None, 2, SMALL_TILE)


@interpreted
@pytest.mark.parametrize("window", [None, 1, 19])
@pytest.mark.parametrize("heads", [4, 6])
def test_prefill(heads: int, window: int | None) -> None:
    layout = KvLayout(layers=2, kv_heads=2, page_size_tokens=4, head_dim=24)
    check_prefill(torch.float32, CPU, [(0, 37), (50, 3), (13, 18), (7, 1)], heads, layout, window, 16, 16)


@interpreted
def test_prefill_in_float16_with_pages_larger_than_a_block() -> None:
    layout = KvLayout(layers=1, kv_heads=1, page_size_tokens=32, head_dim=32)
    check_prefill(torch.float16, CPU, [(0, 33), (40, 20)], 4, layout, None, 32, 16)


@interpreted
@pytest.mark.parametrize("seed", range(10))
def test_segments(seed: int) -> None:
    dtype = (torch.float32, torch.bfloat16)[seed % 2]
    layout = KvLayout(layers=2, kv_heads=3, page_size_tokens=(4, 1, 16)[seed % 3], head_dim=24)
    check_segments(dtype, CPU, layout, seed, largest=9)


@interpreted
def test_a_run_longer_than_a_program_copies() -> None:
    layout = KvLayout(layers=1, kv_heads=1, page_size_tokens=16, head_dim=64)
    check_segments(torch.float32, CPU, layout, 3, largest=150)


@pytest.mark.parametrize(
    ("batch", "context_tokens", "expected"), [(1, 16384, 32), (1, 256, 4), (64, 1024, 1), (8, 1024, 8)]
)
def test_splits_fill_the_processors(batch: int, context_tokens: int, expected: int) -> None:
    assert decode.decode_splits(batch, 8, context_tokens, 132) == expected
