"""The extents of the KV pool, and the arrays of indices into it. Pure."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Extents of the pool `[pages, layers, 2, kv_heads, page_size_tokens, head_dim]` but the first."""

    layers: int
    kv_heads: int
    page_size_tokens: int
    head_dim: int
