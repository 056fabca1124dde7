"""A figure that takes milliseconds to get, looked at beside the loop that wants it. Asked for there, NVML's
list of processes would keep a worker from its steps, and a transfer process from its slots, every second."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Figure = TypeVar("Figure")
INTERVAL_S = 1.0


class Watched(Generic[Figure]):
    """`latest` is what `look` gave last, little more than `INTERVAL_S` ago. It runs once here, and from then
    on in a thread of its own; it raises nothing."""

    def __init__(self, look: Callable[[], Figure]) -> None:
        self.latest = look()
        self._look = look
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            self.latest = self._look()

    def close(self) -> None:
        """No look is under way any more. Idempotent."""
        self._ended.set()
        self._thread.join()
