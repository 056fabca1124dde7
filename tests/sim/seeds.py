"""Many seeds in several processes, added up."""

import gc
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from multiprocessing import get_context

from tests.sim.scenario import run_seed

CHUNK = 25


@dataclass
class Tally:
    """What some seeds came to. The digests, by a chunk's first seed, depend on all that happened in it."""

    seeds: int = 0
    events: int = 0
    virtual_s: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    broken: list[tuple[int, str]] = field(default_factory=list)
    digests: dict[int, str] = field(default_factory=dict)

    def add(self, other: "Tally") -> None:
        self.seeds += other.seeds
        self.events += other.events
        self.virtual_s += other.virtual_s
        self.counts += other.counts
        self.broken += other.broken
        self.digests |= other.digests


def run_some(first: int, count: int) -> Tally:
    tally, digest = Tally(seeds=count), sha256()
    gc.freeze()  # worlds are small and end soon: looking for their cycles often costs a sixth of the time
    gc.set_threshold(50_000, 20, 50)
    for seed in range(first, first + count):
        outcome = run_seed(seed)
        tally.events += outcome.events
        tally.virtual_s += outcome.virtual_s
        tally.counts += outcome.ends + outcome.faults
        digest.update(repr(outcome.log).encode())
        if outcome.violation is not None:
            tally.broken.append((seed, outcome.violation))
    tally.digests[first] = digest.hexdigest()[:16]
    return tally


def chunks(first: int, seeds: int) -> Iterator[tuple[int, int]]:
    for start in range(first, first + seeds, CHUNK):
        yield start, min(CHUNK, first + seeds - start)


def run_all(first: int, seeds: int, jobs: int) -> Tally:
    """In `jobs` processes, until all are done or a chunk has a violation."""
    total, started_s = Tally(), time.monotonic()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = chunks(first, seeds)
        running = [pool.submit(run_some, *chunk) for chunk in islice(waiting, 2 * jobs)]
        while running:
            total.add(running.pop(0).result())
            if total.broken:
                for future in running:
                    future.cancel()
                break
            running += [pool.submit(run_some, *chunk) for chunk in islice(waiting, 1)]
            if total.seeds % (40 * CHUNK) == 0:
                print(f"{total.seeds} seeds in {time.monotonic() - started_s:.0f} s", flush=True)
    return total
