"""Processes that are stopped and go on, a router and a launcher that are killed, a buffer of two slots.

One cluster of one prefill and two decode workers serves all tests; every test leaves it complete and at rest,
and compares tokens with transformers' greedy ones. The last one kills the launcher.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.checkpoints import make_checkpoint
from tests.e2e.cluster import Cluster, wait_until
from tests.e2e.served import PROMPT, Served, stream
from tests.e2e.test_tokens import prompt_of, reference
from tests.patience import patient

WORKERS = 3
COUNT = 200
LONG = 700
"""Prompt tokens that take several times what two slots hold."""
AT_ONCE = 12
FEW = 4
FLAGS = ["--served-model-name", "tiny"]
FLAGS += ["--worker-timeout", str(patient(2)), "--peer-timeout", str(patient(2))]
FLAGS += ["--staging-slots", "2", "--staging-slot-bytes", "64KiB", "--max-chunk-tokens", "64"]
FLAGS += ["--no-prefix-cache", "--drain-timeout", "90"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("faults") / "model", seed=3, eos=False)


@pytest.fixture(scope="module")
def served(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served[Cluster]]:
    wanted = reference(model_dir, [PROMPT], COUNT)[0]
    cluster = Cluster(model_dir, tmp_path_factory.mktemp("first"), "--decode", "2", *FLAGS)
    served = Served(cluster, wanted, WORKERS)
    try:
        cluster.wait_ready()
        served.wait_complete()
        yield served
    finally:
        cluster.kill()
        print(cluster.log_path.read_text())


def at_rest(served: Served[Cluster]) -> None:
    served.wait_complete()
    served.cluster.assert_at_rest()


def phase(served: Served[Cluster], name: str) -> int:
    return int(served.cluster.cluster()["router"]["phases"].get(name, 0))


def test_the_router_is_killed_in_mid_stream(served: Served[Cluster]) -> None:
    """Its connections close; the workers drop what it asked for; its successor listens at the same port."""
    old = served.cluster.cluster()["router"]["pid"]
    seen: list[int] = []

    def kill(count: int) -> None:
        seen.append(count)
        if count >= 20 and len(seen) == len(set(seen)):
            psutil.Process(old).kill()

    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        stream(served, kill)
    assert 20 <= max(seen) < COUNT
    served.cluster.wait_ready()
    at_rest(served)
    assert served.cluster.cluster()["router"]["pid"] != old
    served.check(served.whole())


def test_a_prefill_worker_stops_before_the_first_token_and_goes_on(
    served: Served[Cluster], asking: ThreadPoolExecutor
) -> None:
    """The router gives it up; there is no other, so the request waits until it is heard of again."""
    prefill = psutil.Process(served.status("prefill-0")["pid"])
    prefill.suspend()
    answer = asking.submit(served.whole)
    wait_until("the router has lost it", lambda: "prefill-0" not in served.workers())
    assert not answer.done()
    prefill.resume()
    served.check(answer.result())
    at_rest(served)
    assert served.status("prefill-0")["pid"] == prefill.pid
    assert served.metric('baton_migrations_total{reason="prefill_lost"}') >= 1


def test_a_transfer_process_stops_for_a_moment(served: Served[Cluster], asking: ThreadPoolExecutor) -> None:
    """For less than anybody's patience: nothing is said or done a second time."""
    migrations = served.metric("baton_migrations_total")
    pid = served.status("prefill-0")["transfer_pid"]
    psutil.Process(pid).suspend()
    try:
        answer = asking.submit(served.whole)
        wait_until("a first token", lambda: phase(served, "joining") > 0)
    finally:
        psutil.Process(pid).resume()
    served.check(answer.result())
    assert served.metric("baton_migrations_total") == migrations
    at_rest(served)


def test_transfer_processes_stop_for_longer_than_their_peers_wait(
    served: Served[Cluster], asking: ThreadPoolExecutor
) -> None:
    """The KV stays where it was computed, and is pushed again when the other side is back."""
    computed, pushed = served.prefilled("prompt_tokens"), served.prefilled("pushes_again")
    transfers = [psutil.Process(served.status(f"decode-{number}")["transfer_pid"]) for number in (0, 1)]
    for one in transfers:
        one.suspend()
    try:
        answer = asking.submit(served.whole)
        wait_until("a first token", lambda: phase(served, "joining") > 0)
        wait_until("they are given up", lambda: all(s["transfer_pid"] is None for s in decodes(served)))
    finally:
        for one in transfers:
            one.resume()
    served.check(answer.result())
    assert served.prefilled("prompt_tokens") - computed == len(PROMPT), "no token is computed twice"
    assert served.prefilled("pushes_again") > pushed
    at_rest(served)


def decodes(served: Served[Cluster]) -> list[dict[str, object]]:
    return [one["status"] for name, one in served.workers().items() if name.startswith("decode")]


def test_two_slots_serve_many_long_prompts(
    served: Served[Cluster], model_dir: Path, asking: ThreadPoolExecutor
) -> None:
    """Whoever finds no slot waits; nobody fails, and nobody gets another's KV."""
    prompts = [prompt_of(LONG + number, 11) for number in range(AT_ONCE)]
    alone = [served.whole(prompt=prompt, max_tokens=FEW) for prompt in prompts]
    together = list(asking.map(lambda prompt: served.whole(prompt=prompt, max_tokens=FEW), prompts))
    tokens = [one["choices"][0]["token_ids"] for one in together]
    assert tokens == [one["choices"][0]["token_ids"] for one in alone]
    assert tokens[:2] == reference(model_dir, prompts[:2], FEW)
    assert all(one["status"]["slots"]["total"] == 2 for one in served.workers().values())
    at_rest(served)


def test_a_launcher_stops_and_goes_on(served: Served[Cluster], asking: ThreadPoolExecutor) -> None:
    """Its children serve without it. One that dies meanwhile is missed only when it goes on."""
    old = served.status("prefill-0")["pid"]
    launcher = psutil.Process(served.cluster.launcher.pid)
    launcher.suspend()
    try:
        served.check(served.whole())
        psutil.Process(old).suspend()
        answer = asking.submit(served.whole)
        wait_until("the request is with it", lambda: served.busy("prefill") is not None)
        psutil.Process(old).kill()
        wait_until("the router misses it", lambda: "prefill-0" not in served.workers())
        assert psutil.Process(old).status() == psutil.STATUS_ZOMBIE, "nobody has waited for it"
    finally:
        launcher.resume()
    served.check(answer.result())
    at_rest(served)
    assert served.status("prefill-0")["pid"] != old


def test_a_launcher_is_killed_and_started_again_at_the_same_port(
    served: Served[Cluster], model_dir: Path, tmp_path: Path
) -> None:
    """While its children drain, the port is theirs; then the next launcher takes it."""
    first = served.cluster
    children = first.processes()
    killed: list[int] = []

    def kill(count: int) -> None:
        # Without a launcher all drain at once, a worker for a fifth of the time: what is left must be short.
        if count >= COUNT // 2 and not killed:
            killed.append(count)
            first.launcher.kill()

    text, _, usage = stream(served, kill)
    assert killed and usage["completion_tokens"] == COUNT and text
    first.http.close()
    first.launcher.wait(patient(20))
    first.assert_nothing_left(children)
    with Cluster(model_dir, tmp_path, *FLAGS, port=first.port) as second:
        again = Served(second, served.wanted, 2)
        again.wait_complete()
        again.check(again.whole())
        second.assert_at_rest()
