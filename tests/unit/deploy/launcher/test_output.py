"""Lines from pieces, progress bars, and a reader that goes away."""

import io
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.launcher.output import LineAssembler, OutputPiece, ProgressThinner, Screen

OUTPUT = b"one\ntwo\r\n  10 %\r  60 %\rdone\nlast"
PIECES = [
    OutputPiece("one", False),
    OutputPiece("two", False),
    OutputPiece("  10 %", True),
    OutputPiece("  60 %", True),
    OutputPiece("done", False),
    OutputPiece("last", False),
]


@given(st.lists(st.integers(0, len(OUTPUT)), max_size=8))
def test_lines_are_the_same_however_they_arrive(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(OUTPUT)]
    assembler, pieces = LineAssembler(), []
    for start, end in itertools.pairwise(edges):
        pieces += list(assembler.feed(OUTPUT[start:end]))
    assert [*pieces, *assembler.end()] == PIECES


def test_a_line_without_end_is_cut() -> None:
    assembler = LineAssembler()
    pieces = [piece for _ in range(3) for piece in assembler.feed(b"x" * 50_000)]
    assert len(pieces) == 1
    assert len(pieces[0].text) == 100_000


def test_bytes_that_are_no_text_are_shown() -> None:
    assert [piece.text for piece in LineAssembler().feed(b"\xff\n")] == ["\N{REPLACEMENT CHARACTER}"]


def test_a_bar_is_thinned_to_quarters() -> None:
    thinner = ProgressThinner()
    bar = [OutputPiece(f"loading {percent} %", True) for percent in range(0, 100, 5)]
    kept = [piece.text for piece in bar if thinner.keep(piece)]
    assert kept == ["loading 0 %", "loading 25 %", "loading 50 %", "loading 75 %"]
    assert thinner.keep(OutputPiece("loaded 100 %", False))
    assert thinner.keep(bar[0]), "a second bar starts anew"
    assert not thinner.keep(OutputPiece("spinning", True))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_plain_lines() -> None:
    stream = io.StringIO()
    Screen(stream).child_line("prefill-0", 0, OutputPiece("25 %", True))
    Screen(stream).say("ready")
    assert stream.getvalue() == "[prefill-0] 25 %\nready\n"


def test_a_terminal_gets_colour_and_progress_in_place() -> None:
    screen = Screen(Terminal())
    screen.child_line("prefill-0", 0, OutputPiece("25 %", True))
    screen.child_line("prefill-0", 0, OutputPiece("50 %", True))
    screen.say("ready")
    label = "\x1b[36m[prefill-0]\x1b[0m"
    assert isinstance(screen.stream, Terminal)
    assert screen.stream.getvalue() == f"\r\x1b[K{label} 25 %\r\x1b[K{label} 50 %\nready\n"


def test_a_reader_that_went_away_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    screen = Screen(stream)
    stream.close()
    screen.say("nobody hears")
    screen.say("nobody hears")
