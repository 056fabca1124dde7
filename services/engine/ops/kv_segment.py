"""Pack and unpack: between pages and the canonical form KV travels in,
`[kv_head][layer][k|v][token][head_dim]`, dense over a run of tokens.

Heads come first so that a tensor-parallel rank's share is one contiguous range whatever the two sides'
page sizes are.
"""

import torch
from torch import Tensor


def pack_segment(pool: Tensor, pages: Tensor, first_offset: int, segment: Tensor) -> None:
    """Gather tokens from `pages` into `segment`.

    `pool` is `[pool pages, layers, 2, kv_heads, page_size, head_dim]`, `segment`
    `[kv_heads, layers, 2, tokens, head_dim]` of the same dtype; its first token is number `first_offset` of
    `pages[0]`. `pages` is int64 and covers the tokens exactly.
    """
    tokens = segment.shape[3]
    kv_heads, layers, _, _, head_dim = segment.shape
    gathered = pool.index_select(0, pages).permute(3, 1, 2, 0, 4, 5)
    if first_offset == 0 and tokens == pages.numel() * pool.shape[4]:
        segment.view(kv_heads, layers, 2, pages.numel(), -1, head_dim).copy_(gathered)
    else:
        dense = gathered.reshape(kv_heads, layers, 2, -1, head_dim)
        segment.copy_(dense[:, :, :, first_offset : first_offset + tokens])


def unpack_segment(pool: Tensor, pages: Tensor, first_offset: int, segment: Tensor) -> None:
    """Scatter `segment` into `pages`: the inverse of `pack_segment`. Tokens of the first and last page that
    lie outside the segment keep their values. Non-finite numbers are stored as finite ones (see kv_write)."""
    tokens = segment.shape[3]
    kv_heads, layers, _, _, head_dim = segment.shape
    page_size = pool.shape[4]
    incoming = segment.nan_to_num()
    if first_offset == 0 and tokens == pages.numel() * page_size:
        by_page = incoming.view(kv_heads, layers, 2, pages.numel(), page_size, head_dim)
        pool.index_copy_(0, pages, by_page.permute(3, 1, 2, 0, 4, 5))
        return
    current = pool.index_select(0, pages)
    dense = current.permute(3, 1, 2, 0, 4, 5).reshape(kv_heads, layers, 2, -1, head_dim)
    dense[:, :, :, first_offset : first_offset + tokens] = incoming
    by_page = dense.view(kv_heads, layers, 2, pages.numel(), page_size, head_dim)
    pool.index_copy_(0, pages, by_page.permute(3, 1, 2, 0, 4, 5))


def index_of(pages: list[int], device: torch.device) -> Tensor:
    return torch.tensor(pages, dtype=torch.int64, device=device)
