"""The router's real process and fake workers that fail: what is asked of whom next."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.protocol.messages import (
    Cancel,
    Failed,
    KvTransferFailed,
    Prefill,
    RepushKv,
    ReserveKv,
    StartDecode,
)
from tests.e2e.router.harness import DEADLINE_S, Router, running_router, until
from tests.fake_worker import FakeWorker, Script

ANSWER = [39, 40, 41, 42]


class Fakes:
    """One prefill and two decode workers, each with a script of its own."""

    def __init__(self, directory: Path) -> None:
        directory.chmod(0o700)
        self.endpoints = [f"ipc://{directory}/{name}" for name in ("p", "d0", "d1")]
        self.prefill = FakeWorker(self.endpoints[0], "prefill", Script())
        self.decodes = [self.decode(number) for number in (0, 1)]

    def decode(self, number: int, epoch: int = 1) -> FakeWorker:
        return FakeWorker(self.endpoints[1 + number], "decode", Script(), name=f"d{number}", epoch=epoch)

    def use(self, prefill: Script, *decodes: Script) -> None:
        self.prefill.script = prefill
        for worker, script in zip(self.decodes, decodes, strict=True):
            worker.script = script
        for worker in (self.prefill, *self.decodes):
            worker.forget()

    def of(self, kind: type[Any]) -> list[tuple[int, Any]]:
        return [(number, one) for number, worker in enumerate(self.decodes) for one in worker.of(kind)]


@pytest.fixture(scope="module")
def served(model_dir: Path, sockets: Path) -> Iterator[tuple[Fakes, Router]]:
    fakes = Fakes(sockets)
    with (
        fakes.prefill,
        fakes.decodes[0],
        fakes.decodes[1],
        running_router(model_dir, fakes.endpoints) as router,
    ):
        until(router.ready, "a ready router")
        yield fakes, router
        until(router.at_rest, "a router at rest")


class Asking:
    """A request in a thread of its own."""

    def __init__(self, router: Router) -> None:
        self._answers: list[httpx.Response] = []
        self._thread = threading.Thread(target=self._ask, args=(router,))
        self._thread.start()

    def _ask(self, router: Router) -> None:
        with router.http() as http:
            body = {"prompt": "a", "max_tokens": 4, "return_token_ids": True}
            self._answers.append(http.post("/v1/completions", json=body))

    def answer(self) -> httpx.Response:
        self._thread.join(DEADLINE_S)
        return self._answers[0]

    def check(self) -> None:
        answer = self.answer()
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["token_ids"] == ANSWER
        assert answer.json()["usage"]["completion_tokens"] == 4


def failing(code: Any) -> Script:
    return Script(answers=[ANSWER], fail_reserve=Failed(1, code, "not here", True))


@pytest.mark.parametrize("code", ["overloaded", "draining", "transfer"])
def test_a_worker_that_cannot_is_replaced_by_one_that_can(served: tuple[Fakes, Router], code: str) -> None:
    fakes, router = served
    good = Script(answers=[ANSWER])
    for bad in (0, 1):
        fakes.use(good, *[failing(code) if number == bad else good for number in (0, 1)])
        Asking(router).check()
    until(lambda: fakes.of(StartDecode), "a join")
    assert len(fakes.prefill.of(Prefill)) == 1


def test_nobody_is_asked_again_who_is_overloaded(served: tuple[Fakes, Router]) -> None:
    fakes, router = served
    fakes.use(Script(hold_prefill=True), failing("overloaded"), failing("overloaded"))
    answer = Asking(router).answer()
    assert (answer.status_code, "retry-after" in answer.headers) == (429, True)
    assert sorted(number for number, _ in fakes.of(ReserveKv)) == [0, 1]
    fakes.prefill.wait_for(Cancel)


def test_undelivered_kv_is_pushed_again_and_its_former_worker_told(served: tuple[Fakes, Router]) -> None:
    fakes, router = served
    silent, good = Script(answers=[ANSWER], hold_decode=True), Script(answers=[ANSWER])
    fakes.use(good, silent, silent)
    asking = Asking(router)
    first = until(lambda: fakes.of(StartDecode), "a join")[0]
    (old,) = [one for number, one in fakes.of(ReserveKv)]
    for worker in fakes.decodes:
        worker.script = good
    prefill = fakes.prefill.of(Prefill)[0]
    fakes.prefill.say([KvTransferFailed(prefill.work.request_id, 12345, "of another attempt")])
    fakes.prefill.say([KvTransferFailed(prefill.work.request_id, prefill.transfer_id, "no way")])
    asking.check()
    (push,) = fakes.prefill.wait_for(RepushKv)
    new = next(one for _, one in fakes.of(ReserveKv) if one.transfer_id == push.transfer_id)
    assert push.request_id == prefill.work.request_id
    assert new.work.request_id != old.work.request_id and new.work.prompt == old.work.prompt
    assert len(fakes.prefill.of(Prefill)) == 1
    until(lambda: (first[0], Cancel(old.work.request_id)) in fakes.of(Cancel), "the former worker is told")
    assert len(fakes.prefill.of(RepushKv)) == 1


def test_who_holds_kv_of_a_request_that_is_over_is_told(served: tuple[Fakes, Router]) -> None:
    """The decode worker had it all the time; only the prefill worker has not heard of it."""
    fakes, router = served
    good = Script(answers=[ANSWER])
    fakes.use(good, good, good)
    Asking(router).check()
    prefill = fakes.prefill.of(Prefill)[0]
    fakes.prefill.say([KvTransferFailed(prefill.work.request_id, prefill.transfer_id, "lost")])
    assert fakes.prefill.wait_for(Cancel)[-1] == Cancel(prefill.work.request_id)


def test_held_kv_goes_to_the_worker_that_is_left(served: tuple[Fakes, Router]) -> None:
    fakes, router = served
    silent = Script(answers=[ANSWER], hold_decode=True)
    fakes.use(Script(answers=[ANSWER]), silent, silent)
    asking = Asking(router)
    lost = until(lambda: fakes.of(StartDecode), "a join")[0][0]
    fakes.decodes[1 - lost].script = Script(answers=[ANSWER])
    fakes.decodes[lost].stop()
    asking.check()
    fakes.prefill.wait_for(RepushKv)
    assert len(fakes.prefill.of(Prefill)) == 1 and len(fakes.prefill.of(RepushKv)) == 1
    with router.http() as http:
        text = http.get("/metrics").text
    assert 'baton_migrations_total{reason="decode_lost"} 1.0' in text
    assert 'baton_migrations_total{reason="transfer"}' in text
