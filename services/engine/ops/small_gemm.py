"""Products of a decode step's few rows with a weight matrix, `x @ weight.T` as `F.linear` has it.

At up to some hundred tokens such a product costs what reading the weights costs. The library's kernels reach
that with large matrices only: a kernel of 10 us spends a good part of them on starting, filling its pipeline
and draining it. The kernels here (small_gemm_kernels.py) start under the one before them. Which one a shape
gets, and with what tiles, was measured (tuning.py); "library" is one of the answers.

CUDA tensors in bfloat16 or float16 go to the kernels, others and larger ones to the reference.
"""

from functools import lru_cache

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.ops import tuning
from services.engine.ops.launch_cache import next_power_of_2
from services.engine.ops.processors import processors
from services.engine.ops.small_gemm_kernels import row_product, tile_product
from services.engine.ops.swiglu import silu_mul

MAX_TOKENS = 256


class LibraryProduct(msgspec.Struct, frozen=True, tag="library", tag_field="kernel"):
    """torch's own product, and `silu_mul` after it where one is asked for."""


class RowProduct(msgspec.Struct, frozen=True, tag="row", tag_field="kernel"):
    """`row_product`, for one token."""

    block_rows: int
    block_inner: int
    num_warps: int
    programs_per_processor: int
    """Programs that each multiprocessor gets at most; with more blocks than that, they go on with others."""


class TileProduct(msgspec.Struct, frozen=True, tag="tile", tag_field="kernel"):
    """`tile_product`. `block_tokens` is the most; fewer tokens take a tile of their own power of two."""

    block_tokens: int
    block_rows: int
    block_inner: int
    splits: int
    num_warps: int
    num_stages: int
    descriptors: bool
    prefetch_bytes: int


ProductConfig = LibraryProduct | RowProduct | TileProduct
LIBRARY = LibraryProduct()


def small_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """`[tokens, inner]` by `weight` `[rows, inner]` to `[tokens, rows]`; sums in float32, one rounding.
    `out`, dense and of x's dtype, is where the result goes, if given."""
    return multiply(x, weight, bias, _chosen("linear", x, weight), gated=False, out=out)


def small_gate_up(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`silu(x @ gate.T) * (x @ up.T)`, `[tokens, size]`, for `weight` `[2 * size, inner]`, gate first."""
    return multiply(x, weight, bias, _chosen("gate_up", x, weight), gated=True)


def small_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """`small_linear` by torch."""
    if out is None:
        return F.linear(x, weight, bias)
    product = torch.mm(x, weight.t(), out=out)
    return product if bias is None else product.add_(bias)


def small_gate_up_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`small_gate_up` by torch; gate and up are rounded to the dtype before they meet."""
    return silu_mul(F.linear(x, weight, bias))


def multiply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    config: ProductConfig,
    *,
    gated: bool,
    out: Tensor | None = None,
) -> Tensor:
    """The product by the kernel that `config` names, on any device that it runs on.

    Raises ValueError on what the kernel cannot take: shapes that do not fit each other, rows that are not
    dense, more than one token for `RowProduct`.
    """
    if isinstance(config, LibraryProduct):
        if gated:
            return small_gate_up_reference(x, weight, bias)
        return small_linear_reference(x, weight, bias, out)
    tokens, inner = x.shape
    if weight.shape[1] != inner or x.stride(1) != 1 or not weight.is_contiguous() or inner % 8:
        raise ValueError(f"x {tuple(x.shape)} does not go with a weight {tuple(weight.shape)}")
    if gated and weight.shape[0] % 2:
        raise ValueError(f"gate and up must have as many rows each, have {weight.shape[0]} together")
    if isinstance(config, RowProduct):
        if tokens != 1:
            raise ValueError(f"a row product is for one token, not {tokens}")
        return row_product(
            x,
            weight,
            bias,
            gated=gated,
            block_rows=config.block_rows,
            block_inner=min(config.block_inner, next_power_of_2(inner)),
            num_warps=config.num_warps,
            programs=config.programs_per_processor * processors(x.device),
            out=out,
        )
    return tile_product(
        x,
        weight,
        bias,
        gated=gated,
        block_tokens=min(config.block_tokens, max(least_tokens(config.block_rows), next_power_of_2(tokens))),
        block_rows=config.block_rows,
        block_inner=config.block_inner,
        splits=config.splits,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        descriptors=config.descriptors,
        prefetch_bytes=config.prefetch_bytes,
        out=out,
    )


def least_tokens(block_rows: int) -> int:
    """The narrowest tile: wgmma is used from 64 rows on and, by Triton, from 16 columns on."""
    return 16 if block_rows >= 64 else 8


def default_config(tokens: int, rows: int, inner: int, gated: bool, processor_count: int) -> ProductConfig:
    """What a shape gets that no table knows: enough programs to fill the processors twice, tiles that fit."""
    if tokens == 1:
        return RowProduct(2 if gated else 4, 2048, 4, 1 << 16)
    if tokens > 128:
        return LIBRARY
    block_rows = 64
    blocks = -(-(rows // 2 if gated else rows) // block_rows)
    splits = 1
    while blocks * splits < 2 * processor_count and inner // splits >= 2048:
        splits *= 2
    return TileProduct(
        block_tokens=128,
        block_rows=block_rows,
        block_inner=64 if tokens > 64 else 128,
        splits=splits,
        num_warps=4,
        num_stages=4 if tokens <= 32 and not gated else 3,
        descriptors=False,
        prefetch_bytes=2048,
    )


def tuned_shape(tokens: int, weight: Tensor) -> tuple[int, int, int]:
    """The shape by which a table knows a product."""
    return tokens, weight.shape[0], weight.shape[1]


def _chosen(kernel: str, x: Tensor, weight: Tensor) -> ProductConfig:
    tokens = x.shape[0]
    suits = x.is_cuda and 0 < tokens <= MAX_TOKENS and x.dtype in (torch.bfloat16, torch.float16)
    if not suits or x.dtype != weight.dtype or weight.shape[1] % 16 or not weight.is_contiguous():
        return LIBRARY
    return _config(kernel, tuned_shape(tokens, weight), x.device)


@lru_cache(maxsize=4096)
def _config(kernel: str, shape: tuple[int, int, int], device: torch.device) -> ProductConfig:
    found = tuning.lookup(kernel, shape, torch.cuda.get_device_name(device))
    if found is None:
        return default_config(*shape, kernel == "gate_up", processors(device))
    config: ProductConfig = msgspec.convert(found, ProductConfig)
    if isinstance(config, RowProduct) and shape[0] > 1:  # the nearest is a single token's
        return default_config(*shape, kernel == "gate_up", processors(device))
    return config
