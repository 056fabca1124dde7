"""NCCL's C library, for pairs of processes: the part that the mover needs, without importing torch.

Communicators never block: a call that has not finished answers "in progress", and `finished` asks again.
Layouts and values are those of nccl.h; the configuration is the part that every version since 2.17 reads.
"""

import ctypes
import ctypes.util
import importlib.util
import os
from collections.abc import MutableMapping
from pathlib import Path

from kvtransfer.errors import MoverError

SUCCESS, IN_PROGRESS = 0, 7
INT8 = 0
UNIQUE_ID_BYTES = 128
UNDEFINED = -(2**31)
CONFIG_MAGIC, CONFIG_VERSION = 0xCAFEBEEF, 21700
MOST_THREAD_BLOCKS = 8
"""A communicator's kernels take at most so many SMs from the worker beside."""
RANKS = 2


class NcclError(MoverError):
    """NCCL has refused a call, or a communicator has failed."""


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_char * UNIQUE_ID_BYTES),)


class _Config(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
        ("net_name", ctypes.c_char_p),
    )


def find_nccl() -> str | None:
    """Path or name of libnccl.so.2: the package's, or the system's. Loads nothing."""
    if importlib.util.find_spec("nvidia") is not None:
        spec = importlib.util.find_spec("nvidia.nccl")
        for directory in [] if spec is None else spec.submodule_search_locations or []:
            library = Path(directory) / "lib" / "libnccl.so.2"
            if library.is_file():
                return str(library)
    return ctypes.util.find_library("nccl")


def prepare_environment(environment: MutableMapping[str, str], *, same_host: bool) -> None:
    """Sets NCCL's network interface, unless the user has chosen. To be called before the library is loaded.
    NCCL opens a port for two ranks to meet: on one host not outwards."""
    if same_host:
        environment.setdefault("NCCL_SOCKET_IFNAME", "lo")


class NcclLibrary:
    """The loaded library. Raises NcclError where libnccl cannot be loaded."""

    def __init__(self, *, same_host: bool) -> None:
        prepare_environment(os.environ, same_host=same_host)
        path = find_nccl()
        if path is None:
            raise NcclError("libnccl.so.2 is not found (package nvidia-nccl-cu13)")
        try:
            self._nccl = nccl = ctypes.CDLL(path)
        except OSError as error:
            raise NcclError(f"{path} cannot be loaded: {error}") from error
        nccl.ncclGetErrorString.restype = ctypes.c_char_p
        nccl.ncclGetLastError.restype = ctypes.c_char_p
        nccl.ncclGetLastError.argtypes = [ctypes.c_void_p]
        nccl.ncclCommInitRankConfig.argtypes = [
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.c_int,
            _UniqueId,
            ctypes.c_int,
            ctypes.POINTER(_Config),
        ]
        nccl.ncclCommGetAsyncError.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)]
        nccl.ncclCommAbort.argtypes = [ctypes.c_void_p]
        for call in (nccl.ncclSend, nccl.ncclRecv):
            call.argtypes = [
                ctypes.c_void_p,
                ctypes.c_size_t,
                ctypes.c_int,
                ctypes.c_int,
                ctypes.c_void_p,
                ctypes.c_void_p,
            ]

    def unique_id(self) -> bytes:
        """The id of a new pair; the process that asks for it also listens for the other."""
        unique_id = _UniqueId()
        self._check(self._nccl.ncclGetUniqueId(ctypes.byref(unique_id)), "ncclGetUniqueId", None)
        return ctypes.string_at(ctypes.addressof(unique_id), UNIQUE_ID_BYTES)

    def join(self, unique_id: bytes, rank: int) -> int:
        """Begins to join the pair on the current device; `finished` answers when both have."""
        if len(unique_id) != UNIQUE_ID_BYTES:
            raise NcclError(f"a unique id has {UNIQUE_ID_BYTES} bytes, not {len(unique_id)}")
        name = _UniqueId()
        ctypes.memmove(ctypes.addressof(name), unique_id, UNIQUE_ID_BYTES)
        config = _Config(ctypes.sizeof(_Config), CONFIG_MAGIC, CONFIG_VERSION, 0)
        config.cga_cluster_size, config.min_ctas, config.max_ctas = UNDEFINED, UNDEFINED, MOST_THREAD_BLOCKS
        comm = ctypes.c_void_p()
        status = self._nccl.ncclCommInitRankConfig(
            ctypes.byref(comm), RANKS, name, rank, ctypes.byref(config)
        )
        self._check(status, "ncclCommInitRankConfig", comm.value)
        if comm.value is None:
            raise NcclError("ncclCommInitRankConfig: no communicator")
        return comm.value

    def finished(self, comm: int) -> bool:
        """Whether the communicator's last call has finished. Raises NcclError if it has failed."""
        state = ctypes.c_int()
        self._check(self._nccl.ncclCommGetAsyncError(comm, ctypes.byref(state)), "communicator", comm)
        self._check(state.value, "communicator", comm)
        return state.value != IN_PROGRESS

    def exchange(
        self, comm: int, rank: int, pieces: list[tuple[int, int]], stream: int, *, sends: bool
    ) -> bool:
        """Queues all of `(address, byte_count)` to or from the other rank as one operation. False: not
        queued yet, ask `finished`. Raises NcclError."""
        nccl = self._nccl
        call = nccl.ncclSend if sends else nccl.ncclRecv
        self._check(nccl.ncclGroupStart(), "ncclGroupStart", comm)
        try:
            for address, byte_count in pieces:
                status = call(address, byte_count, INT8, RANKS - 1 - rank, comm, stream)
                self._check(status, "ncclSend" if sends else "ncclRecv", comm)
        finally:
            ended = nccl.ncclGroupEnd()
        self._check(ended, "ncclGroupEnd", comm)
        return bool(ended != IN_PROGRESS) and self.finished(comm)

    def abort(self, comm: int) -> None:
        """Stops its kernels and frees it; may take a while. Nothing of it is in flight afterwards."""
        self._check(self._nccl.ncclCommAbort(comm), "ncclCommAbort", None)

    def _check(self, status: int, what: str, comm: int | None) -> None:
        if status in (SUCCESS, IN_PROGRESS):
            return
        words = self._nccl.ncclGetErrorString(status).decode(errors="replace")
        last = (self._nccl.ncclGetLastError(comm) or b"").decode(errors="replace").strip()
        raise NcclError(f"{what}: {words}{f' ({last})' if last else ''}")
