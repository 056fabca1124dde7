"""A worker of several ranks: steps are waited for on the device, and a failure is said, not waited out."""

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services import worker
from services.config import WorkerConfig
from services.tensor_parallel.leader_engine import _Watched
from services.tensor_parallel.rank_pool import RankError

CONFIG = WorkerConfig("one", "prefill", Path("/model"), "ipc:///none")


class Event:
    def __init__(self) -> None:
        self.waited: list[object] = []
        self.has_passed = False

    def query(self) -> bool:
        return self.has_passed

    def synchronize(self) -> None:
        self.has_passed = True

    def wait(self, stream: object) -> None:
        self.waited.append(stream)


def test_a_step_of_ranks_is_an_event_like_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pack waits on its own stream for the step that computes what it packs."""
    event, ranks, stream = Event(), object(), object()
    watched: Any = _Watched(event, ranks)  # type: ignore[arg-type]
    watched.wait(stream)
    assert event.waited == [stream]
    assert not watched.query()
    monkeypatch.setattr("services.tensor_parallel.leader_engine.STEP_TIMEOUT_S", -1.0)
    with pytest.raises(RankError, match="a rank hangs"):
        watched.query()


class Left(BaseException):
    """Instead of the process' end."""


@pytest.mark.parametrize("tp", [1, 2])
def test_what_ends_a_worker_is_logged_before_it_leaves(
    tp: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One of several ranks does not leave its group first, which may take for ever."""
    done: list[str] = []

    class Failing:
        def __init__(self, prepared: object, epoch: int) -> None:
            pass

        def on_signal(self, number: int, frame: object) -> None:
            pass

        def serve(self) -> None:
            raise ValueError("an unexpected thing")

        def close(self) -> None:
            done.append("closed")

    def leave(code: int) -> None:
        done.append(f"left with {code}")
        raise Left

    monkeypatch.setattr(worker, "prepare", lambda *_: None)
    monkeypatch.setattr(worker, "Worker", Failing)
    monkeypatch.setattr(worker, "keep_for_good", lambda: None)
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(logging, "shutdown", lambda: done.append("flushed"))
    with caplog.at_level(logging.ERROR), pytest.raises(ValueError if tp == 1 else Left):
        worker.run(replace(CONFIG, tp=tp))
    assert "worker one fails" in caplog.text and "an unexpected thing" in caplog.text
    assert done[:2] == (["closed"] if tp == 1 else ["flushed", "left with 1"])
