"""Root-mean-square normalisation (Zhang and Sennrich, 2019), alone and joined with the residual add.

The references are torch's; the kernel takes whole rows, so that each is read and written once, and rounds
once at the end. CUDA tensors go to the kernel, others to the reference.
"""

import msgspec
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.dependent_launch import await_earlier, launch_options, let_next_start
from services.engine.ops.launch_cache import cached_kernel, cdiv, next_power_of_2
from services.engine.ops.tuning import tuned

TILE_ELEMENTS = 4096
"""Short rows (heads) share a program until it holds this many elements."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of `x` `[..., size]` by `weight` `[size]`."""
    if x.is_cuda:
        return rms_norm_kernel(x, weight, eps)
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(rms_norm(x + residual), x + residual)`, both `[tokens, size]`. `residual` is overwritten."""
    if x.is_cuda:
        return add_rms_norm_kernel(x, residual, weight, eps)
    residual.add_(x)
    return F.rms_norm(residual, (x.shape[-1],), weight, eps), residual


def head_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise every head of `x` `[tokens, heads, head_dim]` by its own row of `weight` `[heads, head_dim]`.

    Query and key heads lie in one tensor, so one call does the QK-norm of both.
    """
    if x.is_cuda:
        return head_rms_norm_kernel(x, weight, eps)
    return F.rms_norm(x, (x.shape[-1],), None, eps).mul_(weight)


class NormLaunch(msgspec.Struct, frozen=True):
    """How many warps share a program's rows."""

    num_warps: int


def rms_norm_kernel(x: Tensor, weight: Tensor, eps: float, launch: NormLaunch | None = None) -> Tensor:
    """`rms_norm` in one launch."""
    rows = _rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(rows[:, None], None, out.view(rows.shape)[:, None], weight[None], eps, launch)
    return out


def add_rms_norm_kernel(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, launch: NormLaunch | None = None
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in one launch. Raises ValueError if the rows of `residual` are not dense."""
    if residual.stride(-1) != 1:
        raise ValueError("residual is overwritten, so the elements of its rows must be neighbours")
    out = torch.empty_like(residual, memory_format=torch.contiguous_format)
    _launch(_rows(x)[:, None], residual[:, None], out[:, None], weight[None], eps, launch)
    return out, residual


def head_rms_norm_kernel(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`head_rms_norm` in one launch; `x` may be a slice of the heads of a wider tensor."""
    heads = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(heads, None, out, weight, eps, None)
    return out


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _launch(
    x: Tensor,
    residual: Tensor | None,
    out: Tensor,
    weight: Tensor,
    eps: float,
    launch: NormLaunch | None,
) -> None:
    """All `[tokens, rows, size]` but `weight` `[rows, size]`. Without a `launch`, as it was tuned."""
    tokens, rows, size = x.shape
    if tokens == 0:
        return
    block = next_power_of_2(size)
    block_rows = max(1, min(next_power_of_2(rows), TILE_ELEMENTS // block))
    if launch is None:
        default = NormLaunch(max(1, min(16, block * block_rows // 512)))
        launch = tuned("rms_norm", (tokens, rows, size), x.device, default)
    added = x if residual is None else residual
    _rms_norm[(tokens, cdiv(rows, block_rows))](
        x,
        added,
        out,
        weight,
        x.stride(0),
        x.stride(1),
        added.stride(0),
        out.stride(0),
        out.stride(1),
        rows,
        eps,
        SIZE=size,
        BLOCK=block,
        BLOCK_ROWS=block_rows,
        ADD=residual is not None,
        num_warps=launch.num_warps,
        **launch_options(x),
    )


@cached_kernel
@triton.jit
def _rms_norm(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    x_token: tl.tensor,
    x_row: tl.tensor,
    residual_token: tl.tensor,
    out_token: tl.tensor,
    out_row: tl.tensor,
    rows: tl.tensor,
    eps: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    let_next_start(PDL)
    await_earlier(PDL)
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row[:, None] < rows) & (column[None, :] < SIZE)

    x = tl.load(x_ptr + token * x_token + row[:, None] * x_row + column[None, :], mask=mask, other=0.0)
    value = x.to(tl.float32)
    if ADD:  # one row a token
        place = residual_ptr + token * residual_token + row[:, None] * 0 + column[None, :]
        total = (value + tl.load(place, mask=mask, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(place, total, mask=mask)
        value = total.to(tl.float32)  # the norm sees what the residual stream keeps

    scale = tl.rsqrt(tl.sum(value * value, axis=1) / SIZE + eps)
    weight = tl.load(weight_ptr + row[:, None] * SIZE + column[None, :], mask=mask, other=0.0)
    normed = value * scale[:, None] * weight.to(tl.float32)
    out = out_ptr + token * out_token + row[:, None] * out_row + column[None, :]
    tl.store(out, normed.to(x.dtype), mask=mask)
