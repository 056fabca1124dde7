"""One slot of the staging buffer, wherever it lies: mapped host memory, or device memory opened by IPC."""

from kvtransfer.client import TransferClient
from services.engine.segments import Slot
from services.engine.staging_view import CudaStaging


class Staging:
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

    def slot(self, index: int) -> Slot:
        """The whole slot. Raises StagingError if device memory cannot be mapped."""
        handle = self._client.attached.cuda_ipc_handle
        if handle is None:
            return self._client.slot_view(index)
        size = self._client.slot_bytes
        view = self._open(handle).view
        return view[index * size : (index + 1) * size]

    def close(self) -> None:
        """Unmaps device memory; a later `slot` maps what is attached then."""
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
