"""The small-batch products against float32 products of torch, on a CPU in Triton's interpreter.

The checks serve the tests on a GPU too. The interpreter cannot multiply matrices of bfloat16, so tiles are
tried in float32 and float16.
"""

import msgspec
import pytest
import torch
from torch import Tensor

from services.engine.ops import tuning
from services.engine.ops.small_gemm import (
    LIBRARY,
    ProductConfig,
    RowProduct,
    TileProduct,
    default_config,
    multiply,
    small_gate_up,
    small_linear,
)
from tests.engine.interpreter import interpreted
from tests.engine.ops.test_kernels import CPU, TOLERANCE, random

ROWS = RowProduct(block_rows=8, block_inner=64, num_warps=4, programs_per_processor=1 << 16)
TILES = TileProduct(
    block_tokens=16,
    block_rows=16,
    block_inner=32,
    splits=1,
    num_warps=4,
    num_stages=2,
    descriptors=False,
    prefetch_bytes=0,
)


def operands(
    dtype: torch.dtype, device: torch.device, tokens: int, rows: int, inner: int, bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Results have about the size 1. x is a slice of wider rows, as an attention's output may be."""
    x = random(tokens, inner + 16, dtype=dtype, device=device)[:, :inner]
    weight = (random(rows, inner, device=device) * inner**-0.5).to(dtype)
    offset = random(rows, dtype=dtype, device=device) if bias else None
    if device.type == "cuda":
        torch.cuda.synchronize()  # weights may be read before the kernel that precedes the product has ended
    return x, weight, offset


def expected_product(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool) -> Tensor:
    product = x.float() @ weight.float().T
    if bias is not None:
        product += bias.float()
    if not gated:
        return product
    gate, up = product.chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


def check_product(
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, int, int],
    config: ProductConfig,
    *,
    gated: bool,
    bias: bool,
) -> None:
    """`shape` is (tokens, rows, inner). One rounding of the dtype is allowed, and sums in another order."""
    x, weight, offset = operands(dtype, device, *shape, bias)
    expected = expected_product(x, weight, offset, gated)
    found = multiply(x, weight, offset, config, gated=gated)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    tolerance = TOLERANCE[dtype] / 2
    torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)
    if device.type == "cuda":  # in whatever order its programs run
        assert torch.equal(found, multiply(x, weight, offset, config, gated=gated))


def changed(config: RowProduct | TileProduct, **values: int | bool) -> RowProduct | TileProduct:
    names = config.__struct_fields__
    return type(config)(**{**{name: getattr(config, name) for name in names}, **values})


@interpreted
@pytest.mark.parametrize(("gated", "bias"), [(False, False), (True, True), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token(dtype: torch.dtype, gated: bool, bias: bool) -> None:
    check_product(dtype, CPU, (1, 22, 136), ROWS, gated=gated, bias=bias)


@interpreted
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("programs", [1, 3])
def test_one_token_with_programs_that_go_on(programs: int, gated: bool) -> None:
    config = changed(ROWS, programs_per_processor=programs)
    check_product(torch.float32, CPU, (1, 70, 64), config, gated=gated, bias=True)
    check_product(torch.float32, CPU, (1, 70, 104), config, gated=gated, bias=True)


@interpreted
@pytest.mark.parametrize(("gated", "bias"), [(False, False), (True, True)])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("tokens", [1, 21])
def test_tiles(tokens: int, splits: int, gated: bool, bias: bool) -> None:
    config = changed(TILES, splits=splits)
    check_product(torch.float32, CPU, (tokens, 38, 88), config, gated=gated, bias=bias)


@interpreted
def test_tiles_of_many_tokens_in_float16() -> None:
    config = changed(TILES, block_tokens=64, block_rows=64, splits=2)
    check_product(torch.float16, CPU, (70, 72, 128), config, gated=False, bias=True)


@interpreted
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("gated", [False, True])
def test_tiles_by_descriptors(gated: bool, splits: int) -> None:
    config = changed(TILES, splits=splits, descriptors=True)
    check_product(torch.float16, CPU, (19, 38, 104), config, gated=gated, bias=True)


@interpreted
def test_more_splits_than_steps() -> None:
    check_product(torch.float32, CPU, (3, 16, 64), changed(TILES, splits=5), gated=False, bias=False)


@pytest.mark.parametrize(
    ("tokens", "rows", "inner", "gated", "config"),
    [(2, 8, 64, False, ROWS), (2, 7, 64, True, TILES), (2, 8, 60, False, TILES), (2, 8, 72, False, TILES)],
)
def test_what_does_not_fit_is_refused(
    tokens: int, rows: int, inner: int, gated: bool, config: ProductConfig
) -> None:
    weight = torch.zeros(rows, 64 if inner == 72 else inner)
    with pytest.raises(ValueError, match=r"token|rows|go with"):
        multiply(torch.zeros(tokens, inner), weight, None, config, gated=gated)


@pytest.mark.parametrize("bias", [False, True])
def test_on_a_cpu_the_library_multiplies(bias: bool) -> None:
    x, weight, offset = operands(torch.float32, CPU, 3, 16, 24, bias)
    torch.testing.assert_close(small_linear(x, weight, offset), expected_product(x, weight, offset, False))
    torch.testing.assert_close(small_gate_up(x, weight, offset), expected_product(x, weight, offset, True))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [1, 8, 64, 128, 256])
def test_a_shape_without_a_table_gets_enough_programs(tokens: int, gated: bool) -> None:
    config = default_config(tokens, 4096, 12288, gated, processor_count=132)
    match config:
        case RowProduct():
            assert tokens == 1
        case TileProduct():
            blocks = (2048 if gated else 4096) // config.block_rows
            assert blocks * config.splits >= 132
            row_bytes = 2 * config.block_inner
            tile_rows = config.block_rows * (2 if gated else 1) + min(config.block_tokens, tokens)
            assert config.num_stages * tile_rows * row_bytes <= 227 * 1024
        case _:
            assert tokens == 256
            assert config == LIBRARY


def test_every_entry_of_a_shipped_table_is_a_configuration() -> None:
    for path in tuning.SHIPPED.glob("*.json"):
        table = tuning.read_table(path)
        assert {"linear", "gate_up"} <= table.keys()
        for kernel in ("linear", "gate_up"):
            for shape, config in table[kernel].items():
                chosen = msgspec.convert(config, ProductConfig)
                assert shape[0] == 1 or not isinstance(chosen, RowProduct)
