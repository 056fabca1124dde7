"""How a segment's bytes lie in a slot: `[kv_head][layer][k|v][token][head_dim]`, densely, from offset 0.

Heads come first so that a tensor-parallel rank's heads are one contiguous range of the slot.
"""

from bisect import bisect_left

from kvtransfer.errors import TransferConfigError
from kvtransfer.messages import KvGeometry

SLOT_ALIGNMENT_BYTES = 256


def head_range(kv_heads: int, rank: int, tp: int) -> range:
    """The heads of the model that rank `rank` of `tp` has."""
    share = kv_heads // tp
    return range(rank * share, (rank + 1) * share)


def shared_heads(ours: range, theirs: range) -> range:
    """The heads of both; empty if there are none."""
    return range(max(ours.start, theirs.start), min(ours.stop, theirs.stop))


def tokens_per_slot(geometry: KvGeometry, slot_bytes: int, tp: int = 1) -> int:
    """How many tokens' KV, over all layers and the heads of one of `tp` ranks, fit one slot. Raises
    TransferConfigError if not even one, or if the heads cannot be divided."""
    if geometry.kv_heads % tp:
        raise TransferConfigError(f"tp: {tp} ranks cannot divide {geometry.kv_heads} KV heads")
    tokens = slot_bytes // (geometry.token_bytes // tp)
    if tokens < 1:
        raise TransferConfigError(
            f"slot_bytes: {slot_bytes} bytes cannot hold one token's KV of {geometry.token_bytes // tp} bytes"
        )
    return tokens


def rank_slot_bytes(slot_bytes: int, tp: int) -> int:
    """A worker's slot divided among its ranks, in whole 256 bytes: a rank has its heads of as many tokens."""
    return max(SLOT_ALIGNMENT_BYTES, slot_bytes // tp // SLOT_ALIGNMENT_BYTES * SLOT_ALIGNMENT_BYTES)


def segment_bytes(geometry: KvGeometry, tokens: int) -> int:
    """Bytes that a segment of `tokens` tokens takes, from the slot's first byte."""
    return tokens * geometry.token_bytes


class TokenRanges:
    """A set of token indices as disjoint, sorted, half-open ranges; touching ones are merged."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self.tokens = 0

    def overlaps(self, start: int, end: int) -> bool:
        """Whether any token of `[start, end)` is in the set."""
        after = bisect_left(self._starts, start)
        if after < len(self._starts) and self._starts[after] < end:
            return True
        return after > 0 and self._ends[after - 1] > start

    def add(self, start: int, end: int) -> None:
        """Adds `[start, end)`, which must be new. Raises ValueError if it is empty or overlaps."""
        if start >= end or self.overlaps(start, end):
            raise ValueError(f"range [{start}, {end}) is empty or already there")
        at = bisect_left(self._starts, start)
        self._starts.insert(at, start)
        self._ends.insert(at, end)
        self.tokens += end - start
        if at + 1 < len(self._starts) and self._ends[at] == self._starts[at + 1]:
            del self._ends[at], self._starts[at + 1]
        if at > 0 and self._ends[at - 1] == self._starts[at]:
            del self._ends[at - 1], self._starts[at]
