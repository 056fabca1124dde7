"""Kills and stops the processes of a running cluster at random times, all drawn from the seed.

The launcher starts again what was killed, later each time, and gives up on a child that ends five times
without ever living for half a minute. Here no child dies more often than three times in a row that fast.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import httpx
import psutil

from tests.chaos.outages import Outages
from tests.chaos.report import Report
from tests.chaos.system import System, cable_of
from tests.patience import patient

KINDS = {"prefill": 3, "decode": 4, "prefill-transfer": 2, "decode-transfer": 2, "router": 1}
"""How often each is drawn, relative to the others."""
CABLE = {"cut": 2, "slow": 1, "lossy": 1}
"""The same of faults of the cable, where there is one."""
SLOW_S = (0.005, 0.1)
LOSSY = (0.005, 0.05)
CABLE_S = (0.2, 8.0)
"""Until it is mended."""
KILLS_SHARE = 0.6
CALM_SHARE = 0.5
"""Of the faults, those that wait until all is well again. The others come on top of what went before."""
PAUSE_S = (0.3, 4.0)
STOP_S = (0.1, 6.0)
ROUTER_STOP_S = (0.1, 3.0)
LASTED_S = 30.0
SHORT_LIVES = 3
LOOK_S = 0.2


class Faults:
    """`on_fault` gets the time just before the signal, what it does, and whether it is the death of a worker
    while all is well and another of its kind is there."""

    def __init__(
        self,
        cluster: System,
        workers: int,
        seed: str,
        outages: Outages,
        report: Report,
        on_fault: Callable[[float, str, bool], None],
    ) -> None:
        self._cluster, self.workers = cluster, workers
        self._random = Random(f"faults {seed}")
        self._outages, self._report = outages, report
        self._on_fault = on_fault
        self._short: Counter[str] = Counter()
        self._stopped: dict[int, tuple[psutil.Process, asyncio.TimerHandle]] = {}
        self._changed_s = 0.0
        self._causes: list[tuple[float, str]] = []
        self._began_s = time.monotonic()
        self._cable = cable_of(cluster)
        self._mending: asyncio.TimerHandle | None = None
        self._kinds = KINDS | (CABLE if self._cable is not None else {})

    async def run(self, until_s: float) -> None:
        """Returns at `until_s` of `time.monotonic`; what is stopped then goes on."""
        while True:
            pause_s, waits = self._random.uniform(*PAUSE_S), self._random.random() < CALM_SHARE
            while waits and self._outages.lasts and time.monotonic() < until_s:  # noqa: ASYNC110  (other processes)
                await asyncio.sleep(LOOK_S)
            if time.monotonic() + pause_s > until_s:
                break
            await asyncio.sleep(pause_s)
            self._one()
        for process, timer in list(self._stopped.values()):
            timer.cancel()
            self._resume(process)
        if self._mending is not None:
            self._mending.cancel()
            self._mend()

    async def watch(self) -> None:
        """Sees the ends of outages. Runs until it is cancelled."""
        async with httpx.AsyncClient(base_url=self._cluster.url, timeout=patient(5)) as http:
            while True:
                await asyncio.sleep(LOOK_S)
                asked_s = time.monotonic()
                if self._outages.lasts and not self._broken and await self._is_well(http, asked_s):
                    self._end_outage(time.monotonic())

    def _end_outage(self, at_s: float) -> None:
        self._outages.end(at_s)
        self._note("all is ready", at_s)
        if len(self._causes) == 1:  # of several, none can be said to have taken so long
            began_s, what = self._causes[0]
            self._report.outages_s[what].append(at_s - began_s)
        self._causes.clear()

    # ------------------------------------------------------------ faults

    def _one(self) -> None:
        kind = self._random.choices(list(self._kinds), list(self._kinds.values()))[0]
        kills, share = self._random.random() < KILLS_SHARE, self._random.random()
        if kind in CABLE:
            self._disturb(kind, share)
            return
        found = sorted(children(self._cluster).items())
        able = [(name, one) for name, one in found if kind_of(name) == kind and one.pid not in self._stopped]
        if not able:
            return
        name, process = able[self._random.randrange(len(able))]
        with contextlib.suppress(psutil.NoSuchProcess):  # it is just being restarted
            if kills:
                self._kill(kind, name, process, others=len(able) > 1)
            else:
                self._stop(kind, process, _between(ROUTER_STOP_S if kind == "router" else STOP_S, share))

    def _kill(self, kind: str, name: str, process: psutil.Process, others: bool) -> None:
        if time.time() - process.create_time() >= LASTED_S:
            self._short[name] = 0
        elif self._short[name] >= SHORT_LIVES:
            return
        self._short[name] += 1
        self._begin(f"kill {kind}", router_dies=kind == "router", others=others)
        process.kill()

    def _stop(self, kind: str, process: psutil.Process, for_s: float) -> None:
        self._begin(f"stop {kind}", router_dies=False)
        process.suspend()
        timer = asyncio.get_running_loop().call_later(for_s, self._resume, process)
        self._stopped[process.pid] = process, timer

    def _resume(self, process: psutil.Process) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()
        self._changed_s = time.monotonic()
        self._note("one that was stopped goes on", self._changed_s)
        del self._stopped[process.pid]

    def _disturb(self, kind: str, share: float) -> None:
        """Of the cable, until it is mended: one fault at a time."""
        if self._cable is None or self._mending is not None:
            return
        self._begin(f"{kind} cable", router_dies=False)
        if kind == "cut":
            self._cable.cut()
        elif kind == "slow":
            self._cable.delay(_between(SLOW_S, share))
        else:
            self._cable.loss(_between(LOSSY, share))
        for_s = _between(CABLE_S, self._random.random())
        self._mending = asyncio.get_running_loop().call_later(for_s, self._mend)

    def _mend(self) -> None:
        self._mending = None
        if self._cable is not None:
            self._cable.mend()
        self._changed_s = time.monotonic()
        self._note("the cable is mended", self._changed_s)

    @property
    def _broken(self) -> bool:
        return bool(self._stopped) or self._mending is not None

    def _note(self, what: str, at_s: float) -> None:
        self._report.timeline.append(f"{at_s - self._began_s:7.2f} s: {what}")

    def _begin(self, what: str, *, router_dies: bool, others: bool = False) -> None:
        self._report.faults[what] += 1
        spared = others and not self._outages.lasts
        self._changed_s = time.monotonic()
        self._outages.begin(self._changed_s, router_dies)
        self._causes.append((self._changed_s, what))
        self._note(what, self._changed_s)
        self._on_fault(self._changed_s, what, spared)

    # ------------------------------------------------------------ is all well?

    async def _is_well(self, http: httpx.AsyncClient, asked_s: float) -> bool:
        """By accounts that were made after the last fault and the last SIGCONT."""
        try:
            answer = await http.get("/cluster")
        except httpx.TransportError:
            return False
        return (
            answer.status_code == 200
            and self._changed_s < asked_s
            and is_complete(answer.json(), self.workers, time.monotonic() - self._changed_s)
        )


def is_complete(cluster: dict[str, Any], workers: int, since_s: float) -> bool:
    """Every worker is ready and has a transfer process, by accounts at most `since_s` old."""
    statuses = [one["status"] for one in cluster["workers"] if one["status"] is not None]
    return (
        cluster["ready"]
        and len(statuses) == workers
        and all(one["state"] == "ready" for one in statuses)
        and all(one["connection"] == "ready" for one in cluster["workers"])
        and all(one["status_age_s"] + one["status"]["slots_age_s"] < since_s for one in cluster["workers"])
    )


def _between(limits: tuple[float, float], share: float) -> float:
    return limits[0] + share * (limits[1] - limits[0])


def children(cluster: System) -> dict[str, psutil.Process]:
    """The launcher's children by the names it gave them."""
    found = {}
    for process in cluster.processes():
        try:
            arguments = process.cmdline()
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        if "--name" in arguments:
            found[arguments[arguments.index("--name") + 1]] = process
        elif "router" in arguments:
            found["router"] = process
    return found


def kind_of(name: str) -> str:
    """`decode-1-transfer` is a decode-transfer."""
    return "-".join(part for part in name.split("-") if not part.isdigit())
