"""Small copies between host and device that nobody waits for.

A copy from ordinary memory makes the host wait for everything the device has queued. From pinned memory it
is only queued too. The pinned blocks come from torch's pool, which hands one out again only after the copies
that were queued from it are done: a step's inputs may be written while those of the step before still travel.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

POOL_BLOCK_BITS = range(9, 21)
POOL_BLOCKS = 8
"""Of each size: what a few steps in flight have, on their way to the device and back."""
ALIGNMENT_BYTES = 16
"""Of every column: kernels are compiled for aligned pointers."""

Column = npt.NDArray[np.generic]


def aligned_bytes(byte_count: int) -> int:
    return -(-byte_count // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def fill_pinned_pool(device: torch.device) -> None:
    """Has torch's pool hold blocks of every size that steps ask for, which are powers of two. To get one from
    the driver makes the host wait for all that the device has queued, in a prefill step some 50 ms."""
    if device.type == "cuda":
        sizes_bytes = [1 << bits for bits in POOL_BLOCK_BITS for _ in range(POOL_BLOCKS)]
        blocks = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes_bytes]
        del blocks  # back to the pool, together


def pinned(columns: list[Column]) -> Tensor:
    """The columns one behind the other, each aligned, as pinned uint8."""
    host = torch.empty(
        sum(aligned_bytes(column.nbytes) for column in columns), dtype=torch.uint8, pin_memory=True
    )
    raw, first = host.numpy(), 0
    for column in columns:
        raw[first : first + column.nbytes].view(column.dtype)[:] = column.reshape(-1)
        first += aligned_bytes(column.nbytes)
    return host


def to_device(columns: Mapping[str, Column], device: torch.device) -> dict[str, Tensor]:
    """The columns as tensors of the device, by one copy; on a CPU they share the columns' memory."""
    if device.type != "cuda":
        return {name: torch.from_numpy(column) for name, column in columns.items()}
    return unpacked(pinned(list(columns.values())).to(device, non_blocking=True), columns)


def unpacked(packed: Tensor, columns: Mapping[str, Column]) -> dict[str, Tensor]:
    """Views of what `pinned` made of the columns, wherever it was copied to."""
    tensors: dict[str, Tensor] = {}
    first = 0
    for name, column in columns.items():
        dtype = torch.from_numpy(column[:0]).dtype
        tensors[name] = packed[first : first + column.nbytes].view(dtype).view(column.shape)
        first += aligned_bytes(column.nbytes)
    return tensors


def to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, readable once an event that was recorded after it has passed."""
    return tensor.to("cpu", non_blocking=True) if tensor.is_cuda else tensor


def indices(values: list[int]) -> npt.NDArray[np.int64]:
    return np.array(values, dtype=np.int64)
