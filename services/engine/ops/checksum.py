"""A fast order-sensitive 63-bit checksum of a slot, the same on every device.

To each 64-bit word a key of its place is added; then it is twice multiplied and folded (its upper half onto
its lower); the words of a block are summed and the blocks chained. A change of one word always changes the
sum, each step being a bijection of the word; swaps change it because the key goes in before the folds; a
truncation because the length goes in last. One fold would not do: flips of two top bits would cancel half
the time. It finds accidents (torn, short, swapped or stale data), not forgeries.
"""

from functools import lru_cache

import torch
from torch import Tensor

_WORD_KEY = 0x9E3779B97F4A7C15
_MULTIPLIER = 0xD6E8FEB86659FD93
_CHAIN = 0xC2B2AE3D27D4EB4F
_MASK = (1 << 64) - 1
BLOCK_WORDS = 1 << 15
"""256 KiB: the intermediate results of a block stay in a core's second-level cache."""


def checksum(data: Tensor) -> int:
    """Checksum of uint8 `[bytes]`, in `[0, 2**63)`."""
    byte_count = data.numel()
    whole = byte_count - byte_count % (8 * BLOCK_WORDS)
    total = 0
    if whole:
        for block in _block_sums(data[:whole].view(torch.int64).view(-1, BLOCK_WORDS)):
            total = (_mixed(total ^ (block & _MASK)) * _CHAIN) & _MASK
    if whole < byte_count:
        padded = torch.zeros(-(-(byte_count - whole) // 8) * 8, dtype=torch.uint8, device=data.device)
        padded[: byte_count - whole] = data[whole:]
        (last,) = _block_sums(padded.view(torch.int64).view(1, -1))
        total = (_mixed(total ^ (last & _MASK)) * _CHAIN) & _MASK
    return _mixed(total ^ (byte_count * _WORD_KEY & _MASK)) >> 1


def _block_sums(words: Tensor) -> list[int]:
    """Signed sums of int64 `[blocks, words]`, one a block."""
    keys, multiplier = _keys(words.device)[: words.shape[1]], _signed(_MULTIPLIER)
    if words.device.type == "cuda":
        mixed = words + keys
        _mix(mixed, multiplier)
        return list(mixed.sum(dim=1).tolist())
    sums: list[int] = []
    mixed = torch.empty_like(keys)
    for block in words:
        torch.add(block, keys, out=mixed)
        _mix(mixed, multiplier)
        sums.append(int(mixed.sum()))
    return sums


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
