"""What every registered mover's spec must do: build the mover of its name, or refuse with a reason."""

from typing import cast

import pytest

from kvtransfer.buffer.cuda import CudaDevice
from kvtransfer.errors import MoverUnavailable
from kvtransfer.movers import nccl
from kvtransfer.movers.nccl_library import NcclError
from kvtransfer.movers.registry import registered_movers
from kvtransfer.movers.spec import NOT_ON_HOST, HostFacts, MoverSetup
from tests.unit.kvtransfer.fake_gpu import FakeDevice, Host
from tests.unit.kvtransfer.fake_nccl import FakeNccl, Wire

SPECS = {spec.name: spec for spec in registered_movers()}


def on_a_gpu() -> MoverSetup:
    machine = Host()
    device = cast(CudaDevice, FakeDevice(machine, 0))
    return MoverSetup("a", True, device, machine.allocate(0, 64))


ON_THE_HOST = MoverSetup("a", True, None, None)


def test_cuda_ipc_is_built_from_the_buffer_on_the_gpu() -> None:
    mover = SPECS["cuda_ipc"].build(on_a_gpu())
    assert (mover.name, mover.agent_name) == ("cuda_ipc", "a")


def test_nccl_is_built_with_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "NcclLibrary", lambda same_host: FakeNccl(Wire()))
    mover = SPECS["nccl"].build(on_a_gpu())
    assert (mover.name, mover.agent_name) == ("nccl", "a")


def test_a_library_that_cannot_be_loaded_names_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(same_host: bool) -> FakeNccl:
        raise NcclError("libnccl.so.2 cannot be loaded")

    monkeypatch.setattr(nccl, "NcclLibrary", fails)
    with pytest.raises(MoverUnavailable, match=r"--mover nccl: libnccl\.so\.2"):
        SPECS["nccl"].build(on_a_gpu())


@pytest.mark.parametrize("name", ["cuda_ipc", "nccl"])
def test_what_moves_device_memory_alone_is_not_for_the_host(name: str) -> None:
    assert SPECS[name].why_not(HostFacts("cpu", same_host=True)) == NOT_ON_HOST
    with pytest.raises(MoverUnavailable):
        SPECS[name].build(ON_THE_HOST)


@pytest.mark.parametrize(
    ("name", "missing"), [("nixl", "nixl-cu13"), ("nccl", "nvidia-nccl-cu13"), ("cuda_ipc", None)]
)
def test_what_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, missing: str | None
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    answer = SPECS[name].missing()
    assert answer is None if missing is None else missing in (answer or "")
