"""When a launch goes through Triton, and what it is given when it does not; on a GPU in tests/gpu."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

from services.engine.ops import launch_cache as module
from services.engine.ops.launch_cache import (
    CachedKernel,
    cdiv,
    launches_as_known,
    next_power_of_2,
    warn_if_slow,
)

Grid = tuple[int, ...]


@dataclass
class Jit:
    """A kernel `(x, y, size, A, B)` as Triton has it; `launches` are (grid, arguments, constants)."""

    arg_names: tuple[str, ...] = ("x", "y", "size", "A", "B")
    launches: list[tuple[Grid, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    ran: list[tuple[Any, ...]] = field(default_factory=list)

    def __getitem__(self, grid: Grid) -> Any:
        def launch(*arguments: Any, **constants: Any) -> Any:
            self.launches.append((grid, arguments, constants))
            return SimpleNamespace(
                function="binary", packed_metadata="meta", run=lambda *given: self.ran.append(given)
            )

        return launch


class OnDevice(torch.Tensor):
    def get_device(self) -> int:  # type: ignore[override]
        return 0


def tensor(dtype: torch.dtype = torch.float32, offset: int = 0) -> torch.Tensor:
    return torch.zeros(64 + offset, dtype=dtype)[offset:].as_subclass(OnDevice)


@pytest.fixture
def jit(monkeypatch: pytest.MonkeyPatch) -> Jit:
    monkeypatch.setattr(module, "JITFunction", Jit)
    active = SimpleNamespace(get_current_stream=lambda device: f"stream {device}")
    monkeypatch.setattr(module, "driver", SimpleNamespace(active=active))
    return Jit()


def test_the_second_launch_is_given_to_what_the_first_compiled(jit: Jit) -> None:
    kernel, x, y = CachedKernel(jit), tensor(), tensor()
    kernel[(5, 2)](x, y, 48, B=8, A=4, num_warps=2)
    assert jit.launches == [((5, 2), (x, y, 48), {"B": 8, "A": 4, "num_warps": 2})] and not jit.ran
    other = tensor()
    kernel[(9,)](other, y, 32, B=8, A=4, num_warps=2)
    assert len(jit.launches) == 1
    [ran] = jit.ran
    assert ran[:9] == (9, 1, 1, "stream 0", "binary", "meta", None, None, None)
    assert ran[9] is other and ran[10] is y and ran[11:] == (32, 4, 8), "constants in the kernel's order"


@pytest.mark.parametrize(
    ("x", "size", "constants"),
    [
        (tensor(torch.int8), 48, {"A": 4, "B": 8}),
        (tensor(offset=1), 48, {"A": 4, "B": 8}),
        (tensor(), 1, {"A": 4, "B": 8}),
        (tensor(), 47, {"A": 4, "B": 8}),
        (tensor(), 1 << 32, {"A": 4, "B": 8}),
        (tensor(), 48, {"A": 8, "B": 4}),
        (tensor(), 48, {"A": 4, "B": 8, "num_warps": 8}),
    ],
    ids=["dtype", "alignment", "one", "no multiple of 16", "64 bits", "constants", "an option"],
)
def test_what_triton_compiles_anew_goes_through_it(
    jit: Jit, x: torch.Tensor, size: int, constants: dict[str, int]
) -> None:
    kernel = CachedKernel(jit)
    kernel[(1,)](tensor(), tensor(), 48, A=4, B=8)
    kernel[(1,)](x, tensor(), size, **constants)
    assert len(jit.launches) == 2 and not jit.ran
    kernel[(1,)](x, tensor(), size, **constants)
    assert len(jit.launches) == 2 and len(jit.ran) == 1


def test_this_triton_launches_as_known() -> None:
    assert CachedKernel.is_bypassing


def differently(kernel: Any, grid: Grid, stream: Any, bound_args: dict[str, Any]) -> None:
    kernel.run(*grid, stream, kernel.function, *bound_args.values())


@pytest.mark.parametrize("run", [differently, len, None])
def test_another_way_to_launch_is_not_known(run: Any) -> None:
    assert not launches_as_known(run)


def test_where_launches_are_not_known_all_go_through_triton(
    jit: Jit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    warn_if_slow()
    assert not caplog.records
    monkeypatch.setattr(CachedKernel, "is_bypassing", False)
    kernel = CachedKernel(jit)
    for _ in range(3):
        kernel[(5, 2)](tensor(), tensor(), 48, B=8, A=4, num_warps=2)
    assert len(jit.launches) == 3 and not jit.ran
    warn_if_slow()
    assert f"Triton {triton.__version__} launches kernels in a way" in caplog.text


def test_nothing_is_remembered_on_a_cpu(jit: Jit) -> None:
    kernel = CachedKernel(jit)
    for _ in range(2):
        kernel[(1,)](torch.zeros(4), torch.zeros(4), 48, A=4, B=8)
    assert len(jit.launches) == 2 and not jit.ran


def test_arithmetic_is_tritons() -> None:
    for number in range(200):
        assert next_power_of_2(number) == max(1, triton.next_power_of_2(number))
        for divisor in (1, 3, 16, 100):
            assert cdiv(number, divisor) == triton.cdiv(number, divisor)
