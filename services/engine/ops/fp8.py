"""Numbers of eight bits: e4m3 (Micikevicius et al., FP8 Formats for Deep Learning, 2022), saturating.

The format has 3 bits of mantissa and reaches from 2**-9 to 448; it knows NaN but no infinity, and nothing
here makes a NaN of a finite or infinite number. A number is stored divided by a scale, which lies beside it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.launch_cache import cached_kernel, next_power_of_2

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
FP8_NAN = 0x7F
"""The bits below the sign of the only NaN."""
_LEAST_AMAX = 1e-30
"""A row of zeros gets a scale all the same."""


def as_bytes(stored: Tensor) -> Tensor:
    """The same memory as uint8 if it is of fp8, which torch cannot scatter on a CPU; else unchanged."""
    return stored.view(torch.uint8) if stored.dtype == FP8 else stored


def to_fp8(values: Tensor, scale: Tensor) -> Tensor:
    """`values / scale`, saturated to ±448; NaN becomes 0. `scale` is float32 and broadcasts."""
    scaled = (values.float() / scale).nan_to_num_(0.0, FP8_MAX, -FP8_MAX)
    return scaled.clamp_(-FP8_MAX, FP8_MAX).to(FP8)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of `x` `[rows, size]` with a scale of its own, which puts its largest number at 448.

    Returns fp8 `[rows, size]` and the scales, float32 `[rows, 1]`; that of a row which is not all finite is
    NaN, so that what is made of the row is too. CUDA tensors go to the kernel.
    """
    return quantise_rows_kernel(x) if x.is_cuda else quantise_rows_reference(x)


def quantise_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantise_rows` by torch operations."""
    largest = x.abs().amax(dim=-1, keepdim=True).float()
    scale = largest.clamp(min=_LEAST_AMAX).masked_fill(~largest.isfinite(), torch.nan) / FP8_MAX
    return to_fp8(x, scale), scale


def quantise_rows_kernel(x: Tensor, num_warps: int | None = None) -> tuple[Tensor, Tensor]:
    """`quantise_rows` in one launch, one program a row. Raises ValueError unless rows are dense."""
    if x.dim() != 2 or x.stride(1) != 1:
        raise ValueError(f"x must be a matrix with dense rows, is {tuple(x.shape)} of strides {x.stride()}")
    rows, size = x.shape
    out = torch.empty((rows, size), dtype=FP8, device=x.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    if rows:
        block = next_power_of_2(size)
        warps = num_warps or max(1, min(16, block // 512))
        _quantise_rows[(rows,)](
            x, out, scale, x.stride(0), SIZE=size, BLOCK=block, LEAST=_LEAST_AMAX, num_warps=warps
        )
    return out, scale


@cached_kernel
@triton.jit
def _quantise_rows(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    row_stride: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    LEAST: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < SIZE
    x = tl.load(x_ptr + row * row_stride + column, mask=mask, other=0.0).to(tl.float32)
    size = tl.where(x == x, tl.abs(x), float("inf"))
    largest = tl.maximum(tl.max(size, axis=0), LEAST)
    scale = tl.math.div_rn(tl.where(largest < float("inf"), largest, float("nan")), 448.0)
    scaled = tl.minimum(tl.maximum(tl.math.div_rn(x, scale), -448.0), 448.0)
    scaled = tl.where(scale == scale, scaled, 0.0)
    tl.store(out_ptr + row * SIZE + column, scaled.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + row, scale)
