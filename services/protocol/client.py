"""The asyncio side of one worker: what a router holds for each of its workers.

Life of a connection:
1. `start()` opens a connection and greets with `RouterHello`.
2. `WorkerHello` makes it READY, until that worker's epoch ends; `Refusal` makes it REFUSED.
3. Every `heartbeat_s` a `StatusRequest` goes out; any frame that comes back proves life.
4. A closed connection, `timeout_s` of silence or another epoch makes it LOST: everything that was asked of
   that incarnation is void. The connection is closed with all it had queued, and a new one begins at 1.
"""

import asyncio
import enum
import logging
from collections.abc import Callable
from pathlib import Path

from kvtransfer.errors import BatonTransferError, TransferConfigError
from kvtransfer.net.channel import ChannelKeys
from services.protocol.connection import WorkerConnection, open_connection
from services.protocol.messages import (
    VERSION,
    ConnectionReport,
    Refusal,
    Report,
    Request,
    RequestReport,
    RouterHello,
    StatusRequest,
    WorkerHello,
)
from services.protocol.worker_status import Status

logger = logging.getLogger(__name__)


class ClientState(enum.Enum):
    CONNECTING = "connecting"
    READY = "ready"
    REFUSED = "refused"
    LOST = "lost"
    CLOSED = "closed"


TRANSITIONS: dict[ClientState, frozenset[ClientState]] = {
    ClientState.CONNECTING: frozenset(
        {ClientState.READY, ClientState.REFUSED, ClientState.LOST, ClientState.CLOSED}
    ),
    ClientState.READY: frozenset({ClientState.LOST, ClientState.CLOSED}),
    ClientState.REFUSED: frozenset({ClientState.LOST, ClientState.CLOSED}),
    ClientState.LOST: frozenset({ClientState.CONNECTING, ClientState.CLOSED}),
    ClientState.CLOSED: frozenset(),
}


SECOND_LOOK_S = 0.02
"""Before silence counts."""
_CONNECTION_REPORTS = (WorkerHello, Refusal, Status)
"""A tuple: `|` between classes would be computed for every token."""


class ClientConfigError(ValueError):
    """A worker's endpoint or the keys for it cannot work; the message says why."""


class IllegalClientTransition(RuntimeError):
    """A connection was moved between two states that `TRANSITIONS` does not join."""


def load_keys(key_dir: Path | None) -> ChannelKeys | None:
    """CURVE keys for `tcp://` endpoints. Raises ClientConfigError."""
    if key_dir is None:
        return None
    try:
        return ChannelKeys.load(key_dir)
    except TransferConfigError as error:
        raise ClientConfigError(str(error)) from error


class WorkerClient:
    """One worker, as one event loop sees it. Not thread-safe: everything happens in that loop.

    `on_reports(client, reports)` gets what concerns requests, one call for each wake-up; `on_state(client,
    old, new)` every change of state. Both run inside the loop and must not block. `hello` and `status` are
    those of the worker's present incarnation, None while there is none.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        router_epoch: int,
        on_reports: Callable[["WorkerClient", list[RequestReport]], None],
        on_state: Callable[["WorkerClient", ClientState, ClientState], None],
        keys: ChannelKeys | None = None,
        heartbeat_s: float = 0.5,
        timeout_s: float = 10.0,
    ) -> None:
        self.endpoint = endpoint
        self.state = ClientState.LOST
        self.hello: WorkerHello | None = None
        self.status: Status | None = None
        self.status_at_s = 0.0
        self.message = "not connected yet"
        self.dropped: dict[str, int] = {}
        self._router_epoch = router_epoch
        self._on_reports, self._on_state = on_reports, on_state
        self._keys, self._heartbeat_s, self._timeout_s = keys, heartbeat_s, timeout_s
        self._connection: WorkerConnection | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._heard_at_s = 0.0
        self._is_second_look = False
        self._ask_id = 0

    def start(self) -> None:
        """Begins to connect, in the running loop. Raises ClientConfigError for a bad endpoint."""
        self._loop = asyncio.get_running_loop()
        try:
            self._open()
        except TransferConfigError as error:
            raise ClientConfigError(str(error)) from error
        self._timer = self._loop.call_later(self._heartbeat_s, self._tick)

    def close(self) -> None:
        """Ends the connection and its timer. Idempotent."""
        if self.state is ClientState.CLOSED:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._drop_connection()
        self.hello = self.status = None
        self._transition(ClientState.CLOSED, "closed")

    def send(self, messages: list[Request]) -> bool:
        """One frame to the worker's present incarnation. False: there is none, or its queue is full."""
        if self.state is not ClientState.READY:
            return False
        return self._send(messages)

    # -- the connection

    def _open(self) -> None:
        self._connection = open_connection(
            self.endpoint,
            self._keys,
            on_reports=self._on_arrived,
            on_mismatch=self._on_mismatch,
            on_end=self._on_end,
            on_drop=self._on_drop,
        )
        self._heard_at_s = self._loop.time()
        self._transition(ClientState.CONNECTING, "connecting")
        self._send([RouterHello(VERSION, self._router_epoch)])

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _send(self, messages: list[Request]) -> bool:
        if self._connection is None:
            return False
        try:
            return self._connection.send(messages)
        except BatonTransferError as error:
            logger.error("worker %s: %s", self.endpoint, error)
            return False

    def _on_drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def _on_mismatch(self, versions: str) -> None:
        if self.state is ClientState.CONNECTING:
            self._transition(ClientState.REFUSED, f"the worker speaks {versions}")

    def _on_arrived(self, reports: list[Report]) -> None:
        connection = self._connection
        self._heard_at_s = self._loop.time()
        passed_on: list[RequestReport] = []
        for report in reports:
            if isinstance(report, _CONNECTION_REPORTS):
                if passed_on:
                    self._pass_on(passed_on)
                    passed_on = []
                try:
                    self._on_connection_report(report)
                except Exception as error:
                    self._failed(error)
                if self._connection is not connection:
                    return
            elif self.state is ClientState.READY:
                passed_on.append(report)
            else:
                self._on_drop("report_without_hello")
        if passed_on:
            self._pass_on(passed_on)

    def _pass_on(self, reports: list[RequestReport]) -> None:
        try:
            self._on_reports(self, reports)
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        """What else came with it still counts, and so does the connection."""
        logger.error("worker %s: internal error on a report", self.endpoint, exc_info=error)
        self._on_drop("internal_error")

    def _on_connection_report(self, report: ConnectionReport) -> None:
        if isinstance(report, Refusal):
            if self.state is ClientState.CONNECTING:
                self._transition(ClientState.REFUSED, report.message)
            elif self.state is ClientState.READY:
                self._lose(f"the worker has forgotten this router: {report.message}")
            return
        if isinstance(report, WorkerHello):
            if self.hello is not None and report.worker_epoch != self.hello.worker_epoch:
                self._lose("the worker was restarted")
            elif self.state is ClientState.CONNECTING:
                if report.version != VERSION:
                    self._transition(ClientState.REFUSED, f"the worker runs {report.version}, not {VERSION}")
                    return
                self.hello = report
                self._transition(ClientState.READY, "ready")
                self._ask()
            elif self.state is ClientState.READY:
                self.hello = report  # the same incarnation: its transfer process has another address
            return
        if self.hello is None:
            return
        if report.worker_epoch != self.hello.worker_epoch:
            self._lose("the worker was restarted")
            return
        self.status, self.status_at_s = report, self._loop.time()

    def _on_end(self) -> None:
        if self.state not in (ClientState.LOST, ClientState.CLOSED):
            self._lose("the connection was closed")

    # -- silence and loss

    def _tick(self) -> None:
        silent_s = self._loop.time() - self._heard_at_s
        if silent_s > self._timeout_s and self.state is not ClientState.LOST and not self._is_second_look:
            # If this process was stopped itself, what came meanwhile is still to be read.
            self._is_second_look = True
            self._timer = self._loop.call_later(SECOND_LOOK_S, self._tick)
            return
        self._is_second_look = False
        self._timer = self._loop.call_later(self._heartbeat_s, self._tick)
        if self.state is ClientState.LOST:
            try:
                self._open()
            except BatonTransferError as error:
                self.message = str(error)
        elif silent_s > self._timeout_s:
            self._lose(f"silent for {silent_s:.1f} s")
        elif self.state is ClientState.READY:
            self._ask()

    def _ask(self) -> None:
        self._ask_id += 1
        self._send([StatusRequest(self._ask_id)])

    def _lose(self, why: str) -> None:
        self._drop_connection()
        self.hello = self.status = None
        self._transition(ClientState.LOST, why)

    def _transition(self, state: ClientState, message: str) -> None:
        if state not in TRANSITIONS[self.state]:
            raise IllegalClientTransition(f"{self.endpoint}: {self.state.value} -> {state.value}")
        old, self.state, self.message = self.state, state, message
        if old is not state and {old, state} != {ClientState.CONNECTING, ClientState.LOST}:
            logger.info("worker %s: %s (%s)", self.endpoint, state.value, message)
        self._on_state(self, old, state)
