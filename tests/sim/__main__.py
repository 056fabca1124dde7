"""`python -m tests.sim --seeds 1000000 --from 0 --jobs 4`: as many seeds as one has time for.

Ends with 1 at the first violation, and prints of that seed all that happened.
"""

import argparse
import sys

from tests.sim.report import text_of
from tests.sim.scenario import run_seed
from tests.sim.seeds import run_all


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
    print(", ".join(f"{name}: {count}" for name, count in sorted(total.counts.items())))
    print(f"digest of seeds from {chosen.first}: {total.digests[chosen.first]}")
    print(
        f"{total.seeds} seeds, {total.events} events, {total.virtual_s:.0f} virtual seconds: "
        f"{len(total.broken)} violations"
    )
    return 1 if total.broken else 0


if __name__ == "__main__":
    sys.exit(main())
