"""Moves a run of a sequence's tokens between its pages and a staging slot, with an optional checksum.

Everything is queued on the current stream; nothing here waits for a device.
"""

import torch
from torch import Tensor

from services.engine.errors import SegmentError
from services.engine.host_copy import indices, to_device
from services.engine.kv_pool import KvPool
from services.engine.ops.checksum import QueuedChecksum, queue_checksum
from services.engine.ops.kv_segment import pack_segment, unpack_segment
from services.engine.staging_view import host_view

Slot = memoryview | Tensor


def pack(
    pool: KvPool,
    pages: list[int],
    start_token: int,
    token_count: int,
    slot: Slot,
    with_checksum: bool,
    heads: range | None = None,
) -> tuple[int, QueuedChecksum | None]:
    """Write tokens `[start_token, start_token + token_count)` to the head of `slot`, canonically laid out.

    `pages` is the sequence's page table from its first token, `heads` those of the pool's heads that are
    meant; None: all. Returns the bytes written and, if asked for,
    their checksum. Raises `SegmentError`.
    """
    data, used, first_offset, segment = _resolve(pool, pages, start_token, token_count, slot, heads)
    pack_segment(pool.data, used, first_offset, segment, 0 if heads is None else heads.start)
    return data.numel(), queue_checksum(data) if with_checksum else None


def unpack(
    pool: KvPool,
    pages: list[int],
    start_token: int,
    token_count: int,
    slot: Slot,
    with_checksum: bool,
    heads: range | None = None,
) -> tuple[int, QueuedChecksum | None]:
    """The inverse of `pack`, from the head of `slot`. Returns the bytes read and, if asked for, their
    checksum: the pages must not be used before it was compared. Raises `SegmentError`."""
    data, used, first_offset, segment = _resolve(pool, pages, start_token, token_count, slot, heads)
    queued = queue_checksum(data) if with_checksum else None
    unpack_segment(pool.data, used, first_offset, segment, 0 if heads is None else heads.start)
    return data.numel(), queued


def _resolve(
    pool: KvPool, pages: list[int], start_token: int, token_count: int, slot: Slot, heads: range | None
) -> tuple[Tensor, Tensor, int, Tensor]:
    """The slot's used bytes, the pages concerned (int64), the first token's place in them, and the typed
    view of the bytes."""
    layout = pool.layout
    if start_token < 0 or token_count < 1:
        raise SegmentError(f"segment needs start >= 0 and tokens >= 1, has {start_token} and {token_count}")
    first_page = start_token // layout.page_size_tokens
    last_page = (start_token + token_count - 1) // layout.page_size_tokens
    if last_page >= len(pages):
        raise SegmentError(f"{len(pages)} pages do not cover tokens up to {start_token + token_count - 1}")
    used = pages[first_page : last_page + 1]
    if min(used) < 0 or max(used) >= pool.pages:
        raise SegmentError(f"page out of range: the pool has {pool.pages}")
    if heads is None:
        heads = range(layout.kv_heads)
    if not heads or heads.start < 0 or heads.stop > layout.kv_heads:
        raise SegmentError(f"{heads} out of range: the pool has {layout.kv_heads} heads")
    shape = (len(heads), layout.layers, 2, token_count, layout.head_dim)
    byte_count = torch.Size(shape).numel() * pool.data.element_size()
    whole = slot if isinstance(slot, Tensor) else host_view(slot)
    if whole.dtype != torch.uint8 or whole.dim() != 1 or whole.numel() < byte_count:
        raise SegmentError(
            f"segment of {byte_count} bytes does not fit the slot ({tuple(whole.shape)} {whole.dtype})"
        )
    data = whole[:byte_count]
    sent = to_device({"pages": indices(used)}, pool.data.device)["pages"]
    return data, sent, start_token % layout.page_size_tokens, data.view(pool.data.dtype).view(shape)
