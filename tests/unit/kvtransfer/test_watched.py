"""A figure that is looked at in a thread of its own."""

import threading

import pytest

from kvtransfer import watched
from kvtransfer.watched import Watched

WAIT_S = 10.0


def test_it_is_there_at_once_and_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "INTERVAL_S", 0.001)
    looks, third = [], threading.Event()

    def look() -> int:
        looks.append(threading.current_thread())
        if len(looks) == 3:
            third.set()
        return len(looks)

    figure = Watched(look)
    assert figure.latest >= 1 and looks[0] is threading.current_thread()
    assert third.wait(WAIT_S)
    figure.close()
    assert figure.latest == len(looks) >= 3 and looks[1] is not threading.current_thread()
    figure.close()
    assert figure.latest == len(looks), "nobody looks any more"


def test_whoever_asks_does_not_wait_for_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "INTERVAL_S", 0.001)
    first, looking, go_on = [True], threading.Event(), threading.Event()

    def look() -> str:
        if first.pop() if first else False:
            return "first"
        looking.set()
        go_on.wait(WAIT_S)
        return "later"

    figure = Watched(look)
    assert looking.wait(WAIT_S)
    assert figure.latest == "first"
    go_on.set()
    figure.close()
    assert figure.latest == "later"
