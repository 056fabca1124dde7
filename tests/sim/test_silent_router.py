"""A router that is stopped for longer than its workers wait: they drop what it asked for, and when it goes on
it has the rest computed again. In virtual time, with the workers' patience made shorter than a request."""

import pytest

import services.worker
from tests.sim.clients import Client, Wish
from tests.sim.engine import EOS, continuation
from tests.sim.kernel import Violation
from tests.sim.processes import RouterHost, TransferHost
from tests.sim.scenario import Scenario

PATIENCE_S = 2.5
STEP_S = 0.5
MAX_TOKENS = 14


class StoppedRouter(Scenario):
    """One prefill and two decode workers, and steps that take so long that requests are met half-way."""

    def _build(self) -> None:
        for name, role in (("prefill0", "prefill"), ("decode0", "decode"), ("decode1", "decode")):
            transfer = TransferHost(self.seams, f"{name}.transfer", 4, True, 60.0)
            self.transfers.append(transfer)
            self._worker(name, role, transfer.name)  # type: ignore[arg-type]
            self.workers[-1].step_s = lambda: STEP_S
        endpoints = tuple(worker.config.listen for worker in self.workers)
        self.routers = [RouterHost(self.seams, "router0", endpoints, 60.0)]

    def ask(self, count: int) -> None:
        """Of different prompts, all of which have the full number of tokens to go."""
        number = 1
        while len(self.clients) < count:
            number += 1
            prompt = [number, 5, 6]
            if EOS in continuation(prompt, 0, 9, MAX_TOKENS):
                continue
            client = Client(self.world, f"client{number}", self.routers[0], Wish(prompt, 9, MAX_TOKENS, 1))
            self.clients.append(client)
            client.ask()

    def restless(self) -> list[str]:
        return [rest for one in (*self.workers, *self.transfers) if (rest := one.rest()) is not None]

    def run(self) -> None:
        world, router = self.world, self.routers[0]
        for process in self.processes:
            process.start()
        self._until(self._serving, 20.0, "the cluster serves", self._who_does_not_serve)
        self.ask(4)
        self._until(
            lambda: all(client.got[0] for client in self.clients), 20.0, "all decode", self._what_is_left
        )
        router.hang(3 * PATIENCE_S)
        world.run_until(world.now_s + 2 * PATIENCE_S)
        if left := self.restless():
            raise Violation(f"for a router that is silent this is kept: {left}")
        if any(client.end for client in self.clients):
            raise Violation("a request had its end before the router was stopped for long")
        self._until(self._at_rest, 60.0, "all is at rest", self._what_is_left)
        if [client.end for client in self.clients] != ["done"] * len(self.clients):
            raise Violation(f"{[(client.end, client.error) for client in self.clients]}")


@pytest.mark.parametrize("seed", range(5))
def test_workers_drop_a_silent_routers_work_and_it_is_done_again(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services.worker, "ROUTER_SILENCE_S", PATIENCE_S)
    scenario = StoppedRouter(seed)
    with scenario.seams.installed():
        scenario.run()
    assert all(len(client.got[0]) == MAX_TOKENS for client in scenario.clients)
