"""What lies between the fused query/key/value product and the attention, in one launch: the norm of query
and key heads, the rotary embedding, and the write of keys and values into the paged pool.

CUDA tensors go to the kernel, others to the reference, which is made of the separate operations.
"""

import msgspec
import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.dependent_launch import await_earlier, launch_options, let_next_start
from services.engine.ops.fp8 import FP8
from services.engine.ops.kv_write import write_kv
from services.engine.ops.launch_cache import cached_kernel, cdiv, next_power_of_2
from services.engine.ops.rms_norm import head_rms_norm
from services.engine.ops.rotary import rotate
from services.engine.ops.tuning import tuned


def qkv_to_pool(
    qkv: Tensor,
    head_norm: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    layer_rows: Tensor,
    write_index: Tensor,
    nonfinite: Tensor,
    kv_scales: Tensor | None = None,
) -> Tensor:
    """Returns the rotated queries `[tokens, heads, head_dim]` and writes keys and values into the pool.

    `qkv` is `[tokens, heads + 2 * kv_heads, head_dim]`; `head_norm` `[heads + kv_heads, head_dim]` the norm
    weights or None; `cos` and `sin` float32 `[tokens, 1, head_dim]` with the first half of `sin` negated
    (rope.py). `layer_rows` is `KvPool.layer_rows[layer]`, `write_index` int64 `[tokens * 2 * kv_heads]` the
    row of each head, keys first; a negative row is not written, which is how a CUDA graph's unused
    places leave the pool alone. Numbers that are not finite are stored as finite ones (see kv_write), and put
    a 1 at their token in `nonfinite` int32 `[tokens]`: later tokens would not show what they attended to.
    `kv_scales` is `KvPool.layer_scales`: None, or float32 `[2, kv_heads]` for a pool of fp8.
    """
    write = qkv_to_pool_kernel if qkv.is_cuda else qkv_to_pool_reference
    return write(qkv, head_norm, eps, cos, sin, layer_rows, write_index, nonfinite, kv_scales)


def qkv_to_pool_reference(
    qkv: Tensor,
    head_norm: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    layer_rows: Tensor,
    write_index: Tensor,
    nonfinite: Tensor,
    kv_scales: Tensor | None = None,
) -> Tensor:
    """`qkv_to_pool` by torch operations."""
    kv_heads = write_index.numel() // (2 * qkv.shape[0])
    heads = qkv.shape[1] - 2 * kv_heads
    rotated = qkv[:, : heads + kv_heads]
    if head_norm is not None:
        rotated = head_rms_norm(rotated, head_norm, eps)
    rotated = rotate(rotated, cos, sin)
    values = qkv[:, heads + kv_heads :]
    finite = rotated.isfinite().all(dim=(1, 2)) & values.isfinite().all(dim=(1, 2))
    nonfinite.masked_fill_(~finite, 1)
    kv = torch.cat((rotated[:, heads:], values), dim=1)
    write_kv(layer_rows, write_index, kv, kv_scales)
    return rotated[:, :heads]


class QkvLaunch(msgspec.Struct, frozen=True):
    """Heads of one token in a program."""

    block_heads: int = 16
    num_warps: int = 4


def qkv_to_pool_kernel(
    qkv: Tensor,
    head_norm: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    layer_rows: Tensor,
    write_index: Tensor,
    nonfinite: Tensor,
    kv_scales: Tensor | None = None,
    launch: QkvLaunch | None = None,
) -> Tensor:
    """`qkv_to_pool` in one launch, by default as it was tuned.

    Raises ValueError on a shape or layout it cannot take.
    """
    tokens, all_heads, head_dim = qkv.shape
    kv_heads = write_index.numel() // (2 * tokens) if tokens else 0
    heads = all_heads - 2 * kv_heads
    if qkv.stride(2) != 1 or qkv.stride(1) != head_dim:
        raise ValueError("qkv must have each token's heads dense")
    if head_dim % 2 or layer_rows.stride() != (head_dim, 1):
        raise ValueError(f"head_dim {head_dim} must be even, and layer_rows dense rows of it")
    if not (cos.is_contiguous() and sin.is_contiguous() and cos.numel() == sin.numel() == tokens * head_dim):
        raise ValueError(f"cos and sin must be dense [tokens, 1, head_dim], are {tuple(cos.shape)}")
    if (layer_rows.dtype == FP8) != (kv_scales is not None):
        raise ValueError(f"a pool of {layer_rows.dtype} goes with scales only if it is of fp8")
    queries = torch.empty((tokens, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if tokens == 0:
        return queries
    if launch is None:
        launch = tuned("qkv_to_pool", (tokens, all_heads, head_dim), qkv.device, QkvLaunch())
    _qkv_to_pool[(tokens, cdiv(all_heads, launch.block_heads))](
        qkv,
        qkv if head_norm is None else head_norm,
        cos,
        sin,
        layer_rows,
        write_index,
        cos if kv_scales is None else kv_scales,
        nonfinite,
        queries,
        qkv.stride(0),
        eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=head_dim // 2,
        BLOCK_HALF=next_power_of_2(head_dim // 2),
        BLOCK_HEADS=launch.block_heads,
        NORM=head_norm is not None,
        SCALED=kv_scales is not None,
        LARGEST=torch.finfo(qkv.dtype).max,
        FINITE_MAX=torch.finfo(layer_rows.dtype).max,
        num_warps=launch.num_warps,
        **launch_options(qkv),
    )
    return queries


@cached_kernel
@triton.jit
def _qkv_to_pool(
    qkv_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    index_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    nonfinite_ptr: tl.tensor,
    queries_ptr: tl.tensor,
    token_stride: tl.tensor,
    eps: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    NORM: tl.constexpr,
    SCALED: tl.constexpr,
    LARGEST: tl.constexpr,
    FINITE_MAX: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    let_next_start(PDL)
    await_earlier(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    column = tl.arange(0, BLOCK_HALF)
    in_half = column < HALF
    mask = (head[:, None] < HEADS + 2 * KV_HEADS) & in_half[None, :]
    is_value = (head >= HEADS + KV_HEADS)[:, None]

    place = head[:, None] * (2 * HALF) + column[None, :]
    source = qkv_ptr + token * token_stride + place
    first_in = tl.load(source, mask=mask, other=0.0)
    second_in = tl.load(source + HALF, mask=mask, other=0.0)
    first, second = first_in.to(tl.float32), second_in.to(tl.float32)

    if NORM:
        square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        scale = tl.rsqrt(square / (2 * HALF) + eps)[:, None]
        normed = mask & (is_value == 0)
        first_weight = tl.load(norm_ptr + place, mask=normed, other=1.0).to(tl.float32)
        second_weight = tl.load(norm_ptr + place + HALF, mask=normed, other=1.0).to(tl.float32)
        first = tl.where(is_value, first, first * scale * first_weight)
        second = tl.where(is_value, second, second * scale * second_weight)

    angle = token * (2 * HALF) + column
    first_cos = tl.load(cos_ptr + angle, mask=in_half, other=1.0)[None, :]
    second_cos = tl.load(cos_ptr + angle + HALF, mask=in_half, other=1.0)[None, :]
    first_sin = tl.load(sin_ptr + angle, mask=in_half, other=0.0)[None, :]
    second_sin = tl.load(sin_ptr + angle + HALF, mask=in_half, other=0.0)[None, :]
    first_out = tl.where(is_value, first, first * first_cos + second * first_sin)
    second_out = tl.where(is_value, second, second * second_cos + first * second_sin)

    is_query = mask & (head[:, None] < HEADS)
    query = queries_ptr + token * (HEADS * 2 * HALF) + place
    tl.store(query, first_out.to(first_in.dtype), mask=is_query)
    tl.store(query + HALF, second_out.to(first_in.dtype), mask=is_query)

    # false for NaN as well; all that are not finite write the same to the same place
    is_finite = (tl.abs(first_out) <= LARGEST) & (tl.abs(second_out) <= LARGEST)
    tl.store(nonfinite_ptr + token + place * 0, 1, mask=mask & (is_finite == 0))

    kv_head = head - HEADS
    is_kv = (kv_head >= 0) & (kv_head < 2 * KV_HEADS)
    row = tl.load(index_ptr + token * (2 * KV_HEADS) + kv_head, mask=is_kv, other=-1).to(tl.int64)
    written = (row >= 0)[:, None] & in_half[None, :]
    target = rows_ptr + row[:, None] * (2 * HALF) + column[None, :]
    if SCALED:
        kv_scale = tl.load(scales_ptr + kv_head, mask=is_kv, other=1.0)[:, None]
        first_out = tl.math.div_rn(first_out, kv_scale)
        second_out = tl.math.div_rn(second_out, kv_scale)
    first_kv = tl.where(first_out == first_out, first_out, 0.0)
    second_kv = tl.where(second_out == second_out, second_out, 0.0)
    first_kv = tl.minimum(tl.maximum(first_kv, -FINITE_MAX), FINITE_MAX)
    second_kv = tl.minimum(tl.maximum(second_kv, -FINITE_MAX), FINITE_MAX)
    tl.store(target, first_kv.to(rows_ptr.dtype.element_ty), mask=written)
    tl.store(target + HALF, second_kv.to(rows_ptr.dtype.element_ty), mask=written)
