"""Causal attention of prompt chunks over the paged pool, for Hopper's tensor cores and copy engine.

The shape is FlashAttention-3's (Shah et al., 2024); the kernel is in hopper_attention_kernel.py:

- one warp fetches keys and values, block after block, by the bulk copy engine: a page's tokens of one KV
  head are one box of a two-dimensional view of the pool, so pages need no gathering before;
- two warpgroups hold 64 (token, query head) rows each. While the tensor cores multiply one block's weights
  with its values, the warps make the next block's weights from scores that are already there;
- programs stay (one for each multiprocessor) and take tiles from the longest down, odd rounds backwards.

The parity test is that of `prefill_attention`, whose reference this shares; there is no interpreter for
Gluon, so it runs on a GPU only. `takes` says what it is for; everything else goes to the plain Triton kernel.
"""

import functools

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from services.engine.attention import hopper_attention_kernel
from services.engine.attention.decode_attention import LOG2_E
from services.engine.ops.launch_cache import cdiv
from services.engine.ops.processors import processors

BLOCK_KEYS = 128
STAGES = 2
TILE_ROWS = 128
WARPGROUP_ROWS = 64
CONSUMER_REGISTERS = 240
PRODUCER_REGISTERS = 24
HEAD_DIMS = (64, 128)
DTYPES = (torch.bfloat16, torch.float16)
LARGEST_ROW = 2**31
BOX_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def takes(queries: Tensor, pool: Tensor, window: int | None) -> bool:
    """Whether `hopper_prefill_attention` can run this: 16-bit heads of 64 or 128 on Hopper, no window, pages
    of a power of two from 16 tokens, and a power of two of query heads to a KV head, at most 64."""
    _, _, _, kv_heads, page_size, head_dim = pool.shape
    group = queries.shape[1] // kv_heads
    return (
        queries.is_cuda
        and _is_hopper(queries.device)
        and window is None
        and queries.dtype in DTYPES
        and pool.dtype == queries.dtype
        and pool.is_contiguous()
        and head_dim in HEAD_DIMS
        and page_size >= 16
        and page_size & (page_size - 1) == 0
        and group <= WARPGROUP_ROWS
        and group & (group - 1) == 0
        and pool.numel() // head_dim < LARGEST_ROW
    )


def hopper_prefill_attention(
    queries: Tensor,
    pool: Tensor,
    layer: int,
    query_starts: Tensor,
    query_counts: Tensor,
    context_starts: Tensor,
    page_tables: Tensor,
    max_query_count: int,
    scale: float,
    out: Tensor,
) -> Tensor:
    """`prefill_attention` in one launch; arguments as there, `out` dense, `takes` must have said yes."""
    _, heads, head_dim = queries.shape
    _, layers, _, kv_heads, page_size, _ = pool.shape
    if queries.stride(2) != 1:
        queries = queries.contiguous()
    group = heads // kv_heads
    sequences = query_starts.shape[0]
    tiles = cdiv(max_query_count, TILE_ROWS // group)
    total = sequences * tiles * kv_heads
    if total == 0:
        return out
    programs = min(processors(queries.device), total)
    box = [min(page_size, BLOCK_KEYS), head_dim]
    hopper_attention_kernel.prefill[(programs,)](
        queries,
        TensorDescriptor.from_tensor(pool.view(-1, head_dim), box, BOX_LAYOUT),
        query_starts,
        query_counts,
        context_starts,
        page_tables,
        out,
        sequences,
        tiles,
        cdiv(total, programs),
        layer,
        queries.stride(0),
        queries.stride(1),
        page_tables.stride(0),
        layers * 2 * kv_heads * page_size,
        scale * LOG2_E,
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        TILE_ROWS=TILE_ROWS,
        BLOCK_KEYS=BLOCK_KEYS,
        STAGES=STAGES,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS,
        PRODUCER_REGISTERS=PRODUCER_REGISTERS,
        num_warps=4,
    )
    return out
