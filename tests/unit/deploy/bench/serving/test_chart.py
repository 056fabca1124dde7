"""The chart: drawn where matplotlib is there, one clear line before anything is measured where it is not."""

import sys
from pathlib import Path

import pytest

from deploy.bench.serving.chart import draw
from deploy.bench.serving.statistics import SloLimits
from deploy.cli import run
from tests.unit.deploy.bench.serving.test_verdict import figures, system

PNG = b"\x89PNG\r\n\x1a\n"


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(["bench", "serve", "--chart", str(tmp_path / "x.png")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "baton: error: --chart: matplotlib is missing; install it with: pip install 'baton[bench]'"


@pytest.mark.parametrize("limits", [SloLimits(), SloLimits(ttft_ms=150.0)])
def test_a_png_with_what_there_is(limits: SloLimits, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    nothing = figures(8.0, completed=0, ttft_ms=None, second_token_ms=None, itl_ms=None, tpot_ms=None)
    file = tmp_path / "x.png"
    draw(file, "a title", [system("1P1D", figures(), nothing), system("2 unified", nothing)], limits)
    assert file.read_bytes().startswith(PNG)
    assert file.stat().st_size > 10_000
