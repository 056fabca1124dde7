"""The linear layers, dense and in fp8: they multiply what they were filled with."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.models.linear import DenseLinear, Fp8Linear, make_linear, make_linears
from services.engine.models.parameters import FILL_ELEMENTS, Parameters
from services.engine.models.tensor_specs import Axis, linear_tensors
from services.engine.ops.fp8 import FP8, FP8_MAX, quantise_rows

CPU = torch.device("cpu")


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _linear(quantization: Any, rows: dict[str, int], columns: int) -> tuple[Any, dict[str, Tensor]]:
    specs = [
        spec
        for name, count in rows.items()
        for spec in linear_tensors(name, 0, Axis(count, "rows"), Axis(columns, "columns"), bias=True)
    ]
    parameters = Parameters(specs, torch.float32, CPU, quantization)
    layer = make_linear(parameters, *rows)
    stored = {f"{name}.weight": _random(count, columns, seed=count) for name, count in rows.items()}
    stored |= {f"{name}.bias": _random(count, seed=count + 1) for name, count in rows.items()}
    for name, values in stored.items():
        parameters.fill(name, values)
    return layer, stored


def test_a_layer_multiplies_what_it_was_filled_with() -> None:
    rows, x = {"q": 9, "k": 5}, _random(3, 40) * torch.tensor([1.0, 100.0, 0.01])[:, None]
    dense, stored = _linear("none", rows, 40)
    quantised, _ = _linear("fp8", rows, 40)
    assert isinstance(dense, DenseLinear)
    assert isinstance(quantised, Fp8Linear)
    weight = torch.cat((stored["q.weight"], stored["k.weight"])).double()
    bias = torch.cat((stored["q.bias"], stored["k.bias"])).double()
    exact = x.double() @ weight.T + bias
    torch.testing.assert_close(dense.forward(x).double(), exact, atol=1e-4, rtol=1e-5)

    def rounded(values: Tensor) -> Tensor:
        scale = values.abs().amax(dim=1, keepdim=True) / FP8_MAX
        return (values / scale).float().to(FP8).double() * scale

    expected = rounded(x.double()) @ rounded(weight).T + bias
    found = quantised.forward(x)
    assert found.dtype == x.dtype
    torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=1e-4)
    error = (found - exact).abs().amax(dim=1) / (exact - bias).abs().amax(dim=1)
    assert float(error.min()) > 1e-4  # it is fp8 indeed
    assert float(error.max()) < 0.06


def test_a_large_matrix_is_filled_and_multiplied_in_blocks() -> None:
    columns = 1 << 12
    rows = FILL_ELEMENTS // columns + 5
    layer, stored = _linear("fp8", {"down": rows}, columns)
    weight, scale = quantise_rows(stored["down.weight"])
    assert torch.equal(layer.weight.view(torch.uint8), weight.view(torch.uint8))
    assert torch.equal(layer.scale, scale)
    x, x_scale = quantise_rows(_random(2, columns))
    expected = F.linear(x.float() * x_scale, weight.float() * scale, stored["down.bias"])
    torch.testing.assert_close(layer.forward(_random(2, columns)), expected, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_layers_of_one_allocation_are_apart(quantization: Any) -> None:
    """Experts lie side by side, and each is the layer that it would be by itself."""
    names = ("a", "b", "c")
    specs = [one for name in names for one in linear_tensors(name, 0, Axis(4, "r"), Axis(6, "c"), bias=True)]
    together, x = Parameters(specs, torch.float32, CPU, quantization), _random(2, 6)
    layers = make_linears(together, [[name] for name in names])
    for name, layer in zip(names, layers, strict=True):
        apart = Parameters(specs, torch.float32, CPU, quantization)
        alone = make_linear(apart, name)
        for at, spec in enumerate(specs):
            together.fill(spec.name, _random(*spec.shape, seed=at))
            if spec.name in apart.views:
                apart.fill(spec.name, _random(*spec.shape, seed=at))
        assert torch.equal(layer.forward(x), alone.forward(x))
