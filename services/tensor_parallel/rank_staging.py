"""The staging buffer as slots in a rank beside the first, which has no link to its transfer process."""

import mmap
from pathlib import Path

from kvtransfer.buffer.staging import receive_staging
from services.engine.kv.segments import SlotBuffer
from services.engine.kv.staging_view import CudaStaging, StagingError
from services.tensor_parallel.messages import MapStaging


class RankStaging:
    """It maps the buffer that the leading rank names."""

    MAP_TIMEOUT_S = 2.0

    def __init__(self, device_index: int) -> None:
        self._device_index = device_index
        self._opened: CudaStaging | None = None
        self._map: mmap.mmap | None = None
        self._slots = self._slot_bytes = 0

    def map(self, command: MapStaging) -> None:
        """Raises StagingError or TransferConfigError if it cannot be mapped."""
        self.close()
        size_bytes = command.slots * command.slot_bytes
        self._slots, self._slot_bytes = command.slots, command.slot_bytes
        if command.cuda_ipc_handle is not None:
            self._opened = CudaStaging(command.cuda_ipc_handle, size_bytes, self._device_index)
        elif command.staging_socket is not None:
            self._map = receive_staging(Path(command.staging_socket), size_bytes, self.MAP_TIMEOUT_S)

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
