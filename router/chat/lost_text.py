"""The check that a chat template lost no text: what was said must be in the prompt. Pure."""

import json
from collections.abc import Callable, Sequence

from markupsafe import escape

from router.chat.conversation import Said

SCANS = 32
"""Times the prompt's length that may be searched for texts that are not in order."""
SHORT_CHARACTERS = 24
"""Of a text this short it says little that it is in the prompt, where the template is known to lose turns."""

_WRITINGS: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    lambda text: json.dumps(text)[1:-1],
    lambda text: str(escape(text)),
)
"""What templates make of a text without losing it."""


class _Search:
    """Texts mostly follow each other in the order they were said, all written in the same way: so each search
    goes on where the last one ended, and begins with the last one's way. `left` is what may still be read."""

    def __init__(self, prompt: str) -> None:
        self._prompt, self._at, self._way = prompt, 0, 0
        self.left = SCANS * len(prompt) + (1 << 20)

    def finds(self, text: str) -> bool:
        return self._finds(text, self._way, self._at) or self._finds_elsewhere(text)

    def _finds_elsewhere(self, text: str) -> bool:
        ways = [self._way, *(way for way in range(len(_WRITINGS)) if way != self._way)]
        starts = (self._at, 0)
        return any(self.left > 0 and self._finds(text, way, start) for way in ways for start in starts)

    def _finds(self, text: str, way: int, start: int) -> bool:
        written = _WRITINGS[way](text)
        place = self._prompt.find(written, start)
        if place < 0:
            self.left -= len(self._prompt) - start
            return False
        self._at = place + len(written)
        self.left -= self._at - start
        if written != text:
            self._way = way
        return True


def first_lost(said: Sequence[Said], prompt: str, faithful: bool) -> tuple[Said | None, bool]:
    """The first of which a text is not in the prompt, without the white space at its ends; and whether that
    is sure: it is not where short texts say little, or where too much would have to be read."""
    search, sure = _Search(prompt), True
    for one in said:
        for text in one.texts:
            core = text.strip()
            if not core:
                continue
            if not search.finds(core):
                return (one, True) if search.left > 0 else (None, False)
            sure = sure and (faithful or len(core) > SHORT_CHARACTERS)
    return None, sure
