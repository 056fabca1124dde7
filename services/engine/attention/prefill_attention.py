"""Causal attention of prompt chunks over the paged pool, several sequences a launch (Dao, FlashAttention-2,
2023; Kwon et al., PagedAttention, 2023).

A program takes a tile of (token, query head of one KV head) rows, so that heads that share keys share their
loads and a tile spans few tokens, which wastes little on the diagonal. Keys up to the tile's first token
need no mask and come first. CUDA tensors go to the kernel, or to Hopper's own where that takes them
(hopper_attention.py), others to the reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.attention import hopper_attention
from services.engine.attention.decode_attention import LOG2_E, check_kv_dtype
from services.engine.ops.fp8 import as_bytes
from services.engine.ops.launch_cache import cached_kernel, cdiv, next_power_of_2


def prefill_attention(
    queries: Tensor,
    pool: Tensor,
    layer: int,
    query_starts: Tensor,
    query_counts: Tensor,
    context_starts: Tensor,
    page_tables: Tensor,
    max_query_count: int,
    scale: float,
    window: int | None = None,
    out: Tensor | None = None,
    kv_scales: Tensor | None = None,
) -> Tensor:
    """`[tokens, heads, head_dim]` to the same shape and dtype.

    Sequence `i` asks with tokens `[query_starts[i], query_starts[i] + query_counts[i])`, which lie at its
    positions `context_starts[i] ...` and whose keys and values the pool already holds; it has the pages of
    `page_tables[i]`, from its first token. All int32, `[sequences]` and `[sequences, max_pages]`. `pool` is
    `[pages, layers, 2, kv_heads, page_size, head_dim]`. `max_query_count` bounds every count.

    With a `window`, a query sees itself and the window - 1 tokens before. `out`, if given, is where the
    result goes (dense); tokens of no sequence keep what it held, and are undefined in a new tensor.
    `kv_scales` is `KvPool.layer_scales`: None, or float32 `[2, kv_heads]` for a pool of fp8.
    """
    arguments = (queries, pool, layer, query_starts, query_counts, context_starts, page_tables)
    if hopper_attention.takes(queries, pool, window):
        out = torch.empty_like(queries, memory_format=torch.contiguous_format) if out is None else out
        return hopper_attention.hopper_prefill_attention(*arguments, max_query_count, scale, out)
    if queries.is_cuda:
        return prefill_attention_kernel(*arguments, max_query_count, scale, window, kv_scales, out=out)
    return prefill_attention_reference(*arguments, scale, window, out, kv_scales)


def prefill_attention_reference(
    queries: Tensor,
    pool: Tensor,
    layer: int,
    query_starts: Tensor,
    query_counts: Tensor,
    context_starts: Tensor,
    page_tables: Tensor,
    scale: float,
    window: int | None = None,
    out: Tensor | None = None,
    kv_scales: Tensor | None = None,
) -> Tensor:
    """`prefill_attention` one sequence after the other, dense in float32."""
    kv_heads, head_dim = pool.shape[3], pool.shape[5]
    out = torch.zeros_like(queries) if out is None else out
    ranges = zip(query_starts.tolist(), query_counts.tolist(), context_starts.tolist(), strict=True)
    for at, (first, count, position) in enumerate(ranges):
        end = position + count
        held = as_bytes(pool)[page_tables[at].clamp(min=0).long(), layer].view(pool.dtype).float()
        if kv_scales is not None:
            held *= kv_scales[:, :, None, None]
        keys, values = held.permute(1, 2, 0, 3, 4).reshape(2, kv_heads, 1, -1, head_dim)[..., :end, :]
        asking = queries[first : first + count].float().view(count, kv_heads, -1, head_dim)
        scores = torch.matmul(asking.permute(1, 2, 0, 3), keys.mT) * scale
        own = torch.arange(position, end, device=queries.device)[:, None]
        key = torch.arange(end, device=queries.device)[None, :]
        hidden = key > own
        if window is not None:
            hidden |= key <= own - window
        mixed = torch.matmul(scores.masked_fill(hidden, float("-inf")).softmax(dim=-1), values)
        out[first : first + count] = mixed.permute(2, 0, 1, 3).reshape(count, -1, head_dim).to(queries.dtype)
    return out


def prefill_attention_kernel(
    queries: Tensor,
    pool: Tensor,
    layer: int,
    query_starts: Tensor,
    query_counts: Tensor,
    context_starts: Tensor,
    page_tables: Tensor,
    max_query_count: int,
    scale: float,
    window: int | None = None,
    kv_scales: Tensor | None = None,
    *,
    out: Tensor | None = None,
    block_rows: int | None = None,
    block_keys: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> Tensor:
    """`prefill_attention` in one launch. Raises ValueError on what it cannot take."""
    tokens, heads, head_dim = queries.shape
    _, _, _, kv_heads, page_size, pool_head_dim = pool.shape
    if pool_head_dim != head_dim or heads % kv_heads:
        raise ValueError(f"queries {tuple(queries.shape)} do not go with a pool {tuple(pool.shape)}")
    check_kv_dtype(queries, pool, kv_scales)
    integers = (query_starts, query_counts, context_starts, page_tables)
    if any(tensor.dtype != torch.int32 for tensor in integers) or page_tables.stride(1) != 1:
        raise ValueError("starts, counts and page_tables must be int32, page_tables dense along a sequence")
    group = heads // kv_heads
    block_dim = max(16, next_power_of_2(head_dim))  # the least that tl.dot takes
    sizes = _default_blocks(group, block_dim, queries.element_size(), pool.element_size())
    rows = block_rows or sizes[0]
    if rows < group:
        raise ValueError(f"block_rows {rows} must hold the {group} query heads of a KV head")
    if queries.stride(2) != 1:
        queries = queries.contiguous()
    kv = pool[:, layer]
    if out is None:
        out = torch.empty((tokens, heads, head_dim), dtype=queries.dtype, device=queries.device)
    elif out.shape != queries.shape or out.dtype != queries.dtype or not out.is_contiguous():
        raise ValueError(f"out {tuple(out.shape)} {out.dtype} must be dense and like the queries")
    sequences = query_starts.shape[0]
    tiles = cdiv(max_query_count, rows // group)
    if sequences == 0 or tiles == 0:
        return out
    _prefill[(kv_heads, sequences, tiles)](
        queries,
        kv,
        query_starts,
        query_counts,
        context_starts,
        page_tables,
        page_tables if kv_scales is None else kv_scales,
        out,
        queries.stride(0),
        queries.stride(1),
        kv.stride(0),
        kv.stride(1),
        kv.stride(2),
        page_tables.stride(0),
        scale * LOG2_E,
        HEADS=heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim,
        PAGE_SIZE=page_size,
        BLOCK_ROWS=rows,
        BLOCK_KEYS=block_keys or sizes[1],
        WINDOW=window or 0,
        SCALED=kv_scales is not None,
        num_warps=num_warps or sizes[2],
        num_stages=num_stages or sizes[3],
    )
    return out


def _default_blocks(
    group: int, block_dim: int, element_bytes: int, kv_element_bytes: int
) -> tuple[int, int, int, int]:
    """Rows, keys, warps and stages that fit Hopper's registers and 227 KiB of shared memory (seen in what
    the compiler reports for sm_90: none of these spills at head_dim 128 or 256). 128 keys in 2 stages are
    13 % faster than 64 in 3 at 8192 tokens on an H200, and 2 % slower at 1024
    (deploy/bench/kernels/attention_kernels.py). Keys of fp8 are converted in registers, of which 128 keys
    need too many."""
    if element_bytes == 4:  # float32 products run without tensor cores, and larger tiles would spill
        return max(16, next_power_of_2(group)), 16, 4, 2 if block_dim <= 128 else 1
    least_rows = next_power_of_2(group)
    if kv_element_bytes == 1:
        return (max(128, least_rows), 64, 8, 3) if block_dim <= 128 else (max(64, least_rows), 64, 8, 2)
    return max(128, least_rows), 128 if block_dim <= 128 else 64, 8, 2


@cached_kernel
@triton.jit
def _prefill(
    queries_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    contexts_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    out_ptr: tl.tensor,
    query_token: tl.tensor,
    query_head: tl.tensor,
    kv_page: tl.tensor,
    kv_value: tl.tensor,
    kv_head_stride: tl.tensor,
    table_sequence: tl.tensor,
    scale: tl.tensor,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALED: tl.constexpr,
) -> None:
    TOKENS: tl.constexpr = BLOCK_ROWS // GROUP  # rows left over, if the group is no power of two, are idle
    kv_head = tl.program_id(0)
    sequence = tl.program_id(1)
    tile = tl.num_programs(2) - 1 - tl.program_id(2)  # the longest tiles start first
    count = tl.load(counts_ptr + sequence)
    first_token = tile * TOKENS
    if first_token >= count:
        return
    context = tl.load(contexts_ptr + sequence)
    query_start = tl.load(starts_ptr + sequence).to(tl.int64)

    row = tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_DIM)
    in_dim = column < HEAD_DIM
    token = first_token + row // GROUP
    head = kv_head * GROUP + row % GROUP
    is_query = ((row < TOKENS * GROUP) & (token < count))[:, None] & in_dim[None, :]
    place = (query_start + token)[:, None] * query_token + head[:, None] * query_head + column[None, :]
    query = tl.load(queries_ptr + place, mask=is_query, other=0.0)
    position = context + tl.minimum(token, count - 1)

    end = context + tl.minimum(first_token + TOKENS, count)  # keys [0, end) are seen by some row
    start = 0
    unmasked_end = (context + first_token + 1) // BLOCK_KEYS * BLOCK_KEYS  # ... and these by every row
    if WINDOW > 0:
        start = tl.maximum(context + first_token - WINDOW + 1, 0) // BLOCK_KEYS * BLOCK_KEYS
        unmasked_end = start

    table = tables_ptr + sequence.to(tl.int64) * table_sequence
    kv = kv_ptr + kv_head * kv_head_stride
    if SCALED:
        scale *= tl.load(scales_ptr + kv_head)
    # Finite, so that a row that sees nothing of a block makes no NaN.
    highest = tl.full([BLOCK_ROWS], -1.0e30, dtype=tl.float32)
    total = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    mixed = tl.zeros([BLOCK_ROWS, BLOCK_DIM], dtype=tl.float32)
    for block in range(start, unmasked_end, BLOCK_KEYS):
        highest, total, mixed = _attend(
            query, highest, total, mixed, kv, table, kv_page, kv_value, block, end, position, scale, in_dim,
            HEAD_DIM, BLOCK_DIM, PAGE_SIZE, BLOCK_KEYS, WINDOW, False,
        )  # fmt: skip
    for block in range(unmasked_end, end, BLOCK_KEYS):
        highest, total, mixed = _attend(
            query, highest, total, mixed, kv, table, kv_page, kv_value, block, end, position, scale, in_dim,
            HEAD_DIM, BLOCK_DIM, PAGE_SIZE, BLOCK_KEYS, WINDOW, True,
        )  # fmt: skip

    mixed = mixed / total[:, None]
    if SCALED:
        mixed *= tl.load(scales_ptr + HEADS // GROUP + kv_head)
    target = (query_start + token)[:, None] * (HEADS * HEAD_DIM) + head[:, None] * HEAD_DIM + column[None, :]
    tl.store(out_ptr + target, mixed.to(query.dtype), mask=is_query)


@triton.jit
def _attend(
    query: tl.tensor,
    highest: tl.tensor,
    total: tl.tensor,
    mixed: tl.tensor,
    kv: tl.tensor,
    table: tl.tensor,
    kv_page: tl.tensor,
    kv_value: tl.tensor,
    block: tl.tensor,
    end: tl.tensor,
    position: tl.tensor,
    scale: tl.tensor,
    in_dim: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """One block of keys into the running softmax."""
    key = block + tl.arange(0, BLOCK_KEYS)
    column = tl.arange(0, BLOCK_DIM)
    held = key < end
    page = tl.load(table + key // PAGE_SIZE, mask=held, other=0).to(tl.int64)
    spot = kv + (page * kv_page + (key % PAGE_SIZE) * HEAD_DIM)[:, None] + column[None, :]
    is_key = held[:, None] & in_dim[None, :]
    keys = tl.load(spot, mask=is_key, other=0.0).to(query.dtype)
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
    if MASKED:
        seen = key[None, :] <= position[:, None]
        if WINDOW > 0:
            seen = seen & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, axis=1))
    shrink = tl.exp2(highest - new_highest)
    weights = tl.exp2(scores - new_highest[:, None])
    total = total * shrink + tl.sum(weights, axis=1)
    values = tl.load(spot + kv_value, mask=is_key, other=0.0).to(query.dtype)
    mixed = tl.dot(weights.to(values.dtype), values, mixed * shrink[:, None], input_precision="ieee")
    return new_highest, total, mixed
