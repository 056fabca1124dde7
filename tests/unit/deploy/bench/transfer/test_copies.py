"""The bench of moves on a CPU: every slot that it counts has gone through a worker's books."""

from argparse import Namespace
from collections.abc import Sequence

import pytest

from deploy.bench.transfer import copies as bench
from services.engine.kv.copies import Copy
from services.engine.kv.layout import KvLayout
from services.engine.kv.run_table import SlotRun


def test_every_launch_has_as_many_slots_as_its_row_says(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[int] = []

    class Counting(bench.TablesOnly):
        def pack(self, runs: Sequence[SlotRun], with_checksums: bool) -> Copy:
            move = super().pack(runs, with_checksums)
            assert move.byte_counts == [8192] * len(runs)
            launched.append(len(runs))
            return move

        unpack = pack

    monkeypatch.setattr(bench, "TablesOnly", Counting)
    layout = KvLayout(layers=2, kv_heads=2, page_size_tokens=64, head_dim=16)
    arguments = Namespace(device="cpu", slot_bytes=8192, in_flight=3, launches=5)
    rows = bench.measure(layout, arguments)
    assert [(row.kind, row.slots_together) for row in rows] == [
        (kind, together) for together in bench.SLOTS_TOGETHER for kind in ("packing", "unpacking")
    ]
    assert launched == [
        together for together in bench.SLOTS_TOGETHER for _ in range(2 * (bench.WARM_LAUNCHES + 5))
    ]
    for row in rows:
        assert row.host_s > 0 and row.met_bytes_per_s is None
        assert row.allowed_bytes_per_s == pytest.approx(8192 / row.host_s)
