"""The bar of a worker that loads weights: in place where somebody overwrites it, one line where not."""

import pytest

from deploy.commands.worker import progress


def shown(in_place: bool, capsys: pytest.CaptureFixture[str]) -> str:
    show = progress(in_place)
    for done in range(1, 5):
        show(done, 4)
    return capsys.readouterr().err


def test_a_log_gets_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(False, capsys) == f"loading weights [{'#' * 20}] 100 %\n"


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(True, capsys)
    assert [piece.split("] ")[1] for piece in text.split("\r")] == ["25 %", "50 %", "75 %", "100 %\n"]
