"""Whose device buffer a worker maps, and that it lets go of a dead one."""

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from kvtransfer.errors import AttachError
from services.transfer import staging as module
from services.transfer.staging import StagingSlots

SLOT_BYTES = 4


class Mapping:
    """Stands for a mapped buffer: knows its handle and whether it is mapped."""

    mapped: ClassVar[list[bytes]] = []

    def __init__(self, handle: bytes, byte_count: int, device_index: int) -> None:
        self.handle, self.view = handle, bytes(range(byte_count))
        self.mapped.append(handle)

    def close(self) -> None:
        self.mapped.remove(self.handle)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(module, "CudaStaging", Mapping)
    monkeypatch.setattr(Mapping, "mapped", [])
    return SimpleNamespace(
        attached=SimpleNamespace(cuda_ipc_handle=b"first"),
        address=SimpleNamespace(epoch=1),
        slots=3,
        slot_bytes=SLOT_BYTES,
    )


def test_it_is_mapped_at_start_and_once(client: Any) -> None:
    staging = StagingSlots(client, 0)
    assert Mapping.mapped == []
    staging.open()
    assert Mapping.mapped == [b"first"]
    slots = staging.slots()
    assert slots.memory == bytes(range(12)) and slots.slot_bytes == SLOT_BYTES  # type: ignore[comparison-overlap]
    assert Mapping.mapped == [b"first"]


def test_a_dead_buffer_is_let_go_and_the_next_one_mapped_when_needed(client: Any) -> None:
    staging = StagingSlots(client, 0)
    staging.open()
    staging.close()
    assert Mapping.mapped == []
    staging.close()
    client.attached.cuda_ipc_handle, client.address.epoch = b"second", 2
    staging.slots()
    assert Mapping.mapped == [b"second"]


def test_host_memory_is_not_mapped_here(client: Any) -> None:
    client.attached.cuda_ipc_handle = None
    client.staging = memoryview(bytearray(12))
    staging = StagingSlots(client, 0)
    staging.open()
    assert staging.slots().memory is client.staging and staging.slots().slots == 3
    assert Mapping.mapped == []
    client.staging = None
    with pytest.raises(AttachError, match="no host staging buffer"):
        staging.slots()
