"""Messages to workers: collected while something is handled, then sent as one frame for each worker."""

from collections.abc import Callable, Iterable

from router.isolation import Borders
from router.routing.attempt import WorkerMessage
from services.protocol.messages import Request


class WorkerOutbox:
    """`send(worker, messages)` returns False for a worker that cannot be written to; then
    `on_unsent(worker, request_id)` is called for each message, and may queue others."""

    def __init__(
        self,
        send: Callable[[str, list[Request]], bool],
        on_unsent: Callable[[str, int], None],
        borders: Borders,
    ) -> None:
        self._send, self._on_unsent, self._borders = send, on_unsent, borders
        self._waiting: dict[str, list[Request]] = {}

    def queue(self, sends: Iterable[WorkerMessage]) -> None:
        for send in sends:
            self._waiting.setdefault(send.worker, []).append(send.message)

    def flush(self) -> None:
        while self._waiting:
            waiting, self._waiting = self._waiting, {}
            for worker, messages in waiting.items():
                if self._has_sent(worker, messages):
                    continue
                for message in messages:
                    work = getattr(message, "work", None)
                    self._on_unsent(
                        worker, getattr(message, "request_id", 0) if work is None else work.request_id
                    )

    def _has_sent(self, worker: str, messages: list[Request]) -> bool:
        try:
            return self._send(worker, messages)
        except BaseException as error:
            self._borders.contain("send", f"{len(messages)} messages to {worker}", error)
            return False
