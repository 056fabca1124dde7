"""The slices of a transfer: one for each pair of ranks that share heads.

    source, tp 2       destination, tp 4
    rank 0  heads 0-3  ──slice──> rank 0  heads 0, 1
                       ──slice──> rank 1  heads 2, 3
    rank 1  heads 4-7  ──slice──> rank 2  heads 4, 5
                       ──slice──> rank 3  heads 6, 7

Between workers of one rank there is one slice, with all heads. The transfer processes take a slice for a
transfer of its own, with an id that both workers derive alike. The slice between both ranks 0, which always
share a head, keeps the transfer's id, which the router chose: a prefill worker opens it before it knows how
many ranks the destination has, and learns that from its confirmation.
"""

import hashlib
from dataclasses import dataclass

from kvtransfer.protocol.layout import head_range, shared_heads


@dataclass(frozen=True, slots=True)
class HeadSlice:
    """The heads that one rank of the source sends to one rank of the destination. Each range counts within
    its rank."""

    slice_id: int
    source_rank: int
    destination_rank: int
    source_heads: range
    destination_heads: range


def slices_of(transfer_id: int, kv_heads: int, source_tp: int, destination_tp: int) -> list[HeadSlice]:
    """All slices of a transfer of a model with `kv_heads`, which both numbers of ranks divide."""
    slices: list[HeadSlice] = []
    for source_rank in range(source_tp):
        source = head_range(kv_heads, source_rank, source_tp)
        for destination_rank in range(destination_tp):
            destination = head_range(kv_heads, destination_rank, destination_tp)
            heads = shared_heads(source, destination)
            if heads:
                slice_id = slice_id_of(transfer_id, source_rank, destination_rank)
                within_source, within_destination = _within(heads, source), _within(heads, destination)
                slices.append(
                    HeadSlice(slice_id, source_rank, destination_rank, within_source, within_destination)
                )
    return slices


def slice_id_of(transfer_id: int, source_rank: int, destination_rank: int) -> int:
    """As random as the transfer's own id."""
    if source_rank == destination_rank == 0:
        return transfer_id
    text = f"{transfer_id} {source_rank} {destination_rank}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1 or 1


def _within(heads: range, rank: range) -> range:
    return range(heads.start - rank.start, heads.stop - rank.start)
