"""The GPU of this process, by the CUDA driver API alone: memory, streams, copies, events.

No kernel is launched. One thread. `CudaDevice` makes the device's primary context current for good; every
call returns at once, but for allocation and the mapping of memory.
"""

from dataclasses import dataclass
from typing import Any

from kvtransfer.errors import TransferConfigError

NO_BINDINGS = "the package cuda-bindings is not installed"


class CudaError(TransferConfigError):
    """The driver has refused; `name` is the driver's own, such as CUDA_ERROR_OUT_OF_MEMORY."""

    def __init__(self, what: str, name: str) -> None:
        super().__init__(f"device cuda: {what}: the driver answers {name}")
        self.name = name


@dataclass(frozen=True, slots=True)
class GpuName:
    """One visible GPU. `uuid` names it on this host, whatever index a process sees it under."""

    index: int
    uuid: str


class CudaDevice:
    """Device `index` of those visible to this process. Raises TransferConfigError if it cannot be used."""

    def __init__(self, index: int) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise TransferConfigError(f"device cuda: {NO_BINDINGS} ({error})") from error
        self._driver: Any = driver
        self.index = index
        try:
            self._call(driver.cuInit(0), "start of the driver")
        except RuntimeError as error:  # What the bindings raise where there is no driver library.
            raise TransferConfigError(f"device cuda: no NVIDIA driver on this host: {error}") from error
        self._device = self._call(driver.cuDeviceGet(index), f"device_index {index}")
        self._context = self._call(driver.cuDevicePrimaryCtxRetain(self._device), "context")
        self._call(driver.cuCtxSetCurrent(self._context), "context")
        self.uuid = self._uuid(self._device)

    def close(self) -> None:
        """After everything made here is closed."""
        self._call(self._driver.cuDevicePrimaryCtxRelease(self._device), "context")

    # ------------------------------------------------------------ GPUs

    def visible(self) -> list[GpuName]:
        """All GPUs that this process sees, this one among them."""
        count = int(self._call(self._driver.cuDeviceGetCount(), "number of devices"))
        devices = [self._call(self._driver.cuDeviceGet(i), f"device {i}") for i in range(count)]
        return [GpuName(i, self._uuid(device)) for i, device in enumerate(devices)]

    def can_access(self, other_index: int) -> bool:
        """Whether this GPU can copy straight into the memory of another."""
        if other_index == self.index:
            return True
        other = self._call(self._driver.cuDeviceGet(other_index), f"device {other_index}")
        answer = self._driver.cuDeviceCanAccessPeer(self._device, other)
        return bool(self._call(answer, f"peer access to device {other_index}"))

    def _uuid(self, device: Any) -> str:
        return bytes(self._call(self._driver.cuDeviceGetUuid(device), "device UUID").bytes).hex()

    # ------------------------------------------------------------ memory

    def allocate(self, byte_count: int, what: str) -> int:
        """Address of new device memory. Raises CudaError."""
        return int(self._call(self._driver.cuMemAlloc(byte_count), f"{what}: {byte_count} bytes"))

    def free(self, address: int) -> None:
        self._call(self._driver.cuMemFree(address), "free")

    def export_memory(self, address: int) -> bytes:
        """The 64 bytes by which another process can map this allocation. Raises CudaError."""
        handle = self._call(self._driver.cuIpcGetMemHandle(address), "CUDA IPC handle")
        return bytes(handle.reserved)

    def import_memory(self, handle: bytes) -> int:
        """Maps an allocation of another process, on this or another GPU; to be unmapped. Raises CudaError."""
        driver = self._driver
        ipc_handle = driver.CUipcMemHandle()
        if len(handle) != len(bytes(ipc_handle.reserved)):
            raise CudaError("CUDA IPC handle", f"CUDA_ERROR_INVALID_VALUE ({len(handle)} bytes)")
        ipc_handle.reserved = handle
        flags = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        return int(self._call(driver.cuIpcOpenMemHandle(ipc_handle, flags), "cuIpcOpenMemHandle"))

    def unmap(self, address: int) -> None:
        self._call(self._driver.cuIpcCloseMemHandle(address), "cuIpcCloseMemHandle")

    def mapped_bytes(self, address: int) -> int | None:
        """The size of the allocation at a mapped address; None where the driver does not know."""
        error, _, byte_count = self._driver.cuMemGetAddressRange(address)
        return int(byte_count) if error == self._driver.CUresult.CUDA_SUCCESS else None

    def read(self, address: int, byte_count: int) -> bytes:
        """A copy of device memory, when all earlier work of the default stream is done."""
        buffer = bytearray(byte_count)
        self._call(self._driver.cuMemcpyDtoH(memoryview(buffer), address, byte_count), "read")
        return bytes(buffer)

    def write(self, address: int, data: bytes) -> None:
        """Fills device memory; returns when it is there.

        The copy of a few pages returns when the driver has taken the data, not when it has arrived, and
        another process's stream waits for neither.
        """
        self._call(self._driver.cuMemcpyHtoD(address, data, len(data)), "write")
        self._call(self._driver.cuCtxSynchronize(), "write")

    # ------------------------------------------------------------ work

    def new_stream(self) -> Any:
        """A stream that waits for no other, the default stream included."""
        flags = self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        return self._call(self._driver.cuStreamCreate(flags), "stream")

    def drop_stream(self, stream: Any) -> None:
        """What is queued still runs."""
        self._call(self._driver.cuStreamDestroy(stream), "stream")

    def copy(self, target: int, source: int, byte_count: int, stream: Any) -> None:
        """Queues a copy between two device addresses."""
        self._call(self._driver.cuMemcpyDtoDAsync(target, source, byte_count, stream), "copy")

    def new_event(self) -> Any:
        flags = self._driver.CUevent_flags.CU_EVENT_DISABLE_TIMING
        return self._call(self._driver.cuEventCreate(flags), "event")

    def drop_event(self, event: Any) -> None:
        self._call(self._driver.cuEventDestroy(event), "event")

    def record(self, event: Any, stream: Any) -> None:
        self._call(self._driver.cuEventRecord(event, stream), "event")

    def reached(self, event: Any) -> bool:
        """Whether everything before the event is done. Never waits. Raises CudaError: an asynchronous
        failure, after which the driver does nothing more for this process."""
        (status,) = self._driver.cuEventQuery(event)
        if status == self._driver.CUresult.CUDA_ERROR_NOT_READY:
            return False
        self._call((status,), "work queued earlier")
        return True

    def _call(self, answer: tuple[Any, ...], what: str) -> Any:
        error, *values = answer
        if error != self._driver.CUresult.CUDA_SUCCESS:
            raise CudaError(what, error.name)
        return values[0] if values else None
