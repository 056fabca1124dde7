"""What fails for one request touches no other: its client gets an error, its workers are told, one line is
logged, one counter counts, and the rest of the frame is handled."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from router.config import RouterConfig
from router.errors import ApiError
from router.isolation import Borders
from router.routing.attempt import Attempt, AttemptPhase, IllegalAttemptTransition
from router.routing.discovery import LOOK_S, Discovery
from router.routing.dispatcher import Dispatcher
from router.routing.metrics import Metrics, exposition
from router.routing.routed_request import Decision, PromptRequest, RetryBudget, RoutedRequest
from services.protocol.client import ClientState, WorkerClient
from services.protocol.messages import (
    VERSION,
    Cancel,
    DecodeStarted,
    Prefill,
    PrefillDone,
    Report,
    Request,
    ReserveKv,
    Role,
    Sampling,
    StartDecode,
    Tokens,
    WorkerHello,
    WorkerTransferAddress,
)
from services.protocol.worker_status import Ledger, PageUsage, Status
from tests.patience import patient

PREFILL, DECODE = "ipc:///r/p", "ipc:///r/d"


class Wire:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[Request] = []
        self.broken = False

    def send(self, messages: list[Request]) -> bool:
        if self.broken:
            raise RuntimeError("a wire that breaks")
        self.sent += messages
        return True

    def close(self) -> None:
        """There is nothing to close."""


class Client:
    """An output that may fail at one of its calls."""

    def __init__(self, fails_at: str | None = None, error: BaseException | None = None) -> None:
        self._fails_at, self._error = fails_at, error or RuntimeError("nobody foresaw this")
        self.tokens: list[int] = []
        self.errors: list[ApiError] = []
        self.ended = False

    @property
    def choices(self) -> "list[Client]":
        return [self]

    def _may_fail(self, at: str) -> None:
        if at == self._fails_at:
            raise self._error

    def on_prefilled(self, report: PrefillDone) -> None:
        self._may_fail("prefilled")

    def on_tokens(self, report: Tokens, now_s: float) -> bool:
        self._may_fail("first tokens" if not self.tokens else "tokens")
        self.tokens += report.tokens
        self.ended = report.finish is not None
        if self.ended:
            self._may_fail("end")
        return not self.ended

    def on_failed(self, error: ApiError) -> None:
        self.errors.append(error)
        self._may_fail("failed")


class World:
    """A dispatcher between one prefill worker and one decode worker, whose part a test plays."""

    def __init__(self, tmp_path: Path, **settings: Any) -> None:
        config = RouterConfig(
            workers=(PREFILL, DECODE), model_dir=tmp_path, served_model_name="m", max_retries=1, **settings
        )
        self.metrics = Metrics(retries=RetryBudget(1, 0.0, 100))
        self.dispatcher = Dispatcher(config, self.metrics)
        self.wires: dict[str, Wire] = {}
        for role, endpoint in (("prefill", PREFILL), ("decode", DECODE)):
            self.connect(self.dispatcher.clients[endpoint], role)  # type: ignore[arg-type]

    def connect(self, client: WorkerClient, role: Role) -> None:
        self.wires[client.endpoint] = wire = Wire()
        client._loop = asyncio.get_running_loop()
        client._connection = wire
        client._transition(ClientState.CONNECTING, "connecting")
        address = WorkerTransferAddress(client.endpoint, 1)
        client.hello = WorkerHello(VERSION, role, role, 1, "m", 320, 1024, 1024, 16, 64, address)
        client._transition(ClientState.READY, "ready")
        client.status = Status(
            None, 1, role, role, "ready", 1, None, 0, 0, 0, 0, PageUsage(64, 64, 0, 0), None, 0.0, 0, 0, 0.0,
            0.0, {}, Ledger("cpu", 1, 0.5, []),
        )  # fmt: skip

    def submit(self, output: Client) -> int:
        """The id of the new prompt."""
        prompt_request = PromptRequest([1, 2, 3], Sampling(max_tokens=9, seed=1), 1, b"", output)
        (routed,) = self.dispatcher.submit([prompt_request])
        return routed.work.request_id

    def report(self, endpoint: str, *reports: Report) -> None:
        self.dispatcher.clients[endpoint]._on_arrived(list(reports))

    def sent(self, endpoint: str, kind: type[Any]) -> list[Any]:
        return [message for message in self.wires[endpoint].sent if isinstance(message, kind)]

    def cancelled(self, request_id: int) -> dict[str, int]:
        return {
            endpoint: sum(message.request_id == request_id for message in self.sent(endpoint, Cancel))
            for endpoint in (PREFILL, DECODE)
        }

    def finish(self, request_id: int, first: int) -> None:
        """What is left of an undisturbed prompt."""
        self.report(PREFILL, PrefillDone(request_id, 0.0, 0.0, 0), Tokens(request_id, 0, [first]))
        self.report(
            DECODE,
            DecodeStarted(request_id, 0.0, 0.0, 3, 0),
            Tokens(request_id, 0, [first + 1], None, "length"),
        )

    def counted(self, where: str, times: int = 1) -> bool:
        text = exposition(self.metrics, self.dispatcher.snapshot()).decode()
        return f'baton_internal_errors_total{{where="{where}"}} {times}.0' in text

    def at_rest(self) -> bool:
        dispatcher = self.dispatcher
        worker_loads = [dispatcher.worker_load(endpoint) for endpoint in (PREFILL, DECODE)]
        return (
            dispatcher.live == 0
            and not dispatcher._attempts
            and all(worker_load.empty and not worker_load.live_tokens for worker_load in worker_loads)
        )


def play(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scenario())


def errors_logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


class PanicException(BaseException):
    """As the Rust libraries raise it."""


@pytest.mark.parametrize("error", [RuntimeError("a bug"), PanicException("a panic")])
@pytest.mark.parametrize("at", ["prefilled", "first tokens", "tokens", "end"])
def test_the_rest_of_a_frame_is_handled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, at: str, error: BaseException
) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        before, broken, after = Client(), Client(at, error), Client()
        ids = [world.submit(client) for client in (before, broken, after)]
        firsts: list[Report] = []
        for request_id in ids:
            firsts += [PrefillDone(request_id, 0.0, 0.0, 0), Tokens(request_id, 0, [7])]
        world.report(PREFILL, *firsts)
        started = [DecodeStarted(one, 0.0, 0.0, 3, 0) for one in ids]
        world.report(DECODE, *started, *(Tokens(one, 0, [8]) for one in ids))
        world.report(DECODE, *(Tokens(one, 0, [9], None, "length") for one in ids))
        assert before.tokens == after.tokens == [7, 8, 9]
        assert before.ended and after.ended and not before.errors and not after.errors
        (failed,) = broken.errors
        assert (failed.status, failed.code) == (500, "internal_error")
        assert failed.committed == (at != "prefilled")
        decoding = at in ("tokens", "end")
        assert world.cancelled(ids[1]) == {PREFILL: not decoding, DECODE: 1}
        assert world.cancelled(ids[0]) == world.cancelled(ids[2]) == {PREFILL: 0, DECODE: 0}
        assert world.counted("report")
        assert world.at_rest()
        (line,) = errors_logged(caplog)
        assert str(ids[1]) in line

    play(scenario)


def test_an_illegal_transition_ends_its_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        broken, other = Client(), Client()
        bad, good = world.submit(broken), world.submit(other)
        transition = Attempt._transition

        def fails(attempt: Attempt, phase: AttemptPhase) -> None:
            if attempt.work.request_id == bad:
                raise IllegalAttemptTransition("a bug")
            transition(attempt, phase)

        monkeypatch.setattr(Attempt, "_transition", fails)
        world.report(PREFILL, Tokens(bad, 0, [7]), Tokens(good, 0, [7]))
        assert [error.status for error in broken.errors] == [500]
        assert world.cancelled(bad) == {PREFILL: 1, DECODE: 1}
        assert [message.request_id for message in world.sent(DECODE, StartDecode)] == [good]
        assert world.counted("report") and world.counted("end")
        world.report(DECODE, DecodeStarted(good, 0, 0, 3, 0), Tokens(good, 0, [8], None, "length"))
        assert other.ended
        assert world.at_rest()

    play(scenario)


@pytest.mark.parametrize("where", ["metrics", "end"])
def test_an_end_that_fails_is_still_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        broken = Client("failed" if where == "end" else None)
        bad = world.submit(broken)
        if where == "metrics":
            monkeypatch.setattr(Metrics, "observe_request", lambda metrics, routed: 1 / 0)
        world.dispatcher.end_all(ApiError(503, "over"))
        assert [error.status for error in broken.errors] == [503]
        assert world.cancelled(bad) == {PREFILL: 1, DECODE: 1}
        assert world.counted(where)
        assert world.at_rest()
        await asyncio.wait_for(world.dispatcher.wait_idle(), patient(5))

    play(scenario)


def test_a_lost_worker_is_lost_for_every_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        world = World(tmp_path, max_waiting=100)
        clients = [Client(), Client(), Client()]
        ids = [world.submit(client) for client in clients]
        decide = RoutedRequest.decide

        def fails_once(routed: RoutedRequest, *given: Any) -> Decision:
            if routed.work.request_id == ids[1]:
                raise RuntimeError("a bug")
            return decide(routed, *given)

        monkeypatch.setattr(RoutedRequest, "decide", fails_once)
        client = world.dispatcher.clients[DECODE]
        client._lose("gone")
        monkeypatch.setattr(RoutedRequest, "decide", decide)
        assert [error.code for error in clients[1].errors] == ["internal_error"]
        assert not clients[0].errors and not clients[2].errors
        assert world.counted("worker_lost")
        world.connect(client, "decode")
        deadline_s = asyncio.get_running_loop().time() + 10
        while len(world.sent(DECODE, ReserveKv)) < 2:
            assert asyncio.get_running_loop().time() < deadline_s
            await asyncio.sleep(0.01)
        world.dispatcher.end_all(ApiError(503, "over"))
        assert world.at_rest()

    play(scenario)


def test_a_sweep_goes_on_behind_a_request_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        clients = [Client(), Client(), Client()]
        ids = [world.submit(client) for client in clients]
        client = world.dispatcher.clients[PREFILL]
        client._lose("gone")
        find_workers = Dispatcher._find_workers

        def fails_once(dispatcher: Dispatcher, attempt: Attempt, now_s: float) -> None:
            if attempt.routed.work.request_id == ids[0]:
                raise RuntimeError("a bug")
            find_workers(dispatcher, attempt, now_s)

        monkeypatch.setattr(Dispatcher, "_find_workers", fails_once)
        world.connect(client, "prefill")
        deadline_s = asyncio.get_running_loop().time() + 10
        while len(world.sent(PREFILL, Prefill)) < 2:
            assert asyncio.get_running_loop().time() < deadline_s
            await asyncio.sleep(0.01)
        assert [error.code for error in clients[0].errors] == ["internal_error"]
        assert world.counted("sweep")
        world.dispatcher.end_all(ApiError(503, "over"))
        assert world.at_rest()

    play(scenario)


def test_prompts_of_one_request_start_together_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        start = RoutedRequest.start
        clients = [Client(), Client()]

        def fails(routed: RoutedRequest, *given: Any) -> Any:
            if routed.output is clients[1]:
                raise RuntimeError("a bug")
            return start(routed, *given)

        monkeypatch.setattr(RoutedRequest, "start", fails)
        sampling = Sampling(max_tokens=9, seed=1)
        prompt_requests = [PromptRequest([1, 2], sampling, 1, b"", client) for client in clients]
        with pytest.raises(ApiError) as caught:
            world.dispatcher.submit(prompt_requests)
        assert (caught.value.status, caught.value.code) == (500, "internal_error")
        assert world.counted("submit")
        assert len(world.sent(PREFILL, Cancel)) == len(world.sent(PREFILL, Prefill))
        assert world.at_rest()

    play(scenario)


def test_a_wire_that_fails_is_no_other_workers_trouble(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        world.wires[PREFILL].broken = True
        client = Client()
        world.submit(client)
        assert world.sent(DECODE, ReserveKv)
        assert world.metrics.borders.counts["send"] >= 1
        assert [error.code for error in client.errors] == ["worker_lost"]
        world.wires[PREFILL].broken = False
        other = Client()
        world.finish(world.submit(other), 7)
        assert other.tokens == [7, 8]
        assert world.at_rest()

    play(scenario)


def test_looking_for_workers_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.routing.discovery.LOOK_S", LOOK_S / 50)

    async def scenario() -> None:
        calls = 0
        again = asyncio.Event()

        def found(endpoints: list[str]) -> None:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise RuntimeError("a bug")
            again.set()

        class File:
            def look(self) -> list[str]:
                return []

        borders = Borders()
        discovery = Discovery(File(), [], found, borders)  # type: ignore[arg-type]
        discovery.start()
        await asyncio.wait_for(again.wait(), patient(10))
        discovery.close()
        assert borders.counts["discovery"] == 1

    play(scenario)


def test_a_report_on_the_connection_that_fails_costs_no_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        client = Client()
        request_id = world.submit(client)
        worker = world.dispatcher.clients[PREFILL]
        monkeypatch.setattr(WorkerClient, "_on_connection_report", lambda worker, report: 1 / 0)
        status = worker.status
        assert status is not None
        world.report(PREFILL, status, Tokens(request_id, 0, [7]), status)
        assert client.tokens == [7]
        assert worker.dropped == {"internal_error": 2}
        world.dispatcher.end_all(ApiError(503, "over"))

    play(scenario)
