"""Applying the rotary embedding to query and key heads."""

import torch
from torch import Tensor


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `heads` `[tokens, heads, head_dim]`, each first half against its second half.

    `cos` and `sin` are float32 `[tokens, 1, head_dim]` with the first half of `sin` negated (rope.py). The
    sum is done in float32 and rounded once.
    """
    swapped = torch.roll(heads, heads.shape[-1] // 2, -1)
    return torch.addcmul(heads * cos, swapped.to(cos.dtype), sin).to(heads.dtype)
