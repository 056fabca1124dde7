"""What the router adds, without any model: `python -m deploy.bench.router.router`.

Two processes: the router on a core of its own, and this one on another, with the clients and with workers
that answer at once, all in one thread (`http_client.py`, `fake_worker.py`). Measured:

- latency at 200 requests a second, at random times (Poisson), where requests meet, and evenly spaced.
  `GET /version` shows what HTTP and the machine cost without any of ours; the first token's time is from the
  client's write to its first frame. In between, the worker stamps when it has `Prefill` and when it begins to
  answer: what is before and after is the router's own, as far as anybody outside can tell, with the kernel's
  work of moving bytes between the processes in it;
- the streaming ceiling: many streams fed one token each a step, faster and faster, until the client no longer
  gets them in time. Tokens a second by the clock, and by the router process's CPU time.
"""

import argparse
import json
import os
import platform
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deploy.bench.router.http_client import GET_VERSION, KeepAliveConnection, PromptBodies, Stamps, completion
from deploy.bench.router.router_process import Cluster, Cores, cluster

PROMPT_CHARACTERS = 960
SLICE_S = 2.0
"""Bare requests and real ones take turns, so that both meet the same machine."""
WARM_UP_REQUESTS = 200
LIMIT_S = 120.0
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
SPACINGS = ("poisson", "even")
TOKEN_RATES = (10_000, 25_000, 50_000, 100_000)
TOKEN_RATE_S = 3.0
STREAMING_REST_S = 0.0005


@dataclass
class RouterLoad:
    """What one kind of request met: everybody's stamps, and the router's CPU seconds for all of them."""

    stamps: list[Stamps] = field(default_factory=list)
    cpu_s: float = 0.0

    def cpu_ms_each(self) -> float:
        return self.cpu_s / len(self.stamps) * 1e3


class Arrivals:
    """Requests of one kind, sent at random or evenly spaced times over as many connections as are needed."""

    def __init__(self, at: Cluster, rate: float, spacing: str, prompts: PromptBodies | None) -> None:
        self._cluster, self._rate, self._prompts = at, rate, prompts
        self._is_even = spacing == "even"
        self._random = random.Random(1)
        self._seeds = 0
        self._idle: list[KeepAliveConnection] = []
        self._open = 0

    def warm_up(self) -> None:
        for _ in range(WARM_UP_REQUESTS):
            self._send(Stamps())
            self._cluster.loop.run(lambda: self._open == 0, LIMIT_S)

    def run(self, load: RouterLoad, duration_s: float) -> None:
        """One slice, added to `load`."""
        end_s = time.monotonic() + duration_s
        before_s = self._cluster.cpu_s()

        def at(now_s: float) -> float:
            if now_s < end_s:
                load.stamps.append(Stamps())
                self._send(load.stamps[-1])
            return now_s + (1 / self._rate if self._is_even else self._random.expovariate(self._rate))

        self._cluster.loop.run(lambda: self._open == 0 and time.monotonic() >= end_s, LIMIT_S, at)
        load.cpu_s += self._cluster.cpu_s() - before_s

    def _send(self, stamps: Stamps) -> None:
        raw = GET_VERSION
        if self._prompts is not None:
            self._seeds += 1
            self._cluster.stamps[self._seeds] = stamps
            raw = completion(self._prompts.sample(), 2, self._seeds)
        self._idle = [connection for connection in self._idle if not connection.closed]
        connection = self._idle.pop() if self._idle else self._cluster.connect()
        self._open += 1
        connection.ask(raw, stamps, self._ended)

    def _ended(self, connection: KeepAliveConnection) -> None:
        self._open -= 1
        self._idle.append(connection)


def _quantiles_ms(nanoseconds: list[int]) -> dict[str, float]:
    ordered = sorted(nanoseconds)
    return {name: ordered[int(len(ordered) * share)] / 1e6 for name, share in QUANTILES.items()}


def measure_latency(cores: Cores, rate: float, spacing: str, seconds: float, pairs: int) -> dict[str, Any]:
    """Quantiles in ms by what they measure, and the router's CPU time for each request."""
    bare, real = RouterLoad(), RouterLoad()
    with cluster("pair", cores, pairs) as one:
        gets = Arrivals(one, rate, spacing, None)
        tokens = Arrivals(one, rate, spacing, PromptBodies(PROMPT_CHARACTERS, seed=1))
        gets.warm_up()
        tokens.warm_up()
        others_s, started_s = one.others_cpu_s(), time.monotonic()
        for _ in range(max(1, round(seconds / SLICE_S))):
            gets.run(bare, SLICE_S)
            tokens.run(real, SLICE_S)
        others = (one.others_cpu_s() - others_s) / (time.monotonic() - started_s)
    before = [one.prefill_ns - one.written_ns for one in real.stamps]
    after = [one.first_ns - one.answered_ns for one in real.stamps]
    get = _quantiles_ms([one.first_ns - one.written_ns for one in bare.stamps])
    first = _quantiles_ms([one.first_ns - one.written_ns for one in real.stamps])
    return {
        "rate": rate,
        "spacing": spacing,
        "others_share": others,
        "requests": {"get": len(bare.stamps), "first_token": len(real.stamps)},
        "get_ms": get,
        "first_token_ms": first,
        "difference_ms": {name: first[name] - get[name] for name in QUANTILES},
        "request_to_prefill_ms": _quantiles_ms(before),
        "token_to_frame_ms": _quantiles_ms(after),
        "own_ms": _quantiles_ms([a + b for a, b in zip(before, after, strict=True)]),
        "cpu_ms_each": {"get": bare.cpu_ms_each(), "first_token": real.cpu_ms_each()},
    }


@dataclass(frozen=True, slots=True)
class Streamed:
    """Tokens a second."""

    offered: float
    by_clock: float
    per_cpu_s: float
    cpu_share: float


def measure_streaming(cores: Cores, streams: int, offered: int) -> Streamed:
    tokens = max(50, int(TOKEN_RATE_S * offered / streams))
    with cluster("unified", cores) as one:
        worker = one.workers[0]
        connections = [one.connect() for _ in range(streams)]
        left = streams

        def ended(connection: KeepAliveConnection) -> None:
            nonlocal left
            left -= 1

        for seed, connection in enumerate(connections, 1):
            connection.ask(completion("Go", tokens, seed), Stamps(), ended)
        one.loop.run(lambda: all(connection.frames for connection in connections), LIMIT_S)
        before_s, started_s = one.cpu_s(), time.monotonic()
        due_s = started_s

        def step(now_s: float) -> float:
            nonlocal due_s
            worker.step()
            due_s += streams / offered
            return due_s

        one.loop.run(lambda: left == 0, LIMIT_S, step, rest_s=STREAMING_REST_S)
        took_s, cpu_s = time.monotonic() - started_s, one.cpu_s() - before_s
        got = sum(connection.frames for connection in connections) - streams
    return Streamed(offered, got / took_s, got / cpu_s, cpu_s / took_s)


def _latency_table(latency: dict[str, Any]) -> Table:
    times = {"poisson": "at random times (Poisson)", "even": "evenly spaced"}[latency["spacing"]]
    table = Table(title=f"{latency['rate']:g} requests/s {times}, the router on one core, times in ms")
    for column in ("", *QUANTILES, "router CPU each"):
        table.add_column(column, justify="right" if column else "left")
    cpu = latency["cpu_ms_each"]
    for text, name, cpu_ms in (
        ("GET /version", "get_ms", cpu["get"]),
        (f"first token, {PROMPT_CHARACTERS} characters", "first_token_ms", cpu["first_token"]),
        ("  difference", "difference_ms", None),
        ("request in -> Prefill out", "request_to_prefill_ms", None),
        ("first token in -> frame out", "token_to_frame_ms", None),
        ("  the router's own: both", "own_ms", None),
    ):
        cells = [f"{latency[name][quantile]:.2f}" for quantile in QUANTILES]
        table.add_row(text, *cells, "" if cpu_ms is None else f"{cpu_ms:.2f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="The router's added latency and streaming ceiling")
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=10.0, help="of requests of each kind")
    parser.add_argument("--pairs", type=int, default=1, help="prefill and decode workers, for latency")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--only", choices=("latency", "streaming"))
    parser.add_argument("--out", type=Path, metavar="FILE", help="the figures as JSON")
    parser.add_argument(
        "--real-time", action="store_true", help="the router before all other work on its core (SCHED_FIFO)"
    )
    given = parser.parse_args()
    console = Console()
    cores = Cores.pick(given.real_time)
    os.sched_setaffinity(0, {cores.bench})
    figures: dict[str, Any] = {
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "used": asdict(cores)}
    }
    if given.only != "streaming":
        figures["latency"] = {}
        for spacing in SPACINGS:
            latency = figures["latency"][spacing] = measure_latency(
                cores, given.rate, spacing, given.seconds, given.pairs
            )
            console.print(_latency_table(latency))
            console.print(f"other processes had {latency['others_share']:.1%} of the router's core meanwhile")
    if given.only != "latency":
        table = Table(title=f"streaming, {given.streams} streams, one SSE frame for each token")
        for column in ("offered tok/s", "by the clock", "per CPU second", "router CPU", "aim"):
            table.add_column(column, justify="right")
        figures["streaming"] = []
        for offered in TOKEN_RATES:
            one = measure_streaming(cores, given.streams, offered)
            figures["streaming"].append(asdict(one))
            speeds = (one.offered, one.by_clock, one.per_cpu_s)
            table.add_row(*[f"{speed:.0f}" for speed in speeds], f"{one.cpu_share:.0%}", "50000")
        console.print(table)
    if given.out is not None:
        given.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
