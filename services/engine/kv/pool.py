"""The paged KV pool: `[pages, layers, 2, kv_heads, page_size_tokens, head_dim]`.

One page is contiguous over all layers, so that packing, copying and freeing deal in large runs; a layer's
attention sees the same memory through a view that starts at that layer.

In fp8 a number lies divided by its head's scale (kv_scales.py); the scales lie beside the pool.
"""

import torch
from torch import Tensor

from services.engine.errors import SegmentError
from services.engine.host_copy import indices, to_device
from services.engine.kv.layout import KvLayout
from services.engine.ops.fp8 import as_bytes


class KvPool:
    """Holds KV; who owns which page is the scheduler's business. Starts zeroed, and stays finite."""

    def __init__(
        self,
        layout: KvLayout,
        pages: int,
        dtype: torch.dtype,
        device: torch.device,
        scales: Tensor | None = None,
    ) -> None:
        """`scales`: with fp8, float32 `[layers, 2, kv_heads]` on the device; else None."""
        self.layout = layout
        self.scales = scales
        self.pages = pages
        self.data = torch.zeros(
            (pages, layout.layers, 2, layout.kv_heads, layout.page_size_tokens, layout.head_dim),
            dtype=dtype,
            device=device,
        )
        rows = self.data.view(-1, layout.head_dim)
        blocks = self.data.view(-1, layout.page_size_tokens * layout.head_dim)
        layer_blocks = 2 * layout.kv_heads
        self.layer_rows = [
            rows[layer * layer_blocks * layout.page_size_tokens :] for layer in range(layout.layers)
        ]
        """For each layer the pool as rows of head_dim: row `((page * layers * 2 + kv) * kv_heads + head) *
        page_size_tokens + offset` is one head of one token."""
        self.layer_blocks = [blocks[layer * layer_blocks :] for layer in range(layout.layers)]
        """For each layer the pool as rows of page_size_tokens * head_dim: one head of one page."""

    def layer_scales(self, layer: int) -> Tensor | None:
        """What the layer's stored numbers are multiplied with, float32 `[2, kv_heads]`, keys first; None
        where they are stored as they are."""
        return None if self.scales is None else self.scales[layer]

    @staticmethod
    def page_bytes(layout: KvLayout, dtype: torch.dtype) -> int:
        return (
            layout.layers * 2 * layout.kv_heads * layout.page_size_tokens * layout.head_dim * dtype.itemsize
        )

    @property
    def byte_count(self) -> int:
        return self.data.numel() * self.data.element_size()

    def copy_pages(self, pairs: list[tuple[int, int]]) -> None:
        """Copy whole pages, `(source, destination)` each; no destination may also be a source."""
        if not pairs:
            return
        sources, destinations = [source for source, _ in pairs], [destination for _, destination in pairs]
        for page in (*sources, *destinations):
            if not 0 <= page < self.pages:
                raise SegmentError(f"page {page} out of range: the pool has {self.pages}")
        if set(sources) & set(destinations) or len(set(destinations)) != len(destinations):
            raise SegmentError("page copies overlap")
        columns = {"from": indices(sources), "to": indices(destinations)}
        sent = to_device(columns, self.data.device)
        data = as_bytes(self.data)
        data.index_copy_(0, sent["to"], data.index_select(0, sent["from"]))
