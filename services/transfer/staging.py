"""The staging buffer of rank 0 as slots: mapped host memory, or device memory opened by IPC."""

from kvtransfer.client import TransferClient
from kvtransfer.errors import AttachError
from services.engine.kv.segments import SlotBuffer
from services.engine.kv.staging_view import CudaStaging


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
