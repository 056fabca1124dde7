"""One seed: a cluster, what clients want of it, what goes wrong, and what must have become of it.

1. The cluster starts; clients come while faults happen.
2. The faults stop: who is dead starts again, who is stopped goes on, partitions heal.
3. Within a bounded time every client has seen its end, and nothing is held anywhere.
4. New clients come, who must all get what they want; and again nothing is left.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from services.protocol.messages import Role
from tests.sim.clients import Client, Wish
from tests.sim.engine import PAGE_TOKENS
from tests.sim.faults import Faults
from tests.sim.kernel import START_S, LogEntry, Process, Violation, World
from tests.sim.processes import RouterHost, TransferHost, WorkerHost
from tests.sim.seams import Seams

CHAOS_S = 5.0
REST_WITHIN_S = 60.0
CLEARED_WITHIN_S = 2.0
"""Without faults nothing waits for a deadline."""
START_WITHIN_S = 20.0
NOTICED_S = 3.0
"""After so long everybody has noticed what happened to the others: pings are a second apart at most."""
SYSTEM_PROMPT = [(7 * at + 3) % 996 + 1 for at in range(12)]


@dataclass
class Outcome:
    seed: int
    violation: str | None
    log: list[LogEntry]
    events: int
    virtual_s: float
    ends: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    drops: Counter[str] = field(default_factory=Counter)


class Scenario:
    """`hostile` names a boundary ("worker to router") where frames are changed, repeated, replayed and lost;
    no process is crashed then. What clients get is not looked at, only that they and all processes end well.
    """

    def __init__(self, seed: int, hostile: str | None = None) -> None:
        self.world = World(seed)
        self.rng: Random = self.world.rng
        self.seams = Seams(self.world)
        self.clients: list[Client] = []
        lossy = hostile is not None or self.rng.random() < 0.25
        # Only a frame that is lost while its connection lives is made up for by a deadline. Whatever else
        # happens, all must come to rest long before one.
        self.timeout_s = self.rng.choice((4.0, 8.0, 15.0)) if lossy else 600.0
        self.pages = self.rng.choice((8, 12, 24))
        self.transfers: list[TransferHost] = []
        self.workers: list[WorkerHost] = []
        self._build()
        self._hostile = hostile
        any_at_all = self.rng.random() < 0.85 or hostile is not None
        self.faults = Faults(self.world, self.seams, any_at_all, lossy, hostile)

    # ------------------------------------------------------------ the cluster

    def _build(self) -> None:
        rng = self.rng
        checksum = rng.random() < 0.5
        if rng.random() < 0.15:
            for index in range(rng.randint(1, 2)):
                self._worker(f"unified{index}", "unified", None)
        else:
            most = rng.choice((1, 2, 2, 3))
            counts: dict[Role, int] = {"prefill": rng.randint(1, most), "decode": rng.randint(1, most)}
            for role, count in counts.items():
                for index in range(count):
                    name = f"{role}{index}"
                    slots = rng.choice((2, 3, 4, 8))
                    transfer = TransferHost(self.seams, f"{name}.transfer", slots, checksum, 4.0)
                    self.transfers.append(transfer)
                    self._worker(name, role, transfer.name)
        endpoints = tuple(worker.config.listen for worker in self.workers)
        self.routers = [
            RouterHost(self.seams, f"router{index}", endpoints, self.timeout_s)
            for index in range(rng.choice((1, 1, 2, 3)))
        ]

    def _worker(self, name: str, role: Role, transfer: str | None) -> None:
        scale_s = self.rng.choice((0.002, 0.02))

        def step_s() -> float:
            return self.rng.uniform(0.5, 2.0) * scale_s

        self.workers.append(WorkerHost(self.seams, name, role, self.pages, transfer, step_s))

    @property
    def processes(self) -> list[Process]:
        return [*self.transfers, *self.workers, *self.routers]

    def wish(self, patient: bool) -> Wish:
        rng = self.rng
        longest = self.pages * PAGE_TOKENS
        whole_pages = [one for client in self.clients if (one := _whole_pages(client.wish.prompt))]
        if whole_pages and rng.random() < 0.25:
            prompt = rng.choice(whole_pages)  # found in caches from its first token to its last
        else:
            prompt = list(SYSTEM_PROMPT[: rng.choice((0, 0, 4, 12))])
            prompt += [rng.randint(1, 996) for _ in range(rng.randint(1, min(26, longest - len(prompt) - 2)))]
        max_tokens = rng.randint(1, min(14, longest - len(prompt)))
        choices = rng.choice((1, 1, 1, 2, 3))
        stops = {choice: rng.randint(1, 8) for choice in range(choices) if rng.random() < 0.2}
        patience_s = None if patient or rng.random() < 0.8 else rng.uniform(0.0, 1.0)
        salt = rng.choice((b"", b"", b"tenant"))
        return Wish(prompt, rng.getrandbits(31), max_tokens, choices, salt, stops, patience_s)

    def _client(self, router: RouterHost, at_s: float, patient: bool) -> None:
        client = Client(self.world, f"client{len(self.clients)}", router, self.wish(patient))
        client.looks = patient or self._hostile is None
        self.clients.append(client)
        self.world.after(at_s, client.ask)

    # ------------------------------------------------------------ the run

    def run(self) -> None:
        """Raises Violation, or whatever shipped code should not have raised."""
        world, rng = self.world, self.rng
        for process in rng.sample(self.processes, len(self.processes)):
            process.start()
        self._until(self._serving, START_WITHIN_S, "the cluster serves", self._who_does_not_serve)
        self.faults.plan(self.processes, CHAOS_S)
        crowd = rng.choice((1, 2, 4, 7))
        for _ in range(crowd):
            self._client(rng.choice(self.routers), rng.uniform(0.0, 0.6 * CHAOS_S), patient=False)
        busy_until_s = world.now_s + (CHAOS_S if self.faults.any else 0.6 * CHAOS_S)
        world.run_until(busy_until_s)
        self.faults.stop()
        self._until(self._at_rest, REST_WITHIN_S, "all is at rest", self._what_is_left)
        if self.faults.any:
            world.run_until(world.now_s + NOTICED_S)
        self._until(self._serving, START_WITHIN_S, "the cluster serves again", self._who_does_not_serve)
        before = len(self.clients)
        for router in self.routers:
            for _ in range(2):
                self._client(router, rng.uniform(0.0, 0.1), patient=True)
        self._until(self._all_ended, REST_WITHIN_S, "every client has its end", self._what_is_left)
        self._until(self._at_rest, CLEARED_WITHIN_S, "all is at rest again", self._what_is_left)
        for client in self.clients if not self.faults.any else self.clients[before:]:
            if client.end not in ("done", "left"):
                raise Violation(f"{client.name} {client.end} without a fault: {client.error}")

    def _until(self, done: Callable[[], bool], within_s: float, what: str, why: Callable[[], str]) -> None:
        # Looked at ten times a second, not after every event: it looks at everything.
        end_s = self.world.now_s + within_s
        while not done():
            for process in self.processes:  # who was told to end may end later than the faults
                process.start()
            if self.world.now_s >= end_s:
                raise Violation(f"not within {within_s} s: {what}. {why()}")
            self.world.run_until(self.world.now_s + 0.1)

    def _serving(self) -> bool:
        if not all(host.worker is not None for host in self.workers):
            return False
        if not all(router.ready() for router in self.routers):
            return False
        return all(
            client.status is not None and client.status.state == "ready"
            for router in self.routers
            if router.dispatcher is not None
            for client in router.dispatcher.clients.values()
        )

    def _who_does_not_serve(self) -> str:
        return ", ".join(
            f"{router.name}: {[(c.endpoint, c.state.value) for c in router.dispatcher.clients.values()]}"
            for router in self.routers
            if router.dispatcher is not None
        )

    def _at_rest(self) -> bool:
        return self._all_ended() and all(process.rest() is None for process in self.processes)

    def _all_ended(self) -> bool:
        return all(client.end is not None for client in self.clients)

    def _what_is_left(self) -> str:
        left = [f"{client.name} waits" for client in self.clients if client.end is None]
        left += [f"{one.name}: {rest}" for one in self.processes if (rest := one.rest()) is not None]
        return "; ".join(left)

    def outcome(self, violation: str | None) -> Outcome:
        drops: Counter[str] = Counter()
        for transfer in self.transfers:
            if transfer.machine is not None:
                drops.update(transfer.machine.outbox.drops)
        return Outcome(
            self.world.seed,
            violation,
            self.world.log,
            self.world.events,
            self.world.now_s - START_S,
            Counter(str(client.end) for client in self.clients),
            self.faults.happened,
            drops,
        )


def _whole_pages(prompt: list[int]) -> list[int]:
    return prompt[: len(prompt) // PAGE_TOKENS * PAGE_TOKENS]


def run_seed(seed: int, hostile: str | None = None) -> Outcome:
    """The whole of one seed, and nothing but the seed decides what happens. See `Scenario`."""
    logging.disable(logging.CRITICAL)
    scenario = Scenario(seed, hostile)
    try:
        with scenario.seams.installed():
            scenario.run()
    except Exception as error:
        return scenario.outcome(f"{type(error).__name__}: {error}")
    finally:
        logging.disable(logging.NOTSET)
    return scenario.outcome(None)
