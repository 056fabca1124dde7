"""The scanner for stop strings in generated text. Pure."""

from collections.abc import Sequence


class StopScanner:
    """Finds the first stop string in a text that comes in pieces.

    "First" is the one that is complete first; of two that are complete at the same character, the longer.
    This does not depend on how the text is cut into pieces. Text that could still turn out to be the
    beginning of a stop string is held back.
    """

    __slots__ = ("_held", "_include", "_stops")

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """`(text to pass on, whether a stop string was hit)`. After a hit nothing more may be pushed."""
        if not text:
            return "", False
        window = self._held + text
        best: tuple[int, int] | None = None
        for stop in self._stops:
            start = window.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best):
                best = (start + len(stop), start)
        if best is not None:
            end, start = best
            self._held = ""
            return window[: end if self._include else start], True
        keep = self._longest_beginning(window)
        self._held = window[len(window) - keep :]
        return window[: len(window) - keep], False

    def completes(self, text: str) -> bool:
        """Whether this text, pushed next, would hit one."""
        window = self._held + text
        return any(stop in window for stop in self._stops)

    def _longest_beginning(self, window: str) -> int:
        """Length of the longest end of `window` that begins a stop string."""
        keep = 0
        for stop in self._stops:
            at = window.find(stop[0], max(0, len(window) - len(stop) + 1))
            while at >= 0 and len(window) - at > keep:
                if stop.startswith(window[at:]):
                    keep = len(window) - at
                    break
                at = window.find(stop[0], at + 1)
        return keep

    def flush(self) -> str:
        """What is held back: the text has ended, so it was no stop string."""
        held, self._held = self._held, ""
        return held
