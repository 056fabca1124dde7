"""Kernels launched by what an earlier launch compiled: right on fresh data, whatever changes in between."""

from typing import Any

import pytest
import torch
from torch import Tensor

from services.engine.ops import rms_norm, swiglu
from services.engine.ops.rms_norm import add_rms_norm
from services.engine.ops.swiglu import silu_mul

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
TOKENS = (1, 2, 15, 16, 64, 100, 513)


def fresh(tokens: int, size: int, offset: int, dtype: torch.dtype) -> Tensor:
    """Dense, and `offset` numbers behind an aligned address."""
    return torch.randn(tokens * size + offset, device="cuda").to(dtype)[offset:].view(tokens, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [96, 4096])
def test_norms_and_activations_stay_right(size: int, dtype: torch.dtype) -> None:
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for _ in range(2):
        for tokens in TOKENS:
            for offset in (0, 1):
                x, residual = (fresh(tokens, size, offset, dtype) for _ in range(2))
                weight = torch.randn(size, device="cuda").to(dtype)
                total = (x + residual).float()
                wanted = torch.nn.functional.rms_norm(total, (size,), weight.float(), 1e-6)
                normed, kept = add_rms_norm(x, residual, weight, 1e-6)
                torch.testing.assert_close(normed.float(), wanted, atol=tolerance, rtol=tolerance)
                torch.testing.assert_close(kept.float(), total, atol=tolerance, rtol=tolerance)
                gate_up = fresh(tokens, 2 * size, offset, dtype)
                gate, up = gate_up.float().chunk(2, dim=-1)
                wanted = torch.nn.functional.silu(gate) * up
                torch.testing.assert_close(silu_mul(gate_up).float(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kernel", [rms_norm._rms_norm, swiglu._silu_mul], ids=["rms_norm", "silu_mul"])
def test_triton_is_asked_once(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    function = kernel.function

    class Counted:
        arg_names = function.arg_names

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            asked.append(grid)
            return function[grid]

    monkeypatch.setattr(kernel, "function", Counted())
    monkeypatch.setattr(kernel, "_known", {})
    for tokens in (64, 100, 64, 333):
        add_rms_norm(
            *(fresh(tokens, 4096, 0, torch.bfloat16) for _ in range(2)), torch.ones(4096, device="cuda"), 1e-6
        )
        silu_mul(fresh(tokens, 8192, 0, torch.bfloat16))
    assert 1 <= len(asked) <= 3, "once for each tuned launch"
