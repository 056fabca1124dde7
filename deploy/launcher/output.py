"""The children's output as one readable stream: `[prefill-0] line`, progress in place or thinned out."""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TextIO

_COLOURS = ("36", "32", "33", "35", "34", "96", "92", "93", "95", "94")
_PERCENT = re.compile(r"(\d{1,3})(?:\.\d+)?\s?%")
_STEP_PERCENT = 25
_MAX_LINE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class OutputPiece:
    """One line of a child. `passing` says that it ended in a carriage return: the next one replaces it."""

    text: str
    passing: bool


@dataclass(slots=True)
class LineAssembler:
    """Bytes as they come from a pipe, out as whole lines. `\\r\\n` is an ordinary line end."""

    _rest: bytes = b""

    def feed(self, data: bytes) -> Iterator[OutputPiece]:
        buffer = self._rest + data
        start = 0
        for match in re.finditer(rb"\r\n|\n|\r(?=.)", buffer, re.DOTALL):
            if match.start() > start or match.group() != b"\r":
                yield OutputPiece(_text(buffer[start : match.start()]), match.group() == b"\r")
            start = match.end()
        self._rest = buffer[start:]
        if len(self._rest) > _MAX_LINE_BYTES:
            yield OutputPiece(_text(self._rest), False)
            self._rest = b""

    def end(self) -> Iterator[OutputPiece]:
        """The rest, which had no line end."""
        rest, self._rest = self._rest.rstrip(b"\r"), b""
        if rest:
            yield OutputPiece(_text(rest), False)


@dataclass(slots=True)
class ProgressThinner:
    """Keeps one line of a progress bar for about every quarter, where nothing can be overwritten."""

    _shown: int = -1

    def keep(self, piece: OutputPiece) -> bool:
        if not piece.passing:
            return True
        match = _PERCENT.search(piece.text)
        if match is None:
            return False
        step = int(match.group(1)) // _STEP_PERCENT
        if step < self._shown:
            self._shown = -1  # a new bar
        if step == self._shown:
            return False
        self._shown = step
        return True


@dataclass(slots=True)
class Screen:
    """The output of the launcher. A reader that went away is no reason to end."""

    stream: TextIO = field(default_factory=lambda: sys.stdout)
    _in_place: bool = False
    _gone: bool = False

    @property
    def is_terminal(self) -> bool:
        return self.stream.isatty()

    def say(self, text: str) -> None:
        """A line of the launcher's own."""
        self._write(text + "\n", in_place=False)

    def child_line(self, name: str, index: int, piece: OutputPiece) -> None:
        label = f"[{name}]"
        if self.is_terminal:
            label = f"\x1b[{_COLOURS[index % len(_COLOURS)]}m{label}\x1b[0m"
        if piece.passing and self.is_terminal:
            self._write(f"\r\x1b[K{label} {piece.text}", in_place=True)
        else:
            self._write(f"{label} {piece.text}\n", in_place=False)

    def _write(self, text: str, *, in_place: bool) -> None:
        if self._gone:
            return
        if self._in_place and not in_place:
            text = "\n" + text
        self._in_place = in_place
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):
            self._gone = True


def _text(line: bytes) -> str:
    return line.decode("utf-8", errors="replace").rstrip()
