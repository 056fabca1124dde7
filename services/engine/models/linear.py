"""The linear layers of a decoder, dense or quantised: each owns its parameters and multiplies.

fp8 has a scale for each row of a weight, fixed when it is loaded, and for each token, taken from it as it
comes (as vLLM's and TensorRT-LLM's dynamic per-token, per-channel fp8). On a GPU the product is cuBLAS's,
with both scales applied to its sums; elsewhere the same numbers are multiplied in float32.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.models.parameters import Parameters
from services.engine.ops.fp8 import quantise_rows
from services.engine.ops.small_gemm import small_gate_up, small_linear
from services.engine.ops.swiglu import silu_mul

REFERENCE_ELEMENTS = 1 << 20
"""Weights that the product without a GPU holds in float32 at once."""


class Linear(ABC):
    """`x @ weight.T + bias`."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """`[tokens, columns]` to `[tokens, rows]`, in x's dtype."""

    def forward_gated(self, x: Tensor) -> Tensor:
        """`silu(gate) * up`, `[tokens, rows / 2]`, of `forward`'s rows, gate first."""
        return silu_mul(self.forward(x))


class DenseLinear(Linear):
    """`weight` `[rows, columns]` and `bias` `[rows]` in the model's dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return small_linear(x, self.weight, self.bias)

    def forward_gated(self, x: Tensor) -> Tensor:
        return small_gate_up(x, self.weight, self.bias)


class Fp8Linear(Linear):
    """`weight` fp8 `[rows, columns]`, `scale` float32 `[rows, 1]`, `bias` in the model's dtype."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        self.weight, self.scale, self.bias = weight, scale, bias

    def forward(self, x: Tensor) -> Tensor:
        quantised, x_scale = quantise_rows(x)
        if not x.is_cuda:
            return fp8_product(quantised, x_scale, self.weight, self.scale, self.bias, x.dtype)
        product = torch._scaled_mm(
            quantised,
            self.weight.t(),
            scale_a=x_scale,
            scale_b=self.scale.t(),
            out_dtype=x.dtype,
            use_fast_accum=True,
        )
        # cuBLAS takes no bias beside scales of rows, for few rows at least (CUDA 13.0).
        return product if self.bias is None else product.add_(self.bias)


def fp8_product(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The reference: fp8 `x` `[tokens, columns]` and `weight` `[rows, columns]` multiplied and summed in
    float32, then scaled, `scale` and `x_scale` float32 `[.., 1]`. Rounds to `dtype` once."""
    wide = x.float()
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=dtype, device=x.device)
    step = max(1, REFERENCE_ELEMENTS // weight.shape[1])
    for first in range(0, weight.shape[0], step):
        rows = slice(first, first + step)
        product = F.linear(wide, weight[rows].float()).mul_(x_scale).mul_(scale[rows].t())
        out[:, rows] = product if bias is None else product.add_(bias[rows])
    return out


def make_linear(parameters: Parameters, *names: str) -> Linear:
    """Allocate one layer, unfilled, that holds the rows of the checkpoint's layers `names` one after the
    other, like `model.layers.0.mlp.down_proj`. It is quantised if its tensors can be and `parameters` asks
    for it, and has a bias if they have."""
    return make_linears(parameters, [names])[0]


def make_linears(parameters: Parameters, groups: Sequence[Sequence[str]]) -> list[Linear]:
    """As `make_linear`, a layer for each of `groups`, whose parameters lie one after the other in one
    allocation. All groups are of the same sizes."""
    names = [name for group in groups for name in group]
    weights = [f"{name}.weight" for name in names]
    biases: list[Tensor | None] = [None] * len(groups)
    scales: list[Tensor | None] = [None] * len(groups)
    if parameters.is_quantised(weights):
        whole, scale = parameters.quantised(*weights)
        scales = list(scale.chunk(len(groups)))
    else:
        whole = parameters.fused(*weights)
    if parameters.has(f"{names[0]}.bias"):
        biases = list(parameters.fused(*(f"{name}.bias" for name in names)).chunk(len(groups)))
    return [
        DenseLinear(weight, bias) if scale is None else Fp8Linear(weight, scale, bias)
        for weight, scale, bias in zip(whole.chunk(len(groups)), scales, biases, strict=True)
    ]
