"""Clients that ask without pause, in threads of their own."""

import threading
from collections.abc import Callable
from typing import Self

from tests.patience import patient

JOIN_S = patient(120.0)


class Askers:
    """While its block runs, `clients` threads call `ask(n)` over and over, each with numbers of its own going
    up from its index. It returns what was wrong with the answer, or None; what it raises is wrong as well."""

    def __init__(self, ask: Callable[[int], str | None], clients: int) -> None:
        self.wrong: list[str] = []
        self.answered = 0
        self._ask = ask
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(index,)) for index in range(clients)]

    def _run(self, number: int) -> None:
        while not self._stop.is_set():
            try:
                wrong = self._ask(number)
            except Exception as error:
                wrong = repr(error)
            if wrong is not None:
                self.wrong.append(wrong)
            self.answered += 1
            number += 1

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(JOIN_S)
