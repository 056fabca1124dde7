"""Processes that are killed or stopped under running requests: no token is lost, repeated or changed.

The reference is transformers' greedy tokens of the undisturbed prompt. One cluster of two prefill and two
decode workers serves all tests; every test leaves it complete and at rest.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from tests.checkpoints import make_checkpoint
from tests.e2e.cluster import Cluster, wait_until
from tests.e2e.served import BACK_S, PROMPT, Served, stream
from tests.e2e.test_tokens import reference
from tests.patience import patient

COUNT = 400


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served[Cluster]]:
    directory = tmp_path_factory.mktemp("migration")
    model_dir = make_checkpoint("llama", directory / "model", seed=3, eos=False)
    wanted = reference(model_dir, [PROMPT], COUNT)[0]
    flags = ["--served-model-name", "tiny", "--prefill", "2", "--decode", "2"]
    flags += ["--worker-timeout", str(patient(2))]
    flags += ["--max-chunk-tokens", "64", "--mem-fraction", "0.1", "--no-prefix-cache"]
    with Cluster(model_dir, directory, *flags) as cluster:
        served = Served(cluster, wanted, 4)
        served.wait_complete()
        yield served


@pytest.fixture(autouse=True)
def left_as_found(served: Served[Cluster]) -> Iterator[None]:
    yield
    served.wait_complete()
    served.cluster.assert_at_rest()


def running_on(served: Served[Cluster], role: str) -> str:
    found: list[str] = []

    def runs() -> bool:
        name = served.busy(role)
        decoding = served.cluster.cluster()["router"]["phases"].get("decoding", 0)
        if name is not None and (role == "prefill" or decoding):
            found.append(name)
        return bool(found)

    wait_until(f"a request on a {role} worker", runs)
    return found[0]


def test_decode_workers_are_killed_in_mid_stream(served: Served[Cluster], asking: ThreadPoolExecutor) -> None:
    """A greedy stream, and both choices of a sampled request with penalties. Both workers die, so that the
    requests wait for the launcher to start another."""
    options = {"n": 2, "temperature": 1.0, "seed": 5, "presence_penalty": 0.5, "frequency_penalty": 0.2}
    greedy, sampled = served.whole(logprobs=0)["choices"][0], served.whole(**options)
    assert greedy["token_ids"] == served.wanted
    pids = [served.status(name)["pid"] for name in ("decode-0", "decode-1")]
    answer = asking.submit(served.whole, **options)
    killed: list[int] = []

    def kill(count: int) -> None:
        if count >= 20 and not killed:
            wait_until("both decode", lambda: served.cluster.cluster()["router"]["phases"]["decoding"] == 2)
            killed.extend(pids)
            for pid in pids:
                psutil.Process(pid).kill()

    text, logprobs, usage = stream(served, kill)
    assert killed and text == greedy["text"]
    assert logprobs == pytest.approx(greedy["logprobs"]["token_logprobs"], abs=1e-4)
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(PROMPT), COUNT)
    again = answer.result()
    assert [one["token_ids"] for one in again["choices"]] == [one["token_ids"] for one in sampled["choices"]]
    assert again["usage"] == sampled["usage"]
    assert served.metric('baton_migrations_total{reason="decode_lost"}') >= 2


def test_held_kv_is_pushed_again_and_not_computed_again(
    served: Served[Cluster], asking: ThreadPoolExecutor
) -> None:
    """Every decode worker is stopped, so that the KV cannot be committed, and then killed."""
    decodes = [served.status(name)["pid"] for name in ("decode-0", "decode-1")]
    computed, pushed = served.prefilled("prompt_tokens"), served.prefilled("pushes_again")
    for pid in decodes:
        psutil.Process(pid).suspend()
    answer = asking.submit(served.whole)
    wait_until("a first token", lambda: served.cluster.cluster()["router"]["phases"].get("joining", 0) > 0)
    for pid in decodes:
        psutil.Process(pid).kill()
    served.check(answer.result())
    assert served.prefilled("prompt_tokens") - computed == len(PROMPT)
    assert served.prefilled("pushes_again") > pushed


def test_a_prefill_worker_is_killed(served: Served[Cluster], asking: ThreadPoolExecutor) -> None:
    """Stopped first, so that the prompt cannot be through before it dies."""
    pids = {name: served.status(name)["pid"] for name in ("prefill-0", "prefill-1")}
    for pid in pids.values():
        psutil.Process(pid).suspend()
    answer = asking.submit(served.whole)
    name = running_on(served, "prefill")
    for other, pid in pids.items():
        if other != name:
            psutil.Process(pid).resume()
    psutil.Process(pids[name]).kill()
    served.check(answer.result())


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_transfer_process_is_killed(served: Served[Cluster], role: str, asking: ThreadPoolExecutor) -> None:
    """Stopped decode workers cannot commit; when they go on, the former transfer is lost to both sides."""
    decodes = [served.status(name)["pid"] for name in ("decode-0", "decode-1")]
    computed = served.prefilled("prompt_tokens")
    transfers = [served.status(f"{role}-{number}")["transfer_pid"] for number in (0, 1)]
    for pid in decodes:
        psutil.Process(pid).suspend()
    answer = asking.submit(served.whole)
    wait_until("a first token", lambda: served.cluster.cluster()["router"]["phases"].get("joining", 0) > 0)
    for pid in transfers:
        psutil.Process(pid).kill()
    for pid in decodes:
        psutil.Process(pid).resume()
    served.check(answer.result())
    assert served.prefilled("prompt_tokens") - computed == len(PROMPT), "the KV outlives the transfer process"


def test_a_stopped_worker_is_left_and_its_late_work_dropped(
    served: Served[Cluster], asking: ThreadPoolExecutor
) -> None:
    answer = asking.submit(served.whole)
    name = running_on(served, "decode")
    process = psutil.Process(served.status(name)["pid"])
    process.suspend()
    served.check(answer.result())
    process.resume()
    wait_until("it is known again", lambda: name in served.workers(), BACK_S)
    assert served.status(name)["pid"] == process.pid
