"""The staging buffer: `slots × slot_bytes` bytes, the only memory of this process that others ever see.

Host memory is an anonymous memfd, populated at start (so that what is planned is what is used, and a lack
shows before any request), sealed against resizing (so that nobody can take it away), and handed to the
worker as a file descriptor over a UNIX socket. Nothing with a name outlives the processes.

Device memory is a plain driver allocation, handed over as a CUDA IPC handle. No kernel is ever launched.
"""

import contextlib
import ctypes
import fcntl
import logging
import mmap
import os
import socket
import struct
from pathlib import Path
from typing import Protocol
from uuid import UUID

from kvtransfer.buffer.cuda import CudaDevice, CudaError
from kvtransfer.buffer.region import Region
from kvtransfer.errors import TransferConfigError
from kvtransfer.net.keys import require_private_directory

log = logging.getLogger(__name__)

MEMFD_NAME = "baton-staging"
DEVICE_PAGE_BYTES = 2 << 20
SMAPS = Path("/proc/self/smaps")


class StagingBuffer(Protocol):
    """A staging buffer, which a mover can register. `cuda_ipc_handle` is None for host memory."""

    region: Region
    cuda_ipc_handle: bytes | None

    def resident_bytes(self) -> int:
        """Host memory of the buffer that is resident now."""

    def close(self) -> None:
        """Frees it. To be called after the mover has deregistered it. Idempotent."""


class HostStaging:
    """A staging buffer in host memory. Raises TransferConfigError if the memory is not there."""

    cuda_ipc_handle: bytes | None = None

    def __init__(self, byte_count: int) -> None:
        self.fd = os.memfd_create(MEMFD_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, byte_count)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)
            self._map = mmap.mmap(self.fd, byte_count, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError as error:
            os.close(self.fd)
            raise TransferConfigError(
                f"slots × slot_bytes: {byte_count} bytes of host memory cannot be had: {error}"
            ) from error
        self.view = memoryview(self._map)
        # The exported character pins the mapping: it cannot be closed while a mover knows its address.
        self._pin: ctypes.c_char | None = ctypes.c_char.from_buffer(self._map)
        self.region = Region(ctypes.addressof(self._pin), byte_count)

    def resident_bytes(self) -> int:
        start = f"{self.region.address:x}-"
        inside = False
        with contextlib.suppress(OSError), SMAPS.open() as lines:
            for line in lines:
                if not inside:
                    inside = line.startswith(start)
                elif line.startswith("Rss:"):
                    return int(line.split()[1]) * 1024
        return 0

    def close(self) -> None:
        if self._pin is None:
            return
        self._pin = None
        self.view.release()
        try:
            self._map.close()
        except BufferError:
            log.warning("the staging buffer is still in use at its end")
        os.close(self.fd)


class DeviceStaging:
    """A staging buffer in device memory: one driver allocation on `device`, which is closed with it.

    Raises TransferConfigError, naming the flag, if the memory is not there or cannot be shared.
    """

    def __init__(self, byte_count: int, device: CudaDevice) -> None:
        self._device = device
        # The driver shares in whole pages: rounded up, no other allocation is shared with the buffer.
        page_bytes = -(-byte_count // DEVICE_PAGE_BYTES) * DEVICE_PAGE_BYTES
        try:
            self._address = device.allocate(page_bytes, "the staging buffer")
        except CudaError as error:
            raise TransferConfigError(
                f"{error}; lower --staging-slots or --staging-slot-bytes, or the workers' --mem-fraction"
            ) from error
        try:
            self.cuda_ipc_handle: bytes | None = device.export_memory(self._address)
        except CudaError as error:
            raise TransferConfigError(
                f"{error}: this GPU's memory cannot be shared between processes by CUDA IPC, which a staging "
                "buffer on a GPU needs; run --unified workers, which need none, or --device cpu"
            ) from error
        self.region = Region(self._address, byte_count, device.index, on_device=True)
        self._open = True

    def resident_bytes(self) -> int:
        return 0

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        self._device.free(self._address)
        self._device.close()


def device_bytes_of_this_process(uuid: str) -> int | None:
    """The device memory that this process has by the driver, context included; None where the driver does not
    know."""
    import pynvml

    try:
        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{UUID(uuid)}")
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(device)
    except pynvml.NVMLError as error:
        log.debug("NVML: %s", error)
        return None
    return next((p.usedGpuMemory for p in processes if p.pid == os.getpid()), None)


class StagingSocketServer:
    """The UNIX socket server that hands the buffer's file descriptor to the worker, and to no other user."""

    def __init__(self, path: Path, fd: int) -> None:
        require_private_directory(path.parent, f"staging_socket {path}")
        self._path, self._fd = path, fd
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            # The worker endpoint beside it is ours alone already: what lies here is of a dead incarnation.
            path.unlink(missing_ok=True)
            self._socket.bind(str(path))
            self._socket.listen(8)
        except OSError as error:
            self._socket.close()
            raise TransferConfigError(f"staging_socket {path} cannot be bound: {error}") from error

    def fileno(self) -> int:
        return self._socket.fileno()

    def serve(self) -> None:
        """Answers all who wait; never blocks. Another user's process gets nothing."""
        while True:
            try:
                client, _ = self._socket.accept()
            except BlockingIOError:
                return
            with client:
                client.setblocking(False)
                credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
                pid, uid, _ = struct.unpack("3i", credentials)
                if uid != os.getuid():
                    log.warning("staging buffer refused to process %d of user %d", pid, uid)
                    continue
                try:
                    socket.send_fds(client, [b"staging"], [self._fd])
                except OSError as error:
                    log.warning("staging buffer not handed to process %d: %s", pid, error)

    def close(self) -> None:
        self._socket.close()
        self._path.unlink(missing_ok=True)


def receive_staging(path: Path, byte_count: int, timeout_s: float) -> mmap.mmap:
    """The worker's side: maps the buffer that the process at `path` hands out.

    Raises TransferConfigError if nobody answers within `timeout_s`, or with a buffer of another size.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.settimeout(timeout_s)
        try:
            client.connect(str(path))
            _, fds, _, _ = socket.recv_fds(client, 16, 1)
        except OSError as error:
            raise TransferConfigError(f"staging_socket {path}: {error}") from error
    if len(fds) != 1:
        raise TransferConfigError(f"staging_socket {path}: no buffer was handed out")
    try:
        if os.fstat(fds[0]).st_size != byte_count:
            raise TransferConfigError(f"staging_socket {path}: the buffer is not of {byte_count} bytes")
        return mmap.mmap(fds[0], byte_count, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    finally:
        os.close(fds[0])
