"""`python -m tests.sim --seeds 1000000 --from 0 --jobs 4`: as many seeds as one has time for.

Ends with 1 at the first chunk that has violations, and prints of the first one all that happened.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256

from tests.sim.report import text_of
from tests.sim.scenario import run_seed

CHUNK = 25


@dataclass
class Tally:
    """What some seeds came to. `digest` depends on everything that happened in them."""

    seeds: int = 0
    events: int = 0
    virtual_s: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    broken: list[tuple[int, str]] = field(default_factory=list)
    digest: str = ""

    def add(self, other: "Tally") -> None:
        self.seeds += other.seeds
        self.events += other.events
        self.virtual_s += other.virtual_s
        self.counts += other.counts
        self.broken += other.broken
        self.digest = sha256((self.digest + other.digest).encode()).hexdigest()[:16]


def run_some(first: int, count: int) -> Tally:
    tally, digest = Tally(seeds=count), sha256()
    for seed in range(first, first + count):
        outcome = run_seed(seed)
        tally.events += outcome.events
        tally.virtual_s += outcome.virtual_s
        tally.counts += outcome.ends + outcome.faults
        digest.update(repr(outcome.log).encode())
        if outcome.violation is not None:
            tally.broken.append((seed, outcome.violation))
    tally.digest = digest.hexdigest()[:16]
    return tally


def chunks(first: int, seeds: int) -> Iterator[tuple[int, int]]:
    for start in range(first, first + seeds, CHUNK):
        yield start, min(CHUNK, first + seeds - start)


def run_all(first: int, seeds: int, jobs: int) -> Tally:
    total, started_s = Tally(), time.monotonic()
    with ProcessPoolExecutor(jobs) as pool:
        waiting = chunks(first, seeds)
        running = [pool.submit(run_some, *chunk) for _, chunk in zip(range(2 * jobs), waiting, strict=False)]
        while running:
            total.add(running.pop(0).result())
            if total.broken:
                for future in running:
                    future.cancel()
                break
            running += [pool.submit(run_some, *chunk) for _, chunk in zip(range(1), waiting, strict=False)]
            if total.seeds % (40 * CHUNK) == 0:
                print(f"{total.seeds} seeds in {time.monotonic() - started_s:.0f} s", flush=True)
    return total


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first one")
    parser.add_argument("--jobs", type=int, default=1, help="processes to run them in")
    parser.add_argument("--log", action="store_true", help="print all that happens in the first seed")
    chosen = parser.parse_args()
    if chosen.log:
        print(text_of(run_seed(chosen.first)))
    total = run_all(chosen.first, chosen.seeds, chosen.jobs)
    if total.broken:
        print(text_of(run_seed(total.broken[0][0])))
        for seed, violation in total.broken:
            print(f"violated: seed {seed}: {violation}")
    counted = ", ".join(f"{name} {count}" for name, count in sorted(total.counts.items()))
    print(
        f"{total.seeds} seeds, {total.events} events, {total.virtual_s:.0f} virtual seconds, "
        f"digest {total.digest}, {len(total.broken)} violated\n{counted}"
    )
    return 1 if total.broken else 0


if __name__ == "__main__":
    sys.exit(main())
