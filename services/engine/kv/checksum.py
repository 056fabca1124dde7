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
from services.engine.kv.run_table import RUN_FIELDS, RunTable
from services.engine.ops.launch_cache import cached_kernel, cdiv

_WORD_KEY = 0x9E3779B97F4A7C15
_MULTIPLIER = 0xD6E8FEB86659FD93
_CHAIN = 0xC2B2AE3D27D4EB4F
_MASK = (1 << 64) - 1
BLOCK_WORDS = 1 << 15
"""256 KiB: the intermediate results of a block stay in a core's second-level cache."""
BLOCK_BYTES = 8 * BLOCK_WORDS
PART_WORDS = 1 << 12
"""What one program of the kernel sums."""


@dataclass(frozen=True, slots=True)
class QueuedChecksums:
    """`sums`: int64 `[slots, most blocks, parts]` in host memory, each block's sum in parts; for each slot as
    many blocks as its bytes have."""

    byte_counts: list[int]
    sums: Tensor

    def values(self) -> list[int]:
        """Each in `[0, 2**63)`. To be asked once an event that was recorded after the call that made them has
        passed; on a CPU at once."""
        return [_chained(sums, count) for sums, count in zip(self.sums, self.byte_counts, strict=True)]


def queue_checksums(staging: Tensor, slot_bytes: int, sent: Tensor, table: RunTable) -> QueuedChecksums:
    """Checksums of what the runs of `table` have in their slots (see `kv_segment.pack_runs`), queued on the
    current stream by one launch; the host waits for nothing."""
    counts = table.byte_counts
    if staging.is_cuda and slot_bytes % 8 == 0 and not any(count % 8 for count in counts):
        sums = slot_sums_kernel(staging.view(torch.int64), slot_bytes // 8, sent, table)
    else:
        sums = slot_sums_reference(staging, slot_bytes, table)
    return QueuedChecksums(counts, to_host(sums))


def checksum(data: Tensor) -> int:
    """Checksum of uint8 `[bytes]`, waited for."""
    return _chained(_block_sums(data), data.numel())


def slot_sums_reference(staging: Tensor, slot_bytes: int, table: RunTable) -> Tensor:
    """Sums of the blocks of each run's bytes in its slot, int64 `[runs, most blocks, 1]`."""
    most_blocks = -(-max(table.byte_counts) // BLOCK_BYTES)
    sums = torch.zeros((len(table.byte_counts), most_blocks, 1), dtype=torch.int64, device=staging.device)
    for at, (count, into) in enumerate(zip(table.byte_counts, sums, strict=True)):
        first = table.words[at * RUN_FIELDS] * slot_bytes
        found = _block_sums(staging[first : first + count])
        into[: len(found)] = found
    return sums


def _block_sums(data: Tensor) -> Tensor:
    """Of uint8 `[bytes]`, as int64 `[blocks, 1]`; the last word is filled up with zeros."""
    byte_count = data.numel()
    whole = byte_count - byte_count % BLOCK_BYTES
    sums = []
    if whole:
        sums.append(block_sums_reference(data[:whole].view(torch.int64)))
    if whole < byte_count:
        padded = torch.zeros(-(-(byte_count - whole) // 8) * 8, dtype=torch.uint8, device=data.device)
        padded[: byte_count - whole] = data[whole:]
        sums.append(block_sums_reference(padded.view(torch.int64)))
    return torch.cat(sums)


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


def slot_sums_kernel(staging: Tensor, slot_words: int, sent: Tensor, table: RunTable) -> Tensor:
    """Sums of the blocks of each run's words in its slot, the last of which may be short, as int64
    `[runs, most blocks, parts]`; in one launch, and with no memory but the result's. `staging`: int64
    `[slots * slot_words]`; `sent`: see `kv_segment.pack_runs`."""
    most_blocks = cdiv(max(table.byte_counts), BLOCK_BYTES)
    parts = BLOCK_WORDS // PART_WORDS
    runs = len(table.byte_counts)
    sums = torch.empty((runs, most_blocks, parts), dtype=torch.int64, device=staging.device)
    _sum_parts[(most_blocks * parts, runs)](
        staging,
        sums,
        sent,
        slot_words,
        FIELDS=RUN_FIELDS,
        PARTS=parts,
        PART_WORDS=PART_WORDS,
        WORD_KEY=_signed(_WORD_KEY),
        MULTIPLIER=_signed(_MULTIPLIER),
        num_warps=8,
    )
    return sums


@cached_kernel
@triton.jit
def _sum_parts(
    staging_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    table_ptr: tl.tensor,
    slot_words: tl.tensor,
    FIELDS: tl.constexpr,
    PARTS: tl.constexpr,
    PART_WORDS: tl.constexpr,
    WORD_KEY: tl.constexpr,
    MULTIPLIER: tl.constexpr,
) -> None:
    part = tl.program_id(0).to(tl.int64)
    run = tl.program_id(1)
    slot = tl.load(table_ptr + run * FIELDS).to(tl.int64)
    words = tl.load(table_ptr + run * FIELDS + 1)
    in_part = tl.arange(0, PART_WORDS)
    at = part * PART_WORDS + in_part
    place = (part % PARTS) * PART_WORDS + in_part + 1
    word = tl.load(staging_ptr + slot * slot_words + at, mask=at < words, other=0) + place * WORD_KEY
    word = word * MULTIPLIER
    word = word ^ ((word >> 32) & 0xFFFFFFFF)
    word = word * MULTIPLIER
    word = word ^ ((word >> 32) & 0xFFFFFFFF)
    tl.store(sums_ptr + run * tl.num_programs(0) + part, tl.sum(tl.where(at < words, word, 0), 0))


def _chained(sums: Tensor, byte_count: int) -> int:
    """The checksum of `byte_count` bytes whose blocks have these sums, int64 `[blocks or more, parts]`."""
    total = 0
    for parts in sums[: -(-byte_count // BLOCK_BYTES)].tolist():
        total = (_mixed(total ^ (sum(parts) & _MASK)) * _CHAIN) & _MASK
    return _mixed(total ^ (byte_count * _WORD_KEY & _MASK)) >> 1


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
