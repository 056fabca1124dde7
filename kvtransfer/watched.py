"""A figure that a thread of its own keeps up to date, since it takes milliseconds to get. Asked for in the
loop, NVML's list of processes would keep a worker from its steps, and a transfer process from its slots,
every second."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Figure = TypeVar("Figure")
INTERVAL_S = 1.0


class Watched(Generic[Figure]):
    """The latest value of `look()`, little more than `INTERVAL_S` old. The constructor calls `look` once, and
    from then on the thread does. `look` raises nothing."""

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
        """Ends the thread: no `look` runs any more. Idempotent."""
        self._ended.set()
        self._thread.join()
