"""Writing new tokens' keys and values into the paged pool."""

from torch import Tensor

from services.engine.ops.fp8 import as_bytes, to_fp8


def write_kv(layer_rows: Tensor, write_index: Tensor, kv: Tensor, kv_scales: Tensor | None = None) -> None:
    """Scatter `kv` `[tokens, 2 * kv_heads, head_dim]` (keys first) into the pool; rows below 0 are left out.

    `layer_rows` is the pool seen from one layer as rows of head_dim (`KvPool.layer_rows`), `write_index`
    int64 `[tokens * 2 * kv_heads]` the row of each head. What overflowed is stored as a finite number: the
    attention multiplies masked positions by zero, and a pool that holds no NaN cannot carry one from a
    request into the next user of its pages. With `kv_scales` (`KvPool.layer_scales`) it is stored in fp8,
    divided by its head's scale, and what is too large for that saturates.
    """
    stored = kv.nan_to_num() if kv_scales is None else to_fp8(kv, kv_scales.view(1, -1, 1))
    written = write_index >= 0
    rows = as_bytes(stored).view(-1, kv.shape[-1])[written]
    as_bytes(layer_rows).index_copy_(0, write_index[written], rows)
