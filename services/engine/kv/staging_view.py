"""The staging buffer as torch sees it: views of memory that another process owns, never copies."""

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from services.engine.errors import EngineError


class StagingError(EngineError):
    """The staging buffer could not be mapped into this process."""


def host_view(buffer: memoryview) -> Tensor:
    """uint8 view of writable host memory (a mapped staging buffer, or one slot of it). The buffer must
    outlive every use of the view; torch keeps it alive."""
    if buffer.readonly:
        raise StagingError("the staging buffer is mapped read-only")
    return torch.frombuffer(buffer, dtype=torch.uint8)


class _DeviceRegion:
    """Device memory as the array interface describes it, which torch takes without a copy."""

    def __init__(self, pointer: int, byte_count: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (byte_count,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
        }


class CudaStaging:
    """A staging buffer in device memory, opened from its owner's CUDA IPC handle.

    Maps the owner's allocation; nothing is allocated here. `close` unmaps it and is needed before the owner
    frees it: until then the owner's memory stays taken.
    """

    def __init__(self, handle: bytes, byte_count: int, device_index: int) -> None:
        """`handle`: the 64 bytes of a `CUipcMemHandle`. Raises `StagingError`."""
        from cuda.bindings import driver  # only where there is a GPU

        torch.cuda.set_device(device_index)
        torch.cuda.synchronize(device_index)  # torch's context must exist and be current for the mapping
        ipc_handle = driver.CUipcMemHandle()
        if len(handle) != len(bytes(ipc_handle.reserved)):
            raise StagingError(
                f"a CUDA IPC handle has {len(bytes(ipc_handle.reserved))} bytes, not {len(handle)}"
            )
        ipc_handle.reserved = handle
        flags = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        status, pointer = driver.cuIpcOpenMemHandle(ipc_handle, flags)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise StagingError(
                "the transfer process's staging buffer cannot be mapped by CUDA IPC "
                f"({status.name}): both must see the same GPUs (here --device-index {device_index}), and in "
                "containers share IPC and PID namespaces"
            )
        self._driver = driver
        self._pointer = pointer
        self._open = True
        region = _DeviceRegion(int(pointer), byte_count)
        self.view: Tensor = torch.as_tensor(region, device=torch.device("cuda", device_index))
        """uint8 `[byte_count]` on the device."""

    def close(self) -> None:
        """Unmap after the device has finished with it. Idempotent; the view must not be used afterwards."""
        if not self._open:
            return
        self._open = False
        torch.cuda.synchronize()
        (status,) = self._driver.cuIpcCloseMemHandle(self._pointer)
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise StagingError(f"cuIpcCloseMemHandle failed: {status.name}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
