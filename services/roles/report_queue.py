"""Reports on their way to routers: collected during a step, sent as one frame for each router."""

from collections import defaultdict
from collections.abc import Callable

from services.protocol.messages import Report


class ReportQueue:
    """`send(peer, reports) -> bool` is the channel's; False says that the router is gone."""

    def __init__(self, send: Callable[[bytes, list[Report]], bool]) -> None:
        self._send = send
        self._waiting: defaultdict[bytes, list[Report]] = defaultdict(list)

    def add(self, router: bytes, report: Report) -> None:
        self._waiting[router].append(report)

    def flush(self) -> list[bytes]:
        """Send everything; returns the routers that could not be reached."""
        if not self._waiting:
            return []
        waiting, self._waiting = self._waiting, defaultdict(list)
        return [router for router, reports in waiting.items() if not self._send(router, reports)]
