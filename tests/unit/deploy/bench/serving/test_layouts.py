"""Layouts as they are written, and the lines that compare them."""

import pytest

from deploy.bench.load.options import Layout, parse_layouts
from deploy.bench.serving.report import best_lines, row_lines
from deploy.bench.serving.statistics import SloLimits
from deploy.cli import run
from tests.unit.deploy.bench.serving.test_verdict import figures, good, system


def test_layouts_are_read_in_their_order() -> None:
    assert parse_layouts("1P1D, 2p3d,4U") == (Layout(1, 1), Layout(2, 3), Layout(unified=4))
    assert [layout.name for layout in parse_layouts("2P1D,3U")] == ["2P1D", "3 unified"]


@pytest.mark.parametrize("given", ["", "1P", "1D1P", "0P1D", "33P1D", "1P1D,1P1D", "1P1D;2U", "P1D1", "٣U"])
def test_whatever_is_no_layout_is_refused(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "layouts", "nowhere", "--layouts", given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("baton: error: --layouts: ")


def test_each_system_at_its_best_rate_and_who_was_busy_then() -> None:
    busy = figures(8.0, good=300, goodput=6.0, goodput_per_gpu=3.0, busy={"prefill": 0.5, "decode": 0.934})
    systems = [system("1P1D", good(1.0, 4.0), busy), system("2 unified", good(1.0, 4.0))]
    first, second = best_lines(systems, SloLimits(ttft_ms=100.0)).splitlines()
    best = "1P1D: at best 3 good requests/s per GPU, at 8 req/s"
    assert first.strip() == f"{best}, prefill workers busy 50%, decode workers busy 93%"
    assert second.strip() == "2 unified: at best 2 good requests/s per GPU, at 4 req/s"
    without = best_lines(systems, SloLimits()).splitlines()[1]
    assert without.strip() == "2 unified: at best 250 output tokens/s per GPU, at 4 req/s"


def test_a_row_says_who_was_busy() -> None:
    assert "busy: prefill 50%, decode 93%" in row_lines(
        figures(8.0, busy={"prefill": 0.5, "decode": 0.934}), SloLimits()
    )
    assert "busy" not in row_lines(figures(), SloLimits())
