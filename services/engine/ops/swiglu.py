"""The gated activation of the MLP (Shazeer, GLU Variants Improve Transformer, 2020)."""

import torch.nn.functional as F
from torch import Tensor


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` for `gate_up` `[tokens, 2 * size]`, gate first; returns `[tokens, size]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
