"""Attention of one new token a sequence over the paged pool (Kwon et al., PagedAttention, 2023), with each
sequence's keys split over several programs (Dao et al., Flash-Decoding, 2023).

One program takes all query heads of one KV head, so that keys and values are read once. Nothing on the host
depends on a length: the number of splits is an argument, lengths and page tables are read on the device, and
so a CUDA graph of the launch stays right as sequences grow. CUDA tensors go to the kernels, others to the
reference.
"""

import msgspec
import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.dependent_launch import await_earlier, launch_options, let_next_start
from services.engine.ops.fp8 import FP8, as_bytes
from services.engine.ops.launch_cache import cached_kernel, next_power_of_2
from services.engine.ops.tuning import tuned

LOG2_E = 1.4426950408889634
MAX_SPLITS = 32


def decode_attention(
    queries: Tensor,
    pool: Tensor,
    layer: int,
    page_tables: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None = None,
    splits: int = 1,
    out: Tensor | None = None,
    kv_scales: Tensor | None = None,
) -> Tensor:
    """`[batch, heads, head_dim]` to the same shape and dtype.

    `pool` is `[pages, layers, 2, kv_heads, page_size, head_dim]`, `page_tables` int32 `[batch, max_pages]`,
    `lengths` int32 `[batch]` the tokens each sequence has including the one that asks; a sequence of length
    0 gives zeros and reads no page. With a `window`, the query sees itself and the window - 1 tokens before.
    `out`, if given, is where the result goes: dense, such as the first rows of a step's output.
    `kv_scales` is `KvPool.layer_scales`: None, or float32 `[2, kv_heads]` for a pool of fp8.
    """
    if queries.is_cuda:
        return decode_attention_kernel(
            queries, pool, layer, page_tables, lengths, scale, window, kv_scales, splits=splits, out=out
        )
    return decode_attention_reference(
        queries, pool, layer, page_tables, lengths, scale, window, out, kv_scales
    )


def decode_splits(batch: int, kv_heads: int, context_tokens: int, processors: int) -> int:
    """A power of two of splits such that the programs fill `processors` streaming multiprocessors about
    twice, yet each has at least 64 of `context_tokens`: the longest context that the launch is for."""
    wanted = -(-2 * processors // (batch * kv_heads))
    most = min(MAX_SPLITS, max(1, context_tokens // 64))
    splits = 1
    while splits < wanted and 2 * splits <= most:
        splits *= 2
    return splits


def check_kv_dtype(queries: Tensor, pool: Tensor, kv_scales: Tensor | None) -> None:
    """Raises ValueError unless the pool is of the queries' dtype, or of fp8 and has scales."""
    if pool.dtype != (queries.dtype if kv_scales is None else FP8):
        raise ValueError(
            f"queries of {queries.dtype} do not go with a pool of {pool.dtype} "
            f"{'without' if kv_scales is None else 'and its'} scales"
        )


def decode_attention_reference(
    queries: Tensor,
    pool: Tensor,
    layer: int,
    page_tables: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None = None,
    out: Tensor | None = None,
    kv_scales: Tensor | None = None,
) -> Tensor:
    """`decode_attention` one sequence after the other, dense in float32."""
    kv_heads, head_dim = pool.shape[3], pool.shape[5]
    out = torch.zeros_like(queries) if out is None else out.zero_()
    for at, length in enumerate(lengths.tolist()):
        if length == 0:
            continue
        first = 0 if window is None else max(0, length - window)
        held = as_bytes(pool)[page_tables[at].clamp(min=0).long(), layer].view(pool.dtype).float()
        if kv_scales is not None:
            held *= kv_scales[:, :, None, None]
        keys, values = held.permute(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, head_dim)[:, :, first:length]
        grouped = queries[at].float().view(kv_heads, -1, head_dim)
        weights = (torch.matmul(grouped, keys.mT) * scale).softmax(dim=-1)
        out[at] = torch.matmul(weights, values).view(-1, head_dim).to(queries.dtype)
    return out


class DecodeLaunch(msgspec.Struct, frozen=True):
    """Tokens of a program's turn, and how it works on them."""

    block_keys: int = 64
    num_warps: int = 4
    num_stages: int = 3


UNTUNED = DecodeLaunch()
FLOAT32 = DecodeLaunch(block_keys=16)
"""Products in float32 run without tensor cores, and larger tiles would spill."""


def decode_attention_kernel(
    queries: Tensor,
    pool: Tensor,
    layer: int,
    page_tables: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None = None,
    kv_scales: Tensor | None = None,
    *,
    out: Tensor | None = None,
    splits: int = 1,
    launch: DecodeLaunch | None = None,
) -> Tensor:
    """`decode_attention` in one launch, or two if `splits` > 1; by default as it was tuned.

    Raises ValueError on what it cannot take.
    """
    batch, heads, head_dim = queries.shape
    _, _, _, kv_heads, page_size, pool_head_dim = pool.shape
    if pool_head_dim != head_dim or heads % kv_heads:
        raise ValueError(f"queries {tuple(queries.shape)} do not go with a pool {tuple(pool.shape)}")
    check_kv_dtype(queries, pool, kv_scales)
    if page_tables.dtype != torch.int32 or lengths.dtype != torch.int32 or page_tables.stride(1) != 1:
        raise ValueError("page_tables and lengths must be int32, and page_tables dense along a sequence")
    if splits < 1:
        raise ValueError(f"splits must be at least 1, is {splits}")
    if queries.stride(2) != 1:
        queries = queries.contiguous()
    kv = pool[:, layer]
    if out is None:
        out = torch.empty((batch, heads, head_dim), dtype=queries.dtype, device=queries.device)
    elif out.shape != queries.shape or out.dtype != queries.dtype or not out.is_contiguous():
        raise ValueError(f"out {tuple(out.shape)} {out.dtype} must be dense and like the queries")
    if batch == 0:
        return out
    group = heads // kv_heads
    partial, weight = out, out  # not touched with one split
    if splits > 1:
        partial = torch.empty((batch, heads, splits, head_dim), dtype=torch.float32, device=queries.device)
        weight = torch.empty((batch, heads, splits), dtype=torch.float32, device=queries.device)
    block_dim = max(16, next_power_of_2(head_dim))  # the least that tl.dot takes
    if launch is None and queries.element_size() == 4:
        launch = FLOAT32
    elif launch is None:
        shape = (batch, splits, kv_heads, group, head_dim, page_size)
        launch = tuned("decode_attention", shape, queries.device, UNTUNED)
    options = launch_options(queries)
    _decode[(batch, kv_heads, splits)](
        queries,
        kv,
        page_tables,
        lengths,
        weight if kv_scales is None else kv_scales,
        out,
        partial,
        weight,
        queries.stride(0),
        queries.stride(1),
        kv.stride(0),
        kv.stride(1),
        kv.stride(2),
        page_tables.stride(0),
        scale * LOG2_E,
        KV_HEADS=kv_heads,
        GROUP=group,
        BLOCK_GROUP=max(16, next_power_of_2(group)),
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim,
        PAGE_SIZE=page_size,
        BLOCK_KEYS=launch.block_keys,
        WINDOW=window or 0,
        SPLITS=splits,
        SCALED=kv_scales is not None,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **options,
    )
    if splits > 1:
        _combine[(batch, heads)](
            partial,
            weight,
            out,
            HEADS=heads,
            HEAD_DIM=head_dim,
            BLOCK_DIM=block_dim,
            SPLITS=splits,
            BLOCK_SPLITS=next_power_of_2(splits),
            num_warps=4,
            **options,
        )
    return out


@cached_kernel
@triton.jit
def _decode(
    queries_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    query_sequence: tl.tensor,
    query_head: tl.tensor,
    kv_page: tl.tensor,
    kv_value: tl.tensor,
    kv_head_stride: tl.tensor,
    table_sequence: tl.tensor,
    scale: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    let_next_start(PDL)
    await_earlier(PDL)
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    member = tl.arange(0, BLOCK_GROUP)
    column = tl.arange(0, BLOCK_DIM)
    in_dim = column < HEAD_DIM
    head = kv_head * GROUP + member
    is_query = (member < GROUP)[:, None] & in_dim[None, :]

    length = tl.load(lengths_ptr + sequence)
    first_key = 0
    if WINDOW > 0:
        first_key = tl.maximum(length - WINDOW, 0)
    per_split = tl.cdiv(tl.cdiv(length - first_key, BLOCK_KEYS), SPLITS) * BLOCK_KEYS
    start = first_key + split * per_split
    end = tl.minimum(start + per_split, length)

    place = sequence * query_sequence + head[:, None] * query_head + column[None, :]
    query = tl.load(queries_ptr + place, mask=is_query, other=0.0)
    table = tables_ptr + sequence * table_sequence
    kv = kv_ptr + kv_head * kv_head_stride
    if SCALED:
        scale *= tl.load(scales_ptr + kv_head)
    # Finite, so that the difference of two of them is no NaN; no key's score is as low.
    highest = tl.full([BLOCK_GROUP], -1.0e30, dtype=tl.float32)
    total = tl.zeros([BLOCK_GROUP], dtype=tl.float32)
    mixed = tl.zeros([BLOCK_GROUP, BLOCK_DIM], dtype=tl.float32)

    for block in range(start, end, BLOCK_KEYS):
        key = block + tl.arange(0, BLOCK_KEYS)
        seen = key < end
        page = tl.load(table + key // PAGE_SIZE, mask=seen, other=0).to(tl.int64)
        row = page * kv_page + (key % PAGE_SIZE) * HEAD_DIM
        spot = kv + row[:, None] + column[None, :]
        keys = tl.load(spot, mask=seen[:, None] & in_dim[None, :], other=0.0).to(query.dtype)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        shrink = tl.exp2(highest - new_highest)
        weights = tl.exp2(scores - new_highest[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        values = tl.load(spot + kv_value, mask=seen[:, None] & in_dim[None, :], other=0.0).to(query.dtype)
        mixed = tl.dot(weights.to(values.dtype), values, mixed * shrink[:, None], input_precision="ieee")
        highest = new_highest

    mixed = mixed / tl.where(total > 0.0, total, 1.0)[:, None]
    if SCALED:
        mixed *= tl.load(scales_ptr + KV_HEADS + kv_head)
    row = sequence * (KV_HEADS * GROUP) + head
    if SPLITS == 1:
        target = out_ptr + row[:, None] * HEAD_DIM + column[None, :]
        tl.store(target, mixed.to(query.dtype), mask=is_query)
    else:
        target = partial_ptr + (row[:, None] * SPLITS + split) * HEAD_DIM + column[None, :]
        tl.store(target, mixed, mask=is_query)
        log_weight = tl.where(total > 0.0, highest + tl.log2(total), float("-inf"))
        tl.store(weight_ptr + row * SPLITS + split, log_weight, mask=member < GROUP)


@cached_kernel
@triton.jit
def _combine(
    partial_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    let_next_start(PDL)
    await_earlier(PDL)
    row = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    split = tl.arange(0, BLOCK_SPLITS)
    column = tl.arange(0, BLOCK_DIM)
    in_dim = column < HEAD_DIM

    log_weight = tl.load(weight_ptr + row * SPLITS + split, mask=split < SPLITS, other=float("-inf"))
    highest = tl.maximum(tl.max(log_weight, axis=0), -1.0e30)
    weight = tl.exp2(log_weight - highest)
    place = partial_ptr + (row * SPLITS + split[:, None]) * HEAD_DIM + column[None, :]
    partial = tl.load(place, mask=(split < SPLITS)[:, None] & in_dim[None, :], other=0.0)
    total = tl.sum(weight, axis=0)
    mixed = tl.sum(partial * weight[:, None], axis=0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out_ptr + row * HEAD_DIM + column, mixed.to(out_ptr.dtype.element_ty), mask=in_dim)
