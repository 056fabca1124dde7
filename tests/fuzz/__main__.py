"""`python -m tests.fuzz --seconds 3600`: every decoder, for as long as one likes, until one fails."""

import argparse
import time
from random import Random

from tests.fuzz.targets import TARGETS, attack, attack_with_the_nasty

ROUNDS = 500


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first seed")
    chosen = parser.parse_args()
    until_s = time.monotonic() + chosen.seconds
    seed = chosen.first
    for target in TARGETS:
        attack_with_the_nasty(target)
    while time.monotonic() < until_s:
        for target in TARGETS:
            attack(target, Random(f"{target.name} {seed}"), ROUNDS)
        seed += 1
    inputs = (seed - chosen.first) * ROUNDS * len(TARGETS)
    print(f"seeds {chosen.first} to {seed - 1}: {inputs} inputs, no failure")


if __name__ == "__main__":
    main()
