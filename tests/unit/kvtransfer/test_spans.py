"""What is remembered of transfers is bounded, and the latest is kept."""

import pytest

from kvtransfer import spans as module
from kvtransfer.messages import TraceSpan
from kvtransfer.spans import Spans


def test_spans_come_back_in_their_order() -> None:
    spans = Spans()
    spans.note(1, "pack", 0, 4, 1.0, 2.0)
    spans.note(2, "send", 0, 4, 3.0, 4.0)
    spans.note(1, "pack", 4, 4, 2.0, 3.0)
    assert spans.of(1) == [TraceSpan("pack", 0, 4, 1.0, 2.0), TraceSpan("pack", 4, 4, 2.0, 3.0)]
    assert spans.of(3) == []
    spans.of(1).clear()
    assert len(spans.of(1)) == 2


def test_the_oldest_transfers_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TRANSFERS", 3)
    monkeypatch.setattr(module, "MAX_KEPT", 8)
    monkeypatch.setattr(module, "MAX_SPANS", 5)
    spans = Spans()
    for transfer_id in range(1, 5):
        spans.note(transfer_id, "send", 0, 1, 0.0, 0.0)
    assert [len(spans.of(one)) for one in range(1, 5)] == [0, 1, 1, 1] and len(spans) == 3
    for token in range(9):
        spans.note(4, "send", token, 1, 0.0, 0.0)
    assert len(spans.of(4)) == 5, "one transfer cannot take it all"
    for token in range(5):
        spans.note(5, "send", token, 1, 0.0, 0.0)
    assert spans.of(2) == spans.of(3) == spans.of(4) == [] and len(spans) == 5
