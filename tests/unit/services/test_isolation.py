"""What fails for one request of a worker touches no other: of a frame, of a step, of a sweep."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvtransfer.net.codec import Codec
from services.config import WorkerConfig
from services.memory.plan import Measured
from services.protocol.messages import (
    VERSION,
    Failed,
    Generate,
    Request,
    RouterHello,
    Sampling,
    SequenceRequest,
    Tokens,
)
from services.roles.limits import named_request
from services.roles.role import Role
from services.roles.unified import UnifiedRole
from services.scheduler.errors import PageAccountingError
from services.worker import Worker
from tests.router_peer import RouterPeer
from tests.sim.engine import PAGE_TOKENS, SimEngine, continuation
from tests.sim.processes import LEDGER

DEADLINE_S = 20.0
PAGES = 64
IDS = (1, 2, 3)
BAD = 2
PROMPT = [5, 6, 7]
TOKENS = 6


class Asked:
    """A worker of its own thread's making, and one router that asks it."""

    def __init__(self, directory: Path) -> None:
        directory.chmod(0o700)
        endpoint = f"ipc://{directory}/w"
        prepared: Any = SimpleNamespace(
            config=WorkerConfig(
                name="w", role="unified", model_dir=Path("/model"), listen=endpoint,
                max_model_len=PAGES * PAGE_TOKENS, page_size_tokens=PAGE_TOKENS,
            ),
            engine=SimEngine(PAGES), model=SimpleNamespace(kv_heads=1), transfer=None, moves=[],
            plan=SimpleNamespace(
                pages=PAGES, ledger=lambda measured: LEDGER, inputs=SimpleNamespace(staging_bytes=0)
            ),
            measured=[Measured()], devices=None,
        )  # fmt: skip
        self.worker = Worker(prepared, 1)
        # Any message can be sent, also those that are no requests.
        self.peer = RouterPeer(endpoint, object)
        self.failed: dict[int, Failed] = {}
        self.tokens: dict[int, list[int]] = {one: [] for one in IDS}
        self.peer.send([RouterHello(VERSION, 7)])

    def until_at_rest(self, ended: int) -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        done = 0
        while done < ended or self.worker.context.requests._running:
            assert time.monotonic() < deadline_s, (self.failed, self.tokens)
            self.worker.turn()
            for report in self.peer.receive():
                if isinstance(report, Failed):
                    assert report.request_id not in self.failed, "failed twice"
                    self.failed[report.request_id] = report
                    done += 1
                elif isinstance(report, Tokens):
                    self.tokens[report.request_id] += report.tokens
                    done += report.finish is not None

    def check_others(self, bad: int = BAD) -> None:
        assert set(self.failed) == {bad}
        for one in set(IDS) - {bad}:
            assert self.tokens[one] == continuation(PROMPT, 0, one, TOKENS)
        pool = self.worker.context.pool.counts()
        assert pool.used == 0 and pool.free + pool.cached == PAGES
        assert self.worker.role.occupancy().running == 0

    def counters(self) -> dict[str, int]:
        counters = self.worker.context.counters
        return {name: count for name, count in counters.items() if name.startswith("internal_errors")}


@pytest.fixture
def asked(tmp_path: Path) -> Iterator[Asked]:
    asked = Asked(tmp_path)
    yield asked
    asked.peer.close()
    asked.worker.server.close()


def generate(request_id: int) -> Generate:
    return Generate(SequenceRequest(request_id, PROMPT, Sampling(max_tokens=TOKENS, seed=request_id)))


def frame() -> list[object]:
    return [generate(one) for one in IDS]


@pytest.mark.parametrize("choices", [0, "two"])
def test_a_request_that_cannot_be_read_costs_its_neighbours_nothing(asked: Asked, choices: object) -> None:
    bad = {"type": "generate", "work": {"request_id": BAD, "prompt": [5], "choices": choices}}
    asked.peer.send([generate(1), bad, "no message at all", generate(3)])
    asked.until_at_rest(3)
    asked.check_others()
    assert asked.failed[BAD].code == "internal" and "choices" in asked.failed[BAD].message
    assert asked.worker.context.counters["dropped_malformed_request"] == 2


def test_a_request_that_cannot_be_read_is_answered_where_it_comes_alone(asked: Asked) -> None:
    asked.peer.send([generate(1), generate(3)])
    asked.until_at_rest(2)
    asked.peer.send([{"type": "generate", "work": {"request_id": BAD, "prompt": []}}])
    asked.until_at_rest(1)
    asked.check_others()


def failing(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, error: Exception, at: int = 1) -> None:
    """The `at`-th call for request `BAD` raises."""
    inner = getattr(owner, name)
    calls = 0

    def fails(*given: Any) -> Any:
        nonlocal calls
        if any(BAD in ids_of(one) for one in given[1:3]):
            calls += 1
            if calls == at:
                raise error
        return inner(*given)

    monkeypatch.setattr(owner, name, fails)


def ids_of(given: Any) -> tuple[int, ...]:
    if isinstance(given, int):
        return (given,)
    if isinstance(given, SequenceRequest):
        return (given.request_id,)
    work = getattr(given, "work", None)
    sequence = getattr(given, "sequence", None)
    return ids_of(sequence) if sequence is not None else () if work is None else (work.request_id,)


@pytest.mark.parametrize(
    ("owner", "name", "at", "where"),
    [
        (UnifiedRole, "accept", 1, "request"),
        (UnifiedRole, "take", 1, "request"),
        (UnifiedRole, "take_chunk", 1, "chunk"),
        (UnifiedRole, "report_prefill", 1, "chunk"),
        (UnifiedRole, "report_token", 1, "chunk"),
        (UnifiedRole, "report_token", 3, "token"),
        (UnifiedRole, "append", 2, "token"),
    ],
)
def test_one_request_fails_by_itself(
    asked: Asked,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    owner: type,
    name: str,
    at: int,
    where: str,
) -> None:
    failing(monkeypatch, owner, name, KeyError("a bug"), at)
    asked.peer.send(frame())
    asked.until_at_rest(3)
    asked.check_others()
    assert asked.failed[BAD].code == "internal"
    assert asked.counters() == {f"internal_errors_{where}": 1}
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(lines) == 1 and f"request {BAD}" in lines[0]


def test_a_sweep_goes_on_behind_a_request_that_fails(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    role = asked.worker.role
    for one in IDS:
        role.accept(b"router", generate(one))
    running = asked.worker.context.requests.all()
    failing(monkeypatch, Role, "fail", KeyError("a bug"))
    for live in running:
        live.deadline_at_s = 0.0
    role.sweep()
    assert not asked.worker.context.requests.all()
    assert asked.counters() == {"internal_errors_sweep": 1}


@pytest.mark.parametrize(
    ("error", "device"), [(PageAccountingError("lost"), "cpu"), (RuntimeError("the device"), "cuda")]
)
def test_what_is_everybodys_ends_the_worker(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, error: Exception, device: str
) -> None:
    failing(monkeypatch, UnifiedRole, "report_token", error)
    monkeypatch.setattr(SimEngine, "device", SimpleNamespace(type=device))
    asked.peer.send(frame())
    with pytest.raises(type(error), match=str(error)):
        asked.until_at_rest(3)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"type": "generate", "work": {"request_id": 5}}, 5),
        ({"type": "cancel", "request_id": 6}, 6),
        ({"request_id": "6"}, None),
        ({"request_id": True}, None),
        ({"request_id": 2**63}, None),
        ({"work": [5]}, None),
        ([5], None),
        (None, None),
    ],
)
def test_what_a_message_that_is_no_request_names(said: object, named: int | None) -> None:
    assert named_request(said) == named


def test_good_requests_are_what_they_were() -> None:
    codec: Codec[Request] = Codec(Request)
    assert codec.decode_each(codec.encode([generate(1)]), lambda said, why: None) == [generate(1)]
