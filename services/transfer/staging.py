"""The slots of the staging buffer, wherever it lies: mapped host memory, or device memory opened by IPC."""

import mmap
from pathlib import Path

from kvtransfer.buffer.staging import receive_staging
from kvtransfer.client import TransferClient
from kvtransfer.errors import AttachError
from services.engine.kv.segments import SlotBuffer
from services.engine.kv.staging_view import CudaStaging, StagingError
from services.tensor_parallel.messages import MapStaging


class StagingSlots:
    """Follows the transfer process through restarts: a new epoch means a new buffer."""

    def __init__(self, client: TransferClient, device_index: int) -> None:
        self._client = client
        self._device_index = device_index
        self._opened: CudaStaging | None = None
        self._opened_epoch = 0

    def open(self) -> None:
        """Maps device memory now, so that a host where that cannot be says so before any request. Raises
        StagingError."""
        handle = self._client.attached.cuda_ipc_handle
        if handle is not None:
            self._open(handle)

    def slots(self) -> SlotBuffer:
        """To be asked for anew each time. Raises StagingError if device memory cannot be mapped, AttachError
        if nothing is attached."""
        handle = self._client.attached.cuda_ipc_handle
        memory = self._client.staging if handle is None else self._open(handle).view
        if memory is None:
            raise AttachError("there is no host staging buffer")
        return SlotBuffer(memory, self._client.slot_bytes)

    def close(self) -> None:
        """Unmaps device memory; a later `slots` maps what is attached then."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _open(self, handle: bytes) -> CudaStaging:
        epoch = self._client.address.epoch
        if self._opened is None or self._opened_epoch != epoch:
            self.close()
            size_bytes = self._client.slots * self._client.slot_bytes
            self._opened = CudaStaging(handle, size_bytes, self._device_index)
            self._opened_epoch = epoch
        return self._opened


class RankStaging:
    """The staging buffer in a rank that has no link to its transfer process: it maps what it is told."""

    MAP_TIMEOUT_S = 2.0

    def __init__(self, device_index: int) -> None:
        self._device_index = device_index
        self._opened: CudaStaging | None = None
        self._map: mmap.mmap | None = None
        self._slots = self._slot_bytes = 0

    def map(self, order: MapStaging) -> None:
        """Raises StagingError or TransferConfigError if it cannot be mapped."""
        self.close()
        size_bytes = order.slots * order.slot_bytes
        self._slots, self._slot_bytes = order.slots, order.slot_bytes
        if order.cuda_ipc_handle is not None:
            self._opened = CudaStaging(order.cuda_ipc_handle, size_bytes, self._device_index)
        elif order.staging_socket is not None:
            self._map = receive_staging(Path(order.staging_socket), size_bytes, self.MAP_TIMEOUT_S)

    def slots(self) -> SlotBuffer:
        """To be asked for anew each time. Raises StagingError if no buffer is mapped."""
        if self._opened is not None:
            return SlotBuffer(self._opened.view, self._slot_bytes)
        if self._map is None:
            raise StagingError("no staging buffer is mapped")
        return SlotBuffer(memoryview(self._map), self._slot_bytes)

    def close(self) -> None:
        """Views of slots keep host memory mapped until they are dropped. Idempotent."""
        self._slots, self._map = 0, None
        if self._opened is not None:
            self._opened.close()
            self._opened = None
