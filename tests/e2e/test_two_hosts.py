"""A prefill and a decode worker on two hosts, and what becomes of requests when the cable between them fails.

The hosts are network namespaces of one machine (two_hosts.py). Where those cannot be made, tests are skipped.
Every test leaves the cable whole and the hosts at rest, and compares tokens with transformers' greedy ones.
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.e2e.cluster import wait_until
from tests.e2e.served import PROMPT, Served, stream
from tests.e2e.test_tokens import prompt_of, reference
from tests.e2e.two_hosts import NoNamespaces, TwoHosts
from tests.e2e.wire import NAMESPACES
from tests.patience import patient

COUNT = 200
LONG = prompt_of(800, 13)
"""Its KV takes many times what the slots hold, so that a transfer is still under way when it is cut."""
FEW = 8
FLOAT_BYTES = 4
STAGING = ("--staging-slots", "4", "--staging-slot-bytes", "64KiB")


class Hosts(Served[TwoHosts]):
    def __init__(self, hosts: TwoHosts, model_dir: Path) -> None:
        short, long = (reference(model_dir, [prompt], COUNT)[0] for prompt in (PROMPT, LONG))
        super().__init__(hosts, short, 2)
        self.hosts, self.cable, self.wanted_of_long = hosts, hosts.cable, long
        model = json.loads((model_dir / "config.json").read_text())
        heads, layers = model["num_key_value_heads"], model["num_hidden_layers"]
        self.token_bytes = layers * 2 * heads * model["head_dim"] * FLOAT_BYTES

    def lost(self) -> bool:
        """Whether the router has lost the prefill worker, which is on the other host."""
        return "prefill" not in self.workers()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    directory = tmp_path_factory.mktemp("hosts")
    model_dir = make_checkpoint("llama", directory / "model", seed=3, eos=False)
    hosts = TwoHosts(
        model_dir,
        directory,
        transfer=("--peer-timeout", str(patient(2)), "--transfer-timeout", str(patient(20)), *STAGING),
        worker=("--max-chunk-tokens", "64", "--no-prefix-cache", *STAGING),
        router=(
            "--worker-timeout",
            str(patient(2)),
        ),
    )
    try:
        with hosts:
            yield Hosts(hosts, model_dir)
    except NoNamespaces as error:
        pytest.skip(f"two hosts need network namespaces and TAP devices: {error}")
    assert not list(NAMESPACES.glob(f"baton-{os.getpid()}-*")), "the namespaces are gone"


@pytest.fixture(autouse=True)
def left_as_found(served: Hosts) -> Iterator[None]:
    yield
    served.cable.mend()
    served.hosts.plug("prefill")
    served.wait_complete()
    served.cluster.assert_at_rest()


def test_tokens_are_right_over_tcp_with_keys(served: Hosts) -> None:
    served.check(served.whole())
    carried_bytes = served.cable.carried_bytes()
    answer = served.whole(prompt=LONG, max_tokens=FEW)
    assert served.cable.carried_bytes() - carried_bytes > len(LONG) * served.token_bytes, "KV took the cable"
    assert answer["choices"][0]["token_ids"] == served.wanted_of_long[:FEW]
    assert {one["status"]["mover"] for one in served.workers().values()} == {"nixl"}


def test_a_slow_and_lossy_cable_costs_time_only(served: Hosts, asking: ThreadPoolExecutor) -> None:
    served.cable.delay(0.02)
    served.cable.loss(0.02)
    prompts = [PROMPT, LONG, PROMPT, LONG]
    answers = list(asking.map(lambda prompt: served.whole(prompt=prompt, max_tokens=FEW), prompts))
    tokens = [answer["choices"][0]["token_ids"] for answer in answers]
    assert tokens == [served.wanted[:FEW], served.wanted_of_long[:FEW]] * 2


def test_the_cable_is_cut_in_mid_stream(served: Hosts, asking: ThreadPoolExecutor) -> None:
    """A stream whose KV has been handed over goes on; a new request is refused while nobody can take it."""
    right = served.whole()["choices"][0]["text"]
    cut: list[int] = []

    def on_token(count: int) -> None:
        if count >= 20 and not cut:
            cut.append(count)
            served.cable.cut()

    text, _, usage = stream(served, on_token)
    assert cut and text == right and usage["completion_tokens"] == COUNT
    wait_until("the other host is missed", served.lost)
    refused = served.cluster.http.post("/v1/completions", json={"prompt": PROMPT})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_workers")
    assert "retry-after" in refused.headers
    served.cable.join()
    served.wait_complete()
    served.check(served.whole())


@pytest.mark.parametrize("how", ["cable", "device"])
def test_the_cable_is_cut_in_mid_transfer(served: Hosts, how: str, asking: ThreadPoolExecutor) -> None:
    """Segments are on their way. The request waits for the other host, and is done again."""
    served.cable.delay(0.1)
    answer = asking.submit(served.whole, prompt=LONG, max_tokens=COUNT)

    def under_way() -> bool:
        slots = served.status("decode")["slots"]
        return bool(slots["granted"] or slots["filled"])

    wait_until("KV is on its way", under_way)
    served.cable.cut() if how == "cable" else served.hosts.unplug("prefill")
    wait_until("the other host is missed", served.lost)
    assert not answer.done()
    served.cable.mend() if how == "cable" else served.hosts.plug("prefill")
    assert answer.result()["choices"][0]["token_ids"] == served.wanted_of_long
