"""Root-mean-square normalisation (Zhang and Sennrich, 2019), alone and joined with the residual add."""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of `x` `[..., size]` by `weight` `[size]`."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(rms_norm(x + residual), x + residual)`, both `[tokens, size]`. `residual` is overwritten."""
    residual.add_(x)
    return F.rms_norm(residual, (x.shape[-1],), weight, eps), residual


def head_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise every head of `x` `[tokens, heads, head_dim]` by its own row of `weight` `[heads, head_dim]`.

    Query and key heads lie in one tensor, so one call does the QK-norm of both.
    """
    return F.rms_norm(x, (x.shape[-1],), None, eps).mul_(weight)
