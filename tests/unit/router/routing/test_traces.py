"""Labels are found again by their owner alone; what workers answer is put on one clock."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from router.errors import ApiError
from router.routing.attempt import Times
from router.routing.traces import MAX_LABELS, MAX_PROMPTS, RequestTrace, Traces, process_trace
from services.protocol.messages import Request, TraceReply, TraceRequest, TraceSpan

SPAN = TraceSpan("pack", 0, 4, 10.0, 11.0)


def attempt(request_id: int = 1, prefill: str | None = "p", submitted_s: float = 100.0) -> Any:
    return SimpleNamespace(
        work=SimpleNamespace(request_id=request_id, prompt=[1] * 8),
        transfer_id=request_id + 1000 if prefill else 0,
        prefill=prefill,
        decode="d",
        times=Times(submitted_s, first_token_s=submitted_s + 0.5),
    )


class Workers:
    """Answer at once; `silent` processes do not."""

    def __init__(self, silent: tuple[str, ...] = (), reachable: bool = True) -> None:
        self.asked: list[tuple[str, Request]] = []
        self.silent, self.reachable = silent, reachable
        self.now_s = 100.0
        self.traces = Traces(self.send, lambda: self.now_s)

    def send(self, endpoint: str, messages: list[Request]) -> bool:
        for message in messages:
            assert isinstance(message, TraceRequest)
            self.asked.append((endpoint, message))
            for process in (f"worker-{endpoint}", f"worker-{endpoint}/transfer"):
                if process not in self.silent and self.reachable:
                    reply = TraceReply(message.request_id, message.ask_id, process, self.now_s, [SPAN])
                    self.traces.on_reply(reply)
        return self.reachable

    def remember(self, owner: str | None, label: str, *attempts: Any) -> None:
        self.traces.remember(owner, label, attempts, lambda endpoint: f"worker-{endpoint}")

    def trace(self, owner: str | None, label: str) -> RequestTrace:
        return asyncio.run(self.traces.trace(owner, label))


def test_all_four_processes_of_a_transfer_are_asked() -> None:
    workers = Workers()
    workers.remember(None, "mine", attempt())
    (prompt,) = workers.trace(None, "mine").prompts
    assert [(endpoint, one.request_id, one.transfer_id) for endpoint, one in workers.asked] == [  # type: ignore[union-attr]
        ("p", 1, 1001),
        ("d", 1, 1001),
    ]
    assert prompt.missing == [] and (prompt.prefill, prompt.decode) == ("worker-p", "worker-d")
    assert [one.process for one in prompt.processes] == [
        "worker-d",
        "worker-d/transfer",
        "worker-p",
        "worker-p/transfer",
    ]
    assert prompt.processes[0].spans == [TraceSpan("pack", 0, 4, -90.0, -89.0)]
    assert prompt.first_token_s == 0.5 and prompt.ended_s is None


def test_who_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.routing.traces.ANSWER_S", 0.01)
    workers = Workers(silent=("worker-d/transfer",))
    workers.remember(None, "mine", attempt())
    (prompt,) = workers.trace(None, "mine").prompts
    assert prompt.missing == ["worker-d/transfer"] and len(prompt.processes) == 3
    unreachable = Workers(reachable=False)
    unreachable.remember(None, "mine", attempt())
    (prompt,) = unreachable.trace(None, "mine").prompts
    assert len(prompt.missing) == 4 and prompt.processes == []


def test_a_unified_worker_is_not_asked() -> None:
    workers = Workers()
    workers.remember(None, "mine", attempt(prefill=None))
    (prompt,) = workers.trace(None, "mine").prompts
    assert workers.asked == [] and prompt.processes == prompt.missing == []
    assert (prompt.prefill, prompt.decode) == (None, "worker-d")


def test_a_label_belongs_to_its_key() -> None:
    workers = Workers()
    workers.remember("key", "mine", attempt(1))
    workers.remember("other", "mine", attempt(2))
    assert len(workers.trace("key", "mine").prompts) == 1
    assert {one.request_id for _, one in workers.asked} == {1}  # type: ignore[union-attr]
    for owner, label in (("third", "mine"), (None, "mine"), ("key", "another")):
        with pytest.raises(ApiError) as error:
            workers.trace(owner, label)
        assert error.value.status == 404


def test_what_is_remembered_is_bounded() -> None:
    workers = Workers()
    for number in range(MAX_LABELS + 5):
        workers.remember(None, f"label-{number}", attempt(prefill=None))
    assert len(workers.trace(None, f"label-{MAX_LABELS + 4}").prompts) == 1
    with pytest.raises(ApiError):
        workers.trace(None, "label-4")
    workers.remember(None, "again", *[attempt(prefill=None) for _ in range(MAX_PROMPTS + 3)])
    assert len(workers.trace(None, "again").prompts) == MAX_PROMPTS


def test_replies_nobody_waits_for_change_nothing() -> None:
    Workers().traces.on_reply(TraceReply(1, 99, "worker-p", 0.0, [SPAN]))


@pytest.mark.parametrize(
    ("clock_s", "offset_s", "error_s"),
    [(100.001, 0.0, 0.0), (100.0019, 0.0, 0.0), (40.001, 60.0, 0.001), (100.5, -0.499, 0.001)],
)
def test_a_clock_is_the_same_unless_the_answer_says_otherwise(
    clock_s: float, offset_s: float, error_s: float
) -> None:
    """Asked at 100 and answered at 100.002: a clock that said something in between may be ours."""
    found = process_trace(100.0, 100.002, TraceReply(1, 1, "w", clock_s, [SPAN]), 9.0)
    assert found.offset_s == pytest.approx(offset_s, abs=1e-9)
    assert found.error_s == pytest.approx(error_s, abs=1e-9)
    assert found.spans[0].start_s == pytest.approx(1.0 + found.offset_s)
