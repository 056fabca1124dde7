"""Descriptors 0, 1 and 2, which a shell may have closed (`>&-`)."""

import os
import sys
from typing import Literal, TextIO

_INPUT, _OUTPUT, _ERRORS = 0, 1, 2


def open_standard_streams() -> None:
    """Puts /dev/null where one is closed, before a socket can get its number and what is printed goes to it.
    Child processes inherit them."""
    for number, flags in ((_INPUT, os.O_RDONLY), (_OUTPUT, os.O_WRONLY), (_ERRORS, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, flags)
            if opened != number:
                os.dup2(opened, number, inheritable=True)
                os.close(opened)
            else:
                os.set_inheritable(number, True)
    # Python has None in place of a stream whose descriptor was closed at start.
    sys.stdin = _stream(sys.stdin, _INPUT, "r")
    sys.stdout = _stream(sys.stdout, _OUTPUT, "w")
    sys.stderr = _stream(sys.stderr, _ERRORS, "w")


def _stream(found: TextIO | None, number: int, mode: Literal["r", "w"]) -> TextIO:
    return open(number, mode, encoding="utf-8", errors="replace", closefd=False) if found is None else found
