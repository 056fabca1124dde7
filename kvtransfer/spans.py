"""The trace of a process: when it did what with a transfer's segments. Bounded, in memory, pure.

Times are this process's monotonic clock, which on Linux all processes of one host share.
"""

from collections import OrderedDict

from kvtransfer.messages import MAX_SPANS, Stage, TraceSpan

MAX_TRANSFERS = 512
MAX_KEPT = 1 << 16
"""Spans of all transfers: about 10 MB."""


class Spans:
    """The spans of the latest transfers; the oldest are forgotten first."""

    def __init__(self) -> None:
        self._of: OrderedDict[int, list[TraceSpan]] = OrderedDict()
        self._kept = 0

    def note(
        self, transfer_id: int, stage: Stage, start_token: int, token_count: int, start_s: float, end_s: float
    ) -> None:
        spans = self._of.setdefault(transfer_id, [])
        if len(spans) >= MAX_SPANS:
            return
        spans.append(TraceSpan(stage, start_token, token_count, start_s, end_s))
        self._kept += 1
        while len(self._of) > MAX_TRANSFERS or self._kept > MAX_KEPT:
            _, forgotten = self._of.popitem(last=False)
            self._kept -= len(forgotten)

    def of(self, transfer_id: int) -> list[TraceSpan]:
        """In the order in which they were noted; empty for a transfer that is not known (any more)."""
        return list(self._of.get(transfer_id, ()))

    def __len__(self) -> int:
        return self._kept
