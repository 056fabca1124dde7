"""Writing new tokens' keys and values into the paged pool."""

from torch import Tensor


def write_kv(layer_rows: Tensor, write_index: Tensor, kv: Tensor) -> None:
    """Scatter `kv` `[tokens, 2 * kv_heads, head_dim]` (keys first) into the pool.

    `layer_rows` is the pool seen from one layer as rows of head_dim (`KvPool.layer_rows`), `write_index`
    int64 `[tokens * 2 * kv_heads]` the row of each head. What overflowed is stored as a finite number: the
    attention multiplies masked positions by zero, and a pool that holds no NaN cannot carry one from a
    request into the next user of its pages.
    """
    layer_rows.index_copy_(0, write_index, kv.reshape(-1, kv.shape[-1]).nan_to_num())
