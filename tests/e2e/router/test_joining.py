"""The router's real process and fake workers that join and leave it by a file, under load."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.protocol.messages import Prefill, ReserveKv, Role, StartDecode
from tests.e2e.askers import Askers
from tests.e2e.router.harness import DEADLINE_S, Router, running_router, until
from tests.fake_worker import FakeWorker, Script

ANSWER = [39, 40, 41, 42]
BODY = {"prompt": "a", "max_tokens": 4, "return_token_ids": True}


class Fakes:
    """Workers by name, and the file that lists them."""

    def __init__(self, directory: Path) -> None:
        directory.chmod(0o700)
        self._directory = directory
        self.file = directory / "workers"
        self.workers: dict[str, FakeWorker] = {}

    def endpoint(self, name: str) -> str:
        return f"ipc://{self._directory}/{name}"

    def start(self, name: str) -> FakeWorker:
        role: Role = "prefill" if name.startswith("p") else "decode"
        worker = FakeWorker(self.endpoint(name), role, Script(answers=[ANSWER]), name=name)
        self.workers[name] = worker
        return worker.__enter__()

    def list(self, *names: str, more: str = "") -> None:
        fresh = self._directory / "fresh"
        fresh.write_text("".join(f"{self.endpoint(name)}\n" for name in names) + more)
        fresh.replace(self.file)


@pytest.fixture(scope="module")
def served(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Fakes, Router]]:
    fakes = Fakes(tmp_path_factory.mktemp("j"))
    try:
        with running_router(model_dir, [], workers_file=str(fakes.file)) as router:
            yield fakes, router
            until(router.at_rest, "a router at rest")
    finally:
        for worker in fakes.workers.values():
            worker.stop()


def known(router: Router) -> dict[str, dict[str, Any]]:
    """What `/cluster` says of each worker, by the last part of its endpoint."""
    return {one["endpoint"].rpartition("/")[2]: one for one in router.get("/cluster")["workers"]}


def test_workers_join_and_leave_while_requests_run(served: tuple[Fakes, Router]) -> None:
    fakes, router = served
    with router.http() as http:
        assert http.post("/v1/completions", json={"prompt": "a"}).json()["error"]["code"] == "no_workers"
    fakes.start("p0")
    fakes.start("d0")
    fakes.list("p0", "d0")
    until(router.ready, "a ready router")
    with router.http() as http, Askers(lambda number: wrong_with(http), 4) as load:
        fakes.list("p0", "d0", "p1", "d1")
        until(lambda: len(known(router)) == 4, "workers that are listed and not there yet")
        asked_s = time.monotonic()
        new = [fakes.start("p1"), fakes.start("d1")]
        new[0].wait_for(Prefill)
        new[1].wait_for(ReserveKv)
        print(f"first work after {time.monotonic() - asked_s:.2f} s")
        # A line that is nonsense and a listed worker that cannot be: the rest is as listed.
        fakes.list("p1", "d1", more="nonsense\nipc:///nowhere/at/all\n")
        until(lambda: set(known(router)) == {"p1", "d1"}, "the first two have left")
        for name in ("p0", "d0"):
            fakes.workers[name].forget()
        seen = load.answered
        until(lambda: load.answered > seen + 20, "answers by the new ones alone")
        assert fakes.workers["p0"].of(Prefill) == fakes.workers["d0"].of(ReserveKv) == []
    assert load.wrong == []
    assert router.process.poll() is None


def test_a_leaving_worker_keeps_what_it_has_until_its_end(served: tuple[Fakes, Router]) -> None:
    fakes, router = served
    for name in ("p2", "d2"):
        fakes.start(name)
    fakes.list("p2", "d2")
    until(lambda: set(known(router)) == {"p2", "d2"}, "one pair")
    until(router.ready, "a ready router")
    held = fakes.workers["d2"]
    held.script = Script(answers=[ANSWER], hold_decode=True)
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask, router)
        (join,) = held.wait_for(StartDecode)
        for name in ("p3", "d3"):
            fakes.start(name)
        fakes.list("p3", "d3")
        # One has the KV that the other has not taken yet.
        until(lambda: all(known(router)[name]["leaving"] for name in ("p2", "d2")), "both leave")
        until(router.ready, "a ready router without it")
        assert ask(router) == ANSWER
        assert len(held.of(ReserveKv)) == len(fakes.workers["p2"].of(Prefill)) == 1, "no new work"
        assert known(router)["d2"]["router_view"]["live_requests"] == 1
        held.script = Script(answers=[ANSWER])
        held.act(lambda: held.decode(held.work_of(join.request_id), join.first_tokens))
        assert asking.result(DEADLINE_S) == ANSWER
    until(lambda: set(known(router)) == {"p3", "d3"}, "both have left")


def wrong_with(http: httpx.Client) -> str | None:
    answer = http.post("/v1/completions", json=BODY)
    right = answer.status_code == 200 and answer.json()["choices"][0]["token_ids"] == ANSWER
    return None if right else answer.text


def ask(router: Router, prompt: str | list[int] = "a") -> list[int]:
    with router.http() as http:
        answer = http.post("/v1/completions", json={**BODY, "prompt": prompt})
    assert answer.status_code == 200, answer.text
    tokens: list[int] = answer.json()["choices"][0]["token_ids"]
    return tokens


def test_a_repeated_prefix_goes_where_it_was_until_that_worker_has_a_new_life(
    served: tuple[Fakes, Router],
) -> None:
    fakes, router = served
    for name in ("p4", "p5", "d4"):
        fakes.start(name)
    fakes.list("p4", "p5", "d4")
    until(lambda: set(known(router)) == {"p4", "p5", "d4"}, "two prefill workers")
    until(lambda: all(one["status"] for one in known(router).values()), "all are ready")

    def went_to(prompt: list[int]) -> str:
        for name in ("p4", "p5"):
            fakes.workers[name].forget()
        assert ask(router, prompt) == ANSWER
        (name,) = [one for one in ("p4", "p5") if fakes.workers[one].of(Prefill)]
        return name

    long = [9] * 200
    holder = went_to(long)
    assert [went_to([*long, number]) for number in range(5)] == [holder] * 5
    assert {went_to([number, *long]) for number in (5, 6)} == {"p4", "p5"}, "they begin otherwise"
    assert went_to([*long, 6]) == holder
    fakes.workers[holder].stop()
    until(lambda: known(router)[holder]["connection"] != "ready", "its end is seen")
    fakes.start(holder)
    until(lambda: known(router)[holder]["status"], "its next life")
    assert went_to([*long, 7]) != holder, "it was given the latest prompt, and has nothing cached"
