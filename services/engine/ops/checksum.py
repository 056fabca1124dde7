"""A fast order-sensitive 63-bit checksum of a slot, the same on every device.

To each 64-bit word a key of its place is added; then it is twice multiplied and folded (its upper half onto
its lower); the words of a block are summed and the blocks chained. A change of one word always changes the
sum, each step being a bijection of the word; swaps change it because the key goes in before the folds; a
truncation because the length goes in last. One fold would not do: flips of two top bits would cancel half
the time. It finds accidents (torn, short, swapped or stale data), not forgeries.

The words are a device's work, the chain over the blocks is the host's: on a GPU the blocks' sums are queued
and copied behind whatever wrote the slot, and the host chains them once they are there.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.host_copy import to_host

_WORD_KEY = 0x9E3779B97F4A7C15
_MULTIPLIER = 0xD6E8FEB86659FD93
_CHAIN = 0xC2B2AE3D27D4EB4F
_MASK = (1 << 64) - 1
BLOCK_WORDS = 1 << 15
"""256 KiB: the intermediate results of a block stay in a core's second-level cache."""
PART_WORDS = 1 << 12
"""What one program of the kernel sums."""


@dataclass(frozen=True, slots=True)
class QueuedChecksum:
    """`sums`: int64 `[blocks, parts]` in host memory, each block's sum in parts."""

    byte_count: int
    sums: Tensor

    def value(self) -> int:
        """In `[0, 2**63)`. To be asked once an event that was recorded after the call that made it has
        passed; on a CPU at once."""
        total = 0
        for parts in self.sums.tolist():
            total = (_mixed(total ^ (sum(parts) & _MASK)) * _CHAIN) & _MASK
        return _mixed(total ^ (self.byte_count * _WORD_KEY & _MASK)) >> 1


def queue_checksum(data: Tensor) -> QueuedChecksum:
    """Checksum of uint8 `[bytes]`, queued on the current stream; the host waits for nothing."""
    byte_count = data.numel()
    if data.is_cuda and byte_count % 8 == 0:
        return QueuedChecksum(byte_count, to_host(block_sums_kernel(data.view(torch.int64))))
    whole = byte_count - byte_count % (8 * BLOCK_WORDS)
    sums = []
    if whole:
        sums.append(block_sums_reference(data[:whole].view(torch.int64)))
    if whole < byte_count:
        padded = torch.zeros(-(-(byte_count - whole) // 8) * 8, dtype=torch.uint8, device=data.device)
        padded[: byte_count - whole] = data[whole:]
        sums.append(block_sums_reference(padded.view(torch.int64)))
    return QueuedChecksum(byte_count, to_host(torch.cat(sums)))


def checksum(data: Tensor) -> int:
    """Checksum of uint8 `[bytes]`, waited for."""
    queued = queue_checksum(data)
    if data.is_cuda:
        torch.cuda.current_stream(data.device).synchronize()
    return queued.value()


def block_sums_reference(words: Tensor) -> Tensor:
    """Sums of the blocks of int64 `[words]`, whole blocks or a single one, as int64 `[blocks, 1]`."""
    blocks = words.view(-1, min(words.shape[0], BLOCK_WORDS))
    keys, multiplier = _keys(words.device)[: blocks.shape[1]], _signed(_MULTIPLIER)
    sums = torch.empty((blocks.shape[0], 1), dtype=torch.int64, device=words.device)
    mixed = torch.empty_like(keys)
    for block, into in zip(blocks, sums, strict=True):
        torch.add(block, keys, out=mixed)
        _mix(mixed, multiplier)
        into.copy_(mixed.sum())
    return sums


def block_sums_kernel(words: Tensor) -> Tensor:
    """Sums of the blocks of int64 `[words]`, the last of which may be short, as int64 `[blocks, parts]`; in
    one launch, and with no memory but the result's."""
    blocks = triton.cdiv(words.shape[0], BLOCK_WORDS)
    parts = BLOCK_WORDS // PART_WORDS
    sums = torch.empty((blocks, parts), dtype=torch.int64, device=words.device)
    _sum_parts[(blocks * parts,)](
        words,
        sums,
        words.shape[0],
        PARTS=parts,
        PART_WORDS=PART_WORDS,
        WORD_KEY=_signed(_WORD_KEY),
        MULTIPLIER=_signed(_MULTIPLIER),
        num_warps=8,
    )
    return sums


@triton.jit(do_not_specialize=["words"])
def _sum_parts(
    words_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    words: tl.tensor,
    PARTS: tl.constexpr,
    PART_WORDS: tl.constexpr,
    WORD_KEY: tl.constexpr,
    MULTIPLIER: tl.constexpr,
) -> None:
    part = tl.program_id(0).to(tl.int64)
    in_part = tl.arange(0, PART_WORDS)
    at = part * PART_WORDS + in_part
    place = (part % PARTS) * PART_WORDS + in_part + 1
    word = tl.load(words_ptr + at, mask=at < words, other=0) + place * WORD_KEY
    word = word * MULTIPLIER
    word = word ^ ((word >> 32) & 0xFFFFFFFF)
    word = word * MULTIPLIER
    word = word ^ ((word >> 32) & 0xFFFFFFFF)
    tl.store(sums_ptr + part, tl.sum(tl.where(at < words, word, 0), 0))


def _mix(words: Tensor, multiplier: int) -> None:
    """In place. Folds through a view as halves, since torch shifts signed words arithmetically."""
    halves = words.view(torch.int32).view(*words.shape, 2)
    lower, upper = halves[..., 0], halves[..., 1]  # little-endian, as every device here is
    for _ in range(2):
        words.mul_(multiplier)
        lower.bitwise_xor_(upper)


@lru_cache(maxsize=64)
def _keys(device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept and used in both modes
        return torch.arange(1, BLOCK_WORDS + 1, dtype=torch.int64, device=device) * _signed(_WORD_KEY)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _mixed(value: int) -> int:
    value = ((value ^ (value >> 32)) * _MULTIPLIER) & _MASK
    return value ^ (value >> 29)
