"""A worker's answers to a router that asks when what happened to a transfer: its own, and what its transfer
process remembers."""

from collections import OrderedDict
from collections.abc import Callable

from kvtransfer.messages import TransferSpans
from kvtransfer.spans import Spans
from services.protocol.messages import TraceReply, TraceRequest
from services.roles.report_queue import ReportQueue
from services.transfer.links import TransferRanks

MAX_OPEN = 64
"""Questions that the transfer process has not answered; the oldest are dropped."""


class Tracing:
    def __init__(
        self,
        name: str,
        spans: Spans,
        transfer: TransferRanks | None,
        outbox: ReportQueue,
        clock: Callable[[], float],
    ) -> None:
        self._name, self._spans, self._transfer = name, spans, transfer
        self._outbox, self._clock = outbox, clock
        self._open: OrderedDict[tuple[bytes, int], TraceRequest] = OrderedDict()

    def ask(self, router: bytes, request: TraceRequest) -> None:
        own = self._spans.of(request.transfer_id)
        self._outbox.add(
            router, TraceReply(request.request_id, request.ask_id, self._name, self._clock(), own)
        )
        if self._transfer is None or not self._transfer.ready:
            return
        self._open[router, request.ask_id] = request
        if len(self._open) > MAX_OPEN:
            self._open.popitem(last=False)
        self._transfer.ask_spans(request.transfer_id)

    def answer(self, event: TransferSpans) -> None:
        """Passes on what the transfer process knows, to every router that waits for it."""
        for (router, ask_id), request in list(self._open.items()):
            if request.transfer_id == event.transfer_id:
                del self._open[router, ask_id]
                name = f"{self._name}/transfer"
                reply = TraceReply(request.request_id, ask_id, name, self._clock(), event.spans)
                self._outbox.add(router, reply)
