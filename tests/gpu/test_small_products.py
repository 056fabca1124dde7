"""The small-batch products compiled, at a model's shapes, and in chains of dependent launches."""

import pytest
import torch
from torch import Tensor

from services.engine.ops.dependent_launch import ordinary_launches
from services.engine.ops.rms_norm import add_rms_norm_kernel
from services.engine.ops.small_gemm import (
    ProductConfig,
    RowProduct,
    TileProduct,
    multiply,
    small_gate_up,
    small_linear,
)
from tests.engine.ops import test_small_gemm as products
from tests.engine.ops.test_kernels import random

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
CUDA = torch.device("cuda")
BF16 = torch.bfloat16
ROWS = RowProduct(block_rows=4, block_inner=2048, num_warps=4, programs_per_processor=1 << 16)
TILES = TileProduct(
    block_tokens=64,
    block_rows=64,
    block_inner=128,
    splits=1,
    num_warps=4,
    num_stages=3,
    descriptors=True,
    prefetch_bytes=2048,
)


@pytest.mark.parametrize(("gated", "bias"), [(False, False), (True, True), (False, True)])
@pytest.mark.parametrize(("rows", "inner"), [(4096, 12288), (6146, 4096), (130, 904)])
@pytest.mark.parametrize("programs", [1, 1 << 16])
def test_one_token(rows: int, inner: int, programs: int, gated: bool, bias: bool) -> None:
    config = products.changed(ROWS, programs_per_processor=programs)
    products.check_product(BF16, CUDA, (1, rows, inner), config, gated=gated, bias=bias)


@pytest.mark.parametrize(("gated", "bias"), [(False, False), (True, True), (False, True)])
@pytest.mark.parametrize(("rows", "inner"), [(4096, 12288), (6146, 4096), (130, 904)])
@pytest.mark.parametrize("tokens", [1, 3, 16, 64, 77, 256])
@pytest.mark.parametrize(
    "config",
    [
        TILES,
        products.changed(TILES, splits=4),
        products.changed(TILES, descriptors=False, prefetch_bytes=1 << 20),
        products.changed(TILES, block_rows=16, num_warps=1, descriptors=False),
    ],
)
def test_tiles(config: ProductConfig, tokens: int, rows: int, inner: int, gated: bool, bias: bool) -> None:
    products.check_product(BF16, CUDA, (tokens, rows, inner), config, gated=gated, bias=bias)


@pytest.mark.parametrize("tokens", [1, 2, 9, 64, 129, 256, 300])
def test_what_is_chosen_is_right(tokens: int) -> None:
    for rows, inner in ((6144, 4096), (4096, 12288), (1536, 896)):
        x, weight, bias = products.operands(BF16, CUDA, tokens, rows, inner, True)
        for found, gated in (
            (small_linear(x, weight, bias), False),
            (small_gate_up(x, weight, bias), True),
        ):
            expected = products.expected_product(x, weight, bias, gated)
            torch.testing.assert_close(found.float(), expected, atol=3e-2, rtol=1.6e-2)


@pytest.mark.parametrize(
    ("tokens", "config"), [(1, ROWS), (5, TILES), (64, products.changed(TILES, splits=4))]
)
def test_a_chain_of_dependent_launches_gives_what_ordinary_ones_give(
    tokens: int, config: ProductConfig
) -> None:
    """Every kernel of it needs the one before; a wait that is missing changes some of the results."""
    up = [random(8192, 2048, dtype=BF16, device=CUDA, seed=layer) * 2048**-0.5 for layer in range(8)]
    down = [random(2048, 4096, dtype=BF16, device=CUDA, seed=layer) * 4096**-0.5 for layer in range(8)]
    norm = random(2048, dtype=BF16, device=CUDA)
    start = random(tokens, 2048, dtype=BF16, device=CUDA)
    torch.cuda.synchronize()

    def chain() -> Tensor:
        x, residual = torch.zeros_like(start), start.clone()
        for layer in range(8):
            x, residual = add_rms_norm_kernel(x, residual, norm, 1e-6)
            x = multiply(x, up[layer], None, config, gated=True)
            x = multiply(x, down[layer], None, config, gated=False)
        return x

    with ordinary_launches():
        expected = chain()
    assert torch.equal(chain(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain()
    for _ in range(20):
        graph.replay()
        assert torch.equal(found, expected)
