"""Pack and unpack: between pages and the canonical form KV travels in,
`[kv_head][layer][k|v][token][head_dim]`, dense over a run of tokens.

Heads come first so that a tensor-parallel rank's share is one contiguous range whatever the two sides'
page sizes are. CUDA tensors go to the kernels, one launch each way; others to the references,
also when only the slot is in host memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.fp8 import FP8, FP8_NAN, as_bytes

TILE_BYTES = 16 << 10
"""What one program copies: whole rows of head_dim of one head, layer and kind."""


def pack_segment(
    pool: Tensor, pages: Tensor, first_offset: int, segment: Tensor, first_head: int = 0
) -> None:
    """Gather tokens from `pages` into `segment`.

    `pool` is `[pool pages, layers, 2, kv_heads, page_size, head_dim]`, `segment`
    `[heads, layers, 2, tokens, head_dim]` of the same dtype; its first head is the pool's `first_head`, its
    first token number `first_offset` of `pages[0]`. `pages` is int64 and covers the tokens exactly.
    """
    if pool.is_cuda and segment.is_cuda:
        pack_segment_kernel(pool, pages, first_offset, segment, first_head)
    else:
        pack_segment_reference(pool, pages, first_offset, segment, first_head)


def unpack_segment(
    pool: Tensor, pages: Tensor, first_offset: int, segment: Tensor, first_head: int = 0
) -> None:
    """Scatter `segment` into `pages`: the inverse of `pack_segment`. Tokens of the first and last page that
    lie outside the segment keep their values. Non-finite numbers are stored as finite ones (see kv_write),
    in fp8 its only NaN as 0."""
    if pool.is_cuda and segment.is_cuda:
        unpack_segment_kernel(pool, pages, first_offset, segment, first_head)
    else:
        unpack_segment_reference(pool, pages, first_offset, segment, first_head)


def pack_segment_reference(
    pool: Tensor, pages: Tensor, first_offset: int, segment: Tensor, first_head: int = 0
) -> None:
    """`pack_segment` by torch operations."""
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
    """`unpack_segment` by torch operations."""
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


def pack_segment_kernel(
    pool: Tensor, pages: Tensor, first_offset: int, segment: Tensor, first_head: int = 0
) -> None:
    """`pack_segment` in one launch."""
    _launch(pool, pages, first_offset, segment, first_head, False)


def unpack_segment_kernel(
    pool: Tensor, pages: Tensor, first_offset: int, segment: Tensor, first_head: int = 0
) -> None:
    """`unpack_segment` in one launch; a page's other tokens are not touched, not even read."""
    _launch(pool, pages, first_offset, segment, first_head, True)


def _launch(
    pool: Tensor, pages: Tensor, first_offset: int, segment: Tensor, first_head: int, unpack: bool
) -> None:
    """Raises ValueError on a layout the kernel cannot take."""
    _, layers, _, kv_heads, page_size, head_dim = pool.shape
    heads, tokens = segment.shape[0], segment.shape[3]
    fits = first_head >= 0 and first_head + heads <= kv_heads
    if not fits or segment.shape[1:] != (layers, 2, tokens, head_dim) or segment.dtype != pool.dtype:
        raise ValueError(f"segment {tuple(segment.shape)} does not go with a pool {tuple(pool.shape)}")
    if not (pool.is_contiguous() and segment.is_contiguous() and pages.is_contiguous()):
        raise ValueError("pool, pages and segment must be contiguous")
    if not 0 <= pages.numel() * page_size - first_offset - tokens < page_size or first_offset >= page_size:
        raise ValueError(f"{pages.numel()} pages do not exactly cover {tokens} tokens from {first_offset}")
    block_dim = triton.next_power_of_2(head_dim)
    block_tokens = max(1, TILE_BYTES // (block_dim * pool.element_size()))
    block_tokens = min(block_tokens, triton.next_power_of_2(tokens))
    is_fp8 = pool.dtype == FP8
    _move[(heads * layers * 2, triton.cdiv(tokens, block_tokens))](
        as_bytes(pool),
        pages,
        as_bytes(segment),
        first_offset,
        tokens,
        first_head,
        KV_HEADS=kv_heads,
        LAYERS=layers,
        PAGE_SIZE=page_size,
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim,
        BLOCK_TOKENS=block_tokens,
        UNPACK=unpack,
        IS_FP8=is_fp8,
        FINITE_MAX=torch.finfo(pool.dtype).max,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["first_offset", "tokens", "first_head"])
def _move(
    pool_ptr: tl.tensor,
    pages_ptr: tl.tensor,
    segment_ptr: tl.tensor,
    first_offset: tl.tensor,
    tokens: tl.tensor,
    first_head: tl.tensor,
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
    plane = tl.program_id(0).to(tl.int64)  # (head * LAYERS + layer) * 2 + kind, as in the segment
    kv_head = first_head + plane // (2 * LAYERS)
    layer_and_kind = plane % (2 * LAYERS)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = tl.arange(0, BLOCK_DIM)
    is_token = token < tokens
    mask = is_token[:, None] & (column < HEAD_DIM)[None, :]

    place = first_offset + token
    page = tl.load(pages_ptr + place // PAGE_SIZE, mask=is_token, other=0).to(tl.int64)
    block = (page * (2 * LAYERS) + layer_and_kind) * KV_HEADS + kv_head
    in_pool = pool_ptr + ((block * PAGE_SIZE + place % PAGE_SIZE) * HEAD_DIM)[:, None] + column[None, :]
    in_segment = segment_ptr + ((plane * tokens + token) * HEAD_DIM)[:, None] + column[None, :]
    if UNPACK and IS_FP8:
        incoming = tl.load(in_segment, mask=mask, other=0)
        tl.store(in_pool, tl.where((incoming & 0x7F) == 0x7F, 0, incoming).to(tl.uint8), mask=mask)
    elif UNPACK:
        incoming = tl.load(in_segment, mask=mask, other=0.0)
        value = incoming.to(tl.float32)
        value = tl.where(value == value, value, 0.0)
        value = tl.minimum(tl.maximum(value, -FINITE_MAX), FINITE_MAX)
        tl.store(in_pool, value.to(incoming.dtype), mask=mask)
    else:
        tl.store(in_segment, tl.load(in_pool, mask=mask, other=0), mask=mask)
