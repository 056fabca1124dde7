"""The gated activation of the MLP (Shazeer, GLU Variants Improve Transformer, 2020).

CUDA tensors go to the kernel, which reads gate and up once and rounds once; others to the reference.
"""

import msgspec
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.dependent_launch import await_earlier, launch_options, let_next_start
from services.engine.ops.launch_cache import cached_kernel, cdiv
from services.engine.ops.tuning import tuned


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` for `gate_up` `[tokens, 2 * size]`, gate first; returns `[tokens, size]`."""
    if gate_up.is_cuda:
        return silu_mul_kernel(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class SwigluLaunch(msgspec.Struct, frozen=True):
    """`block` elements for each program."""

    block: int = 1024
    num_warps: int = 4


def silu_mul_kernel(gate_up: Tensor, launch: SwigluLaunch | None = None) -> Tensor:
    """`silu_mul` in one launch, by default as it was tuned."""
    rows = gate_up if gate_up.stride(-1) == 1 else gate_up.contiguous()
    tokens, size = rows.shape[0], rows.shape[1] // 2
    out = torch.empty((tokens, size), dtype=rows.dtype, device=rows.device)
    if tokens:
        launch = launch or tuned("silu_mul", (tokens, size), rows.device, SwigluLaunch())
        _silu_mul[(tokens, cdiv(size, launch.block))](
            rows,
            out,
            rows.stride(0),
            size,
            BLOCK=launch.block,
            num_warps=launch.num_warps,
            **launch_options(rows),
        )
    return out


@cached_kernel
@triton.jit
def _silu_mul(
    gate_up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    row_stride: tl.tensor,
    size: tl.tensor,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    let_next_start(PDL)
    await_earlier(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    row = gate_up_ptr + token * row_stride
    gate = tl.load(row + column, mask=mask, other=0.0)
    up = tl.load(row + size + column, mask=mask, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    result = wide / (1.0 + tl.exp(-wide)) * up
    tl.store(out_ptr + token * size + column, result.to(gate.dtype), mask=mask)
