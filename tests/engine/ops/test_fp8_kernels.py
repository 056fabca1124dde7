"""The kernels that read and write fp8, on a CPU in Triton's interpreter, against plain numbers.

tests/gpu/test_fp8.py runs the checks compiled. The interpreter reads fp8 rightly, but loses the carry when
rounding reaches the next power of two: what it is to write is therefore chosen such that nothing is rounded,
and rounding is checked compiled.
"""

import pytest
import torch
from torch import Tensor

from services.engine.attention import decode_attention as decode
from services.engine.attention import prefill_attention as prefill
from services.engine.kv import pack_kernels as kv_segment
from services.engine.kv.layout import KvLayout
from services.engine.kv.pool import KvPool
from services.engine.kv.run_table import RunTables
from services.engine.models.rope import rotation
from services.engine.ops import fp8, qkv
from tests.engine.interpreter import interpreted
from tests.engine.ops.test_kernels import (
    CPU,
    EPS,
    filled_pool,
    page_tables,
    random,
    random_runs,
    safe,
    same,
)

LARGEST = 448.0


def every_number() -> Tensor:
    """The 254 finite numbers of e4m3, from their bits: a sign, 4 of exponent, 3 of mantissa."""
    numbers = []
    for bits in range(256):
        exponent, mantissa = bits >> 3 & 15, bits & 7
        if exponent == 15 and mantissa == 7:
            continue
        size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        numbers.append(-size if bits >> 7 else size)
    return torch.tensor(numbers)


def nearest(values: Tensor) -> Tensor:
    """The nearest number of e4m3, by search; of two as near, the one whose last bit is 0."""
    numbers = every_number().to(values.device).unique()
    distance = (values[..., None].double() - numbers.double()).abs()
    even = (numbers.to(torch.float8_e4m3fn).view(torch.uint8) & 1).double()
    return numbers[(distance + even * 1e-12).argmin(dim=-1)]


def scales_of(layers: int, kv_heads: int, device: torch.device) -> Tensor:
    """Powers of two, a different one for every layer, kind and head."""
    exponents = torch.arange(layers * 2 * kv_heads, dtype=torch.float32).view(layers, 2, kv_heads)
    return torch.exp2(exponents % 7 - 4).to(device)


def fp8_pool(layout: KvLayout, pages: int, device: torch.device) -> tuple[KvPool, Tensor]:
    """A filled pool, and what its numbers mean, float32."""
    scales = scales_of(layout.layers, layout.kv_heads, device)
    wide = filled_pool(layout, pages, torch.float32, device)
    pool = KvPool(layout, pages, fp8.FP8, device, scales)
    pool.data.copy_(wide / scales[None, :, :, :, None, None])
    return pool, pool.data.float() * scales[None, :, :, :, None, None]


# ---------------------------------------------------------------- the format


def test_rounding_is_to_the_nearest_and_saturates() -> None:
    values = torch.cat((random(2000) * 100, random(1999) * 0.01, every_number(), torch.tensor([447.9, 1e-9])))
    values = values.clamp(-LARGEST, LARGEST)
    found = fp8.to_fp8(values, torch.tensor(1.0)).float()
    assert torch.equal(found, nearest(values))
    beyond = torch.tensor([449.0, 1e30, torch.inf, -464.0, -torch.inf, torch.nan])
    assert fp8.to_fp8(beyond, torch.tensor(1.0)).tolist() == [LARGEST] * 3 + [-LARGEST] * 2 + [0.0]
    assert fp8.to_fp8(torch.tensor([896.0, 3.0]), torch.tensor([2.0, 0.5])).tolist() == [448.0, 6.0]


def test_rows_are_quantised_to_their_own_largest_number() -> None:
    x = random(5, 70, dtype=torch.bfloat16) * torch.tensor([1e-3, 1.0, 50.0, 0.0, 1e4])[:, None]
    x = x.to(torch.bfloat16)
    quantised, scale = fp8.quantise_rows(x)
    assert (quantised.dtype, scale.dtype, tuple(scale.shape)) == (fp8.FP8, torch.float32, (5, 1))
    largest = x.float().abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(scale[[0, 1, 2, 4]], (largest / LARGEST)[[0, 1, 2, 4]], rtol=1e-6, atol=0)
    assert torch.equal(quantised.float(), nearest(x.float() / scale))
    error = (quantised.float() * scale - x.float()).abs()
    assert bool((error <= largest / 28 * 1.001).all())  # the largest two numbers are 32 apart, of 448
    assert quantised[3].float().count_nonzero() == 0


# ---------------------------------------------------------------- checks, for both devices


def check_quantise(device: torch.device, rows: int, size: int) -> None:
    """Numbers that need no rounding: each row's largest is 448 times a power of two."""
    numbers = every_number()
    place = torch.randint(0, 254, (rows, size), generator=torch.Generator().manual_seed(size))
    exact = numbers[place]
    exact[:, size // 2] = LARGEST
    factor = torch.exp2(torch.arange(rows) % 9 - 4.0)[:, None]
    for dtype in (torch.float32, torch.bfloat16):
        wide = torch.zeros(rows, size + 8, dtype=dtype)
        wide[:, :size] = exact * factor
        quantised, scale = fp8.quantise_rows_kernel(wide.to(device)[:, :size])
        assert torch.equal(scale.cpu(), factor)
        assert torch.equal(quantised.float().cpu(), exact)
    hostile = torch.ones(4, size, device=device)
    hostile[0, 0], hostile[1, size - 1], hostile[2, size // 2] = torch.nan, torch.inf, -torch.inf
    for quantise in (fp8.quantise_rows_kernel, fp8.quantise_rows_reference):
        assert quantise(hostile)[1].isnan().view(-1).tolist() == [True, True, True, False]
    zeros, scale = fp8.quantise_rows_kernel(torch.zeros(2, size, device=device))
    assert zeros.float().count_nonzero() == 0
    assert bool((scale > 0).all())


def check_write(device: torch.device, tokens: int, heads: int, layout: KvLayout) -> None:
    """Position 0 rotates by nothing, so that keys arrive exactly; sizes beyond the scale must saturate."""
    kv_heads, size, dim = layout.kv_heads, layout.page_size_tokens, layout.head_dim
    layer, pages = layout.layers - 1, -(-tokens // size) + 1
    scales = scales_of(layout.layers, kv_heads, device)
    numbers = every_number().to(device)
    place = torch.randint(0, 254, (tokens, 2 * kv_heads, dim), generator=torch.Generator().manual_seed(3))
    wanted = numbers[place.to(device)]
    product = random(tokens, heads + 2 * kv_heads, dim, device=device)
    product[:, heads:] = wanted * scales[layer].view(1, -1, 1)
    product[0, heads, :2] = torch.tensor([torch.inf, 1e30])
    product[1, heads + kv_heads, :3] = torch.tensor([torch.nan, -torch.inf, -1e6])
    wanted[0, 0, :2] = LARGEST
    wanted[1, kv_heads, :3] = torch.tensor([0.0, -LARGEST, -LARGEST])
    cos, sin = rotation(torch.zeros(tokens, device=device), torch.ones(dim // 2, device=device), 1.0)
    token = torch.arange(tokens, device=device)
    row = (token // size) * (layout.layers * 2 * kv_heads * size) + token % size
    index = row[:, None] + torch.arange(2 * kv_heads, device=device) * size
    index[-1] = -1  # a place of the launch that no token uses
    for write in (qkv.qkv_to_pool_kernel, qkv.qkv_to_pool_reference):
        pool = KvPool(layout, pages, fp8.FP8, device, scales)
        place_of = (pool.layer_rows[layer], index.view(-1))
        marks = torch.zeros(tokens, dtype=torch.int32, device=device)
        write(product, None, EPS, cos, sin, *place_of, marks, pool.layer_scales(layer))
        assert marks.nonzero().view(-1).tolist() == [0, 1]  # what only saturates is sound
        rows = pool.layer_rows[layer].float()[index[:-1]]
        infinite = ~product[:-1, heads : heads + kv_heads].isfinite().all(dim=2)
        keep = torch.cat((~infinite, torch.ones_like(infinite)), dim=1)  # inf * sin of 0 is NaN beside it
        assert torch.equal(rows[keep], wanted[:-1][keep])
        stored = pool.data.view(torch.uint8) & fp8.FP8_NAN
        assert not bool((stored == fp8.FP8_NAN).any())
        others = [at for at in range(layout.layers) if at != layer]
        assert pool.data[:, others].float().count_nonzero() == 0


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
    layer, dim, size = layout.layers - 1, layout.head_dim, layout.page_size_tokens
    pages = sum(-(-n // size) for n in lengths) + 1
    pool, meant = fp8_pool(layout, pages, device)
    tables = page_tables(lengths, pages, size, device)
    queries = random(len(lengths), heads, dim, dtype=dtype, device=device) * 2
    counts = torch.tensor(lengths, dtype=torch.int32, device=device)
    expected = decode.decode_attention_reference(
        queries.float(), meant, layer, safe(tables, pages), counts, dim**-0.5, window
    ).to(dtype)
    scales = pool.layer_scales(layer)
    found = decode.decode_attention_kernel(
        queries,
        pool.data,
        layer,
        tables,
        counts,
        dim**-0.5,
        window,
        scales,
        splits=splits,
        launch=launch,
    )
    same(found, expected, 0.25)
    plain = decode.decode_attention_reference(
        queries, pool.data, layer, safe(tables, pages), counts, dim**-0.5, window, None, scales
    )
    same(plain, expected, 0.25)


def check_prefill(
    dtype: torch.dtype,
    device: torch.device,
    chunks: list[tuple[int, int]],
    heads: int,
    layout: KvLayout,
    window: int | None,
    block_rows: int | None = None,
    block_keys: int | None = None,
) -> None:
    """`chunks` are (tokens before, tokens asking) of each sequence."""
    layer, dim, size = layout.layers - 1, layout.head_dim, layout.page_size_tokens
    lengths = [before + count for before, count in chunks]
    pages = sum(-(-n // size) for n in lengths) + 1
    pool, meant = fp8_pool(layout, pages, device)
    tables = page_tables(lengths, pages, size, device)
    counts = [count for _, count in chunks]
    starts = [sum(counts[:at]) for at in range(len(counts))]
    columns = (starts, counts, [before for before, _ in chunks])
    first, count, before = (torch.tensor(column, dtype=torch.int32, device=device) for column in columns)
    queries = random(sum(counts), heads, dim, dtype=dtype, device=device) * 2
    scales = pool.layer_scales(layer)
    expected = prefill.prefill_attention_reference(
        queries.float(), meant, layer, first, count, before, safe(tables, pages), dim**-0.5, window
    ).to(dtype)
    found = prefill.prefill_attention_kernel(
        queries,
        pool.data,
        layer,
        first,
        count,
        before,
        tables,
        max(counts),
        dim**-0.5,
        window,
        scales,
        block_rows=block_rows,
        block_keys=block_keys,
    )
    same(found, expected, 0.25)
    plain = prefill.prefill_attention_reference(
        queries, pool.data, layer, first, count, before, safe(tables, pages), dim**-0.5, window, None, scales
    )
    same(plain, expected, 0.25)


def check_segments(device: torch.device, layout: KvLayout, seed: int, largest: int) -> None:
    runs, pages, slots = random_runs(layout, seed, largest)
    tables = RunTables(layout, pages, 1)
    slot_bytes = max(len(run.heads) * run.token_count for run in runs) * tables.head_bytes + 16
    table = tables.of(runs, slots, slot_bytes)
    sent = torch.frombuffer(table.words, dtype=torch.int32).to(device)
    pool, _ = fp8_pool(layout, pages, device)
    expected, found = (torch.zeros(slots * slot_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    kv_segment.move_runs_reference(pool.data, expected, slot_bytes, sent, table, unpack=False)
    kv_segment.move_runs_kernel(pool.data, found, slot_bytes, sent, table, unpack=False)
    assert torch.equal(found, expected) and bool(found.any())

    incoming = torch.arange(found.numel(), device=device).to(torch.uint8)
    other = pool.data.clone()
    kv_segment.move_runs_reference(pool.data, incoming, slot_bytes, sent, table, unpack=True)
    kv_segment.move_runs_kernel(other, incoming, slot_bytes, sent, table, unpack=True)
    assert torch.equal(other.view(torch.uint8), pool.data.view(torch.uint8))
    assert bool(other.float().isfinite().all())
    found.copy_(incoming)
    kv_segment.move_runs_reference(other, found, slot_bytes, sent, table, unpack=False)
    sent_numbers, kept = incoming.view(fp8.FP8).float(), found.view(fp8.FP8).float()
    for run, byte_count in zip(runs, table.byte_counts, strict=True):
        part = slice(run.slot * slot_bytes, run.slot * slot_bytes + byte_count)
        numbers = sent_numbers[part]
        assert torch.equal(kept[part], torch.where(numbers.isfinite(), numbers, 0.0))


# ---------------------------------------------------------------- interpreted


@interpreted
def test_quantise() -> None:
    check_quantise(CPU, rows=5, size=70)


@interpreted
def test_write() -> None:
    check_write(CPU, 7, 6, KvLayout(layers=2, kv_heads=2, page_size_tokens=4, head_dim=24))


@interpreted
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("window", [None, 21])
def test_decode(window: int | None, splits: int) -> None:
    layout = KvLayout(layers=2, kv_heads=2, page_size_tokens=4, head_dim=24)
    check_decode(torch.float32, CPU, [37, 0, 1, 64, 17], 6, layout, window, splits)


@interpreted
@pytest.mark.parametrize("window", [None, 19])
def test_prefill(window: int | None) -> None:
    layout = KvLayout(layers=2, kv_heads=2, page_size_tokens=4, head_dim=24)
    check_prefill(torch.float32, CPU, [(0, 37), (50, 3), (13, 18), (7, 1)], 4, layout, window, 16, 16)


@interpreted
@pytest.mark.parametrize("seed", range(3))
def test_segments(seed: int) -> None:
    layout = KvLayout(layers=2, kv_heads=3, page_size_tokens=4, head_dim=24)
    check_segments(CPU, layout, seed, largest=12)


@interpreted
def test_a_pool_of_another_dtype_is_refused() -> None:
    layout = KvLayout(layers=1, kv_heads=2, page_size_tokens=4, head_dim=16)
    pool, _ = fp8_pool(layout, 2, CPU)
    one = torch.ones(1, dtype=torch.int32)
    queries, tables = random(1, 4, 16), torch.zeros((1, 1), dtype=torch.int32)
    with pytest.raises(ValueError, match=r"do not go with a pool of torch\.float8_e4m3fn without"):
        decode.decode_attention_kernel(queries, pool.data, 0, tables, one, 1.0)
    with pytest.raises(ValueError, match=r"do not go with a pool of torch\.float32 and its scales"):
        scales, wide = pool.layer_scales(0), pool.data.float()
        decode.decode_attention_kernel(queries, wide, 0, tables, one, 1.0, None, scales)
