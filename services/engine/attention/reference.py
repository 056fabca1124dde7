"""Attention over keys and values that lie in pages (Kwon et al., PagedAttention, 2023).

The reference gathers a span's pages and multiplies in float32. A span is a group of queries that see the
same number of pages: a group of decoding sequences, or a run of one prefill chunk (plan.py). Long
spans go in blocks of keys with a running softmax (Dao et al., FlashAttention, 2022), so that memory does
not grow with the context.
"""

import torch
from torch import Tensor

from services.engine.attention.plan import AttentionSpan
from services.engine.ops.fp8 import as_bytes


def paged_attention(
    queries: Tensor,
    layer_blocks: Tensor,
    spans: list[AttentionSpan],
    scale: float,
    kv_scales: Tensor | None = None,
) -> Tensor:
    """`[tokens, heads, head_dim]` to the same shape and dtype.

    `layer_blocks` is the pool seen from one layer as rows of page_size * head_dim (`KvPool.layer_blocks`).
    Every token belongs to exactly one span. `kv_scales` is `KvPool.layer_scales`.
    """
    if len(spans) == 1:
        return _attend(queries, layer_blocks, spans[0], scale, kv_scales)
    out = torch.empty_like(queries)
    for span in spans:
        out[span.first : span.end] = _attend(
            queries[span.first : span.end], layer_blocks, span, scale, kv_scales
        )
    return out


def _attend(
    queries: Tensor, layer_blocks: Tensor, span: AttentionSpan, scale: float, kv_scales: Tensor | None
) -> Tensor:
    tokens, heads, head_dim = queries.shape
    sequences, kv_heads = span.sequences, span.kv_heads
    # [sequences, kv_heads, group * tokens of each, head_dim]: queries that share a KV head share one product
    grouped = (queries.float() * scale).view(sequences, tokens // sequences, kv_heads, -1, head_dim)
    grouped = grouped.permute(0, 2, 3, 1, 4).reshape(sequences, kv_heads, -1, head_dim)

    if len(span.key_blocks) == 1:
        scores, values = _scores(grouped, layer_blocks, span, 0, kv_scales)
        mixed = torch.matmul(scores.softmax(dim=-1), values)
    else:
        mixed = _running_softmax(grouped, layer_blocks, span, kv_scales)

    mixed = mixed.view(sequences, kv_heads, -1, tokens // sequences, head_dim).permute(0, 3, 1, 2, 4)
    return mixed.reshape(tokens, heads, head_dim).to(queries.dtype)


def _scores(
    grouped: Tensor, layer_blocks: Tensor, span: AttentionSpan, block: int, kv_scales: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Masked scores `[sequences, kv_heads, queries, keys]` and values of one block of keys, both float32."""
    key_block = span.key_blocks[block]
    gathered = as_bytes(layer_blocks).index_select(0, key_block.blocks).view(layer_blocks.dtype)
    kv = gathered.view(2, span.sequences, span.kv_heads, -1, grouped.shape[-1]).float()
    if kv_scales is not None:
        kv *= kv_scales.view(2, 1, span.kv_heads, 1, 1)
    scores = torch.matmul(grouped, kv[0].mT)
    if key_block.mask is not None:
        per_query = scores.view(*scores.shape[:2], -1, key_block.mask.shape[-2], scores.shape[-1])
        per_query += key_block.mask[:, None, None]
    return scores, kv[1]


def _running_softmax(
    grouped: Tensor, layer_blocks: Tensor, span: AttentionSpan, kv_scales: Tensor | None
) -> Tensor:
    """Softmax over several key blocks. Masked scores are hugely negative but finite, so a block that a
    query sees nothing of contributes garbage only until the rescaling by the first one it does see."""
    highest = total = mixed = None
    for block in range(len(span.key_blocks)):
        scores, values = _scores(grouped, layer_blocks, span, block, kv_scales)
        block_highest = scores.amax(dim=-1, keepdim=True)
        if highest is None or total is None or mixed is None:
            highest = block_highest
            weights = scores.sub_(highest).exp_()
            total, mixed = weights.sum(dim=-1, keepdim=True), torch.matmul(weights, values)
            continue
        new_highest = torch.maximum(highest, block_highest)
        shrink = (highest - new_highest).exp_()
        weights = scores.sub_(new_highest).exp_()
        total = total * shrink + weights.sum(dim=-1, keepdim=True)
        mixed = mixed * shrink + torch.matmul(weights, values)
        highest = new_highest
    if mixed is None or total is None:
        raise ValueError("a span needs at least one block of keys")
    return mixed / total
