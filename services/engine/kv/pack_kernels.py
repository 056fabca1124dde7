"""Pack and unpack: between pages and the canonical form KV travels in,
`[kv_head][layer][k|v][token][head_dim]`, dense over a run of tokens.

Heads come first so that a tensor-parallel rank's share is one contiguous range whatever the two sides'
page sizes are. All runs of a table (run_table.py) are moved together. CUDA tensors go to the kernel, one
launch each way; others to the references, run by run, also when only the slots are in host memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kv.run_table import RUN_FIELDS, RunTable
from services.engine.ops.fp8 import FP8, FP8_NAN, as_bytes
from services.engine.ops.launch_cache import cached_kernel, cdiv, next_power_of_2

TILE_BYTES = 16 << 10
"""What one program copies: whole rows of head_dim of one head, layer and kind."""


def pack_runs(pool: Tensor, staging: Tensor, slot_bytes: int, sent: Tensor, table: RunTable) -> None:
    """Gather every run of `table` from its pages into its slot.

    `pool` is `[pool pages, layers, 2, kv_heads, page_size, head_dim]`, `staging` uint8
    `[slots * slot_bytes]`, `sent` begins with the table's words as int32, on the pool's device.
    """
    if pool.is_cuda and staging.is_cuda:
        move_runs_kernel(pool, staging, slot_bytes, sent, table, unpack=False)
    else:
        move_runs_reference(pool, staging, slot_bytes, sent, table, unpack=False)


def unpack_runs(pool: Tensor, staging: Tensor, slot_bytes: int, sent: Tensor, table: RunTable) -> None:
    """Scatter every run from its slot into its pages, whose other tokens keep their values. Non-finite
    numbers are stored as finite ones (see kv_write), in fp8 its only NaN as 0."""
    if pool.is_cuda and staging.is_cuda:
        move_runs_kernel(pool, staging, slot_bytes, sent, table, unpack=True)
    else:
        move_runs_reference(pool, staging, slot_bytes, sent, table, unpack=True)


def move_runs_reference(
    pool: Tensor, staging: Tensor, slot_bytes: int, sent: Tensor, table: RunTable, unpack: bool
) -> None:
    """`pack_runs` or `unpack_runs`, one run after the other."""
    _, layers, _, _, page_size, head_dim = pool.shape
    move = unpack_segment_reference if unpack else pack_segment_reference
    for at, byte_count in enumerate(table.byte_counts):
        slot, _, tokens, first_offset, first_head, heads, pages_at, _ = table.words[
            at * RUN_FIELDS : (at + 1) * RUN_FIELDS
        ]
        pages = sent[pages_at : pages_at - (-(first_offset + tokens) // page_size)].long()
        data = staging[slot * slot_bytes : slot * slot_bytes + byte_count].view(pool.dtype)
        move(pool, pages, first_offset, data.view(heads, layers, 2, tokens, head_dim), first_head)


def pack_segment_reference(
    pool: Tensor, pages: Tensor, first_offset: int, segment: Tensor, first_head: int = 0
) -> None:
    """Gather one run's tokens from `pages` into `segment`, by torch operations.

    `pool` is `[pool pages, layers, 2, kv_heads, page_size, head_dim]`, `segment`
    `[heads, layers, 2, tokens, head_dim]` of the same dtype; its first head is the pool's `first_head`, its
    first token number `first_offset` of `pages[0]`. `pages` is int64 and covers the tokens exactly.
    """
    tokens = segment.shape[3]
    kv_heads, layers, _, _, head_dim = segment.shape
    pool, segment = as_bytes(pool)[:, :, :, first_head : first_head + kv_heads], as_bytes(segment)
    gathered = pool.index_select(0, pages).permute(3, 1, 2, 0, 4, 5)
    if first_offset == 0 and tokens == pages.numel() * pool.shape[4]:
        segment.view(kv_heads, layers, 2, pages.numel(), -1, head_dim).copy_(gathered)
    else:
        dense = gathered.reshape(kv_heads, layers, 2, -1, head_dim)
        segment.copy_(dense[:, :, :, first_offset : first_offset + tokens])


def unpack_segment_reference(
    pool: Tensor, pages: Tensor, first_offset: int, segment: Tensor, first_head: int = 0
) -> None:
    """Scatter `segment` into `pages`: the inverse of `pack_segment_reference`. Tokens of the first and last
    page that lie outside the segment keep their values."""
    tokens = segment.shape[3]
    kv_heads, layers, _, _, head_dim = segment.shape
    page_size = pool.shape[4]
    incoming = without_nan(segment)
    pool = as_bytes(pool)[:, :, :, first_head : first_head + kv_heads]
    if first_offset == 0 and tokens == pages.numel() * page_size:
        by_page = incoming.view(kv_heads, layers, 2, pages.numel(), page_size, head_dim)
        pool.index_copy_(0, pages, by_page.permute(3, 1, 2, 0, 4, 5))
        return
    current = pool.index_select(0, pages)
    dense = current.permute(3, 1, 2, 0, 4, 5).reshape(kv_heads, layers, 2, -1, head_dim)
    dense[:, :, :, first_offset : first_offset + tokens] = incoming
    by_page = dense.view(kv_heads, layers, 2, pages.numel(), page_size, head_dim)
    pool.index_copy_(0, pages, by_page.permute(3, 1, 2, 0, 4, 5))


def without_nan(segment: Tensor) -> Tensor:
    """Finite numbers in the place of others; fp8 as uint8."""
    if segment.dtype != FP8:
        return segment.nan_to_num()
    stored = as_bytes(segment)
    return stored.masked_fill((stored & FP8_NAN) == FP8_NAN, 0)


def move_runs_kernel(
    pool: Tensor, staging: Tensor, slot_bytes: int, sent: Tensor, table: RunTable, unpack: bool
) -> None:
    """`pack_runs` or `unpack_runs` in one launch; a page's other tokens are not touched, not even read.

    Every launch for a pool is of the same two compiled kernels, however long the runs are: none has to be
    compiled while somebody waits. Raises ValueError on a layout the kernel cannot take.
    """
    _, layers, _, kv_heads, page_size, head_dim = pool.shape
    item_bytes = pool.element_size()
    if slot_bytes % item_bytes or staging.numel() % item_bytes:
        raise ValueError(f"slots of {slot_bytes} bytes do not hold whole numbers of {item_bytes}")
    if not (pool.is_contiguous() and staging.is_contiguous() and sent.is_contiguous()):
        raise ValueError("pool, slots and table must be contiguous")
    block_dim = next_power_of_2(head_dim)
    block_tokens = max(1, TILE_BYTES // (block_dim * item_bytes))
    planes, blocks = table.most_heads * layers * 2, cdiv(table.most_tokens, block_tokens)
    _move[(planes, blocks, len(table.byte_counts))](
        as_bytes(pool),
        as_bytes(staging.view(pool.dtype)),
        sent,
        slot_bytes // item_bytes,
        FIELDS=RUN_FIELDS,
        KV_HEADS=kv_heads,
        LAYERS=layers,
        PAGE_SIZE=page_size,
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim,
        BLOCK_TOKENS=block_tokens,
        UNPACK=unpack,
        IS_FP8=pool.dtype == FP8,
        FINITE_MAX=torch.finfo(pool.dtype).max,
        num_warps=4,
    )


@cached_kernel
@triton.jit
def _move(
    pool_ptr: tl.tensor,
    staging_ptr: tl.tensor,
    table_ptr: tl.tensor,
    slot_numbers: tl.tensor,
    FIELDS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    LAYERS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    UNPACK: tl.constexpr,
    IS_FP8: tl.constexpr,
    FINITE_MAX: tl.constexpr,
) -> None:
    run_ptr = table_ptr + tl.program_id(2) * FIELDS
    plane = tl.program_id(0).to(tl.int64)  # (head * LAYERS + layer) * 2 + kind, as in the slot
    first_token = tl.program_id(1) * BLOCK_TOKENS
    tokens = tl.load(run_ptr + 2)
    heads = tl.load(run_ptr + 5)
    if plane < heads * (2 * LAYERS) and first_token < tokens:  # else the run is smaller than the largest
        slot = tl.load(run_ptr).to(tl.int64)
        first_offset = tl.load(run_ptr + 3)
        kv_head = tl.load(run_ptr + 4) + plane // (2 * LAYERS)
        pages_ptr = table_ptr + tl.load(run_ptr + 6)
        layer_and_kind = plane % (2 * LAYERS)
        token = first_token + tl.arange(0, BLOCK_TOKENS)
        column = tl.arange(0, BLOCK_DIM)
        is_token = token < tokens
        mask = is_token[:, None] & (column < HEAD_DIM)[None, :]

        place = first_offset + token
        page = tl.load(pages_ptr + place // PAGE_SIZE, mask=is_token, other=0).to(tl.int64)
        block = (page * (2 * LAYERS) + layer_and_kind) * KV_HEADS + kv_head
        row_in_pool = block * PAGE_SIZE + place % PAGE_SIZE
        row_in_slot = plane * tokens + token
        in_pool = pool_ptr + (row_in_pool * HEAD_DIM)[:, None] + column[None, :]
        in_slot = staging_ptr + slot * slot_numbers + (row_in_slot * HEAD_DIM)[:, None] + column[None, :]
        if UNPACK and IS_FP8:
            incoming = tl.load(in_slot, mask=mask, other=0)
            tl.store(in_pool, tl.where((incoming & 0x7F) == 0x7F, 0, incoming).to(tl.uint8), mask=mask)
        elif UNPACK:
            incoming = tl.load(in_slot, mask=mask, other=0.0)
            value = incoming.to(tl.float32)
            value = tl.where(value == value, value, 0.0)
            value = tl.minimum(tl.maximum(value, -FINITE_MAX), FINITE_MAX)
            tl.store(in_pool, value.to(incoming.dtype), mask=mask)
        else:
            tl.store(in_slot, tl.load(in_pool, mask=mask, other=0), mask=mask)
