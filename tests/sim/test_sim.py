"""Whatever goes wrong, every invariant holds in every seed; a seed replays exactly; broken code is found."""

import subprocess
import sys
from collections import Counter

import pytest

from tests.fuzz.frames import BOUNDARIES
from tests.sim.breaks import BREAKS
from tests.sim.engine import EOS, continuation
from tests.sim.report import text_of
from tests.sim.scenario import run_seed
from tests.sim.seeds import CHUNK, run_some

SEEDS = 400
HOSTILE_SEEDS = 25
FOUND_WITHIN = 400
"""Seeds; docs/simulation.md says how many each took."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_invariant_holds_in_every_seed_and_a_seed_replays_exactly() -> None:
    command = [sys.executable, "-m", "tests.sim", "--seeds", str(SEEDS), "--jobs", "2"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-20_000:] + ran.stderr[-2000:]
    counts, digest, last = ran.stdout.splitlines()[-3:]
    assert last.startswith(f"{SEEDS} seeds") and last.endswith("0 violations")
    # Something has happened: clients were served, and every kind of end and of fault has come up.
    happened = {name: int(count) for name, count in (one.split(": ") for one in counts.split(", "))}
    assert happened["done"] > 3 * SEEDS
    for kind in ("failed", "left", "refused", "router died", "crash", "hang", "partition", "disconnect"):
        assert happened[kind] > 0, kind
    # Another process, with other hashes of strings, sees the same to the last frame.
    assert digest.endswith(run_some(0, CHUNK).digests[0])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", BREAKS)
def test_broken_code_is_found(name: str) -> None:
    with BREAKS[name]():
        for seed in range(FOUND_WITHIN):
            outcome = run_seed(seed)
            if outcome.violation is not None:
                text = text_of(outcome)
                assert f"seed {seed}: {outcome.violation}" in text
                assert f"--from {seed}" in text
                return
    pytest.fail(f"not found in {FOUND_WITHIN} seeds")


@pytest.mark.slow
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_no_frame_that_nobody_said_does_lasting_harm(boundary: str) -> None:
    happened: Counter[str] = Counter()
    for seed in range(HOSTILE_SEEDS):
        outcome = run_seed(seed, hostile=boundary)
        assert outcome.violation is None, text_of(outcome)
        happened += outcome.faults
    assert happened["repeated"] > HOSTILE_SEEDS / 2


def test_the_right_answer_is_a_function_of_the_prompt() -> None:
    long = continuation([5, 6, 7], 0, 11, 40)
    assert long[:3] == continuation([5, 6, 7], 0, 11, 3)
    assert EOS not in long[:-1]
    assert continuation([5, 6, 8], 0, 11, 3) != long[:3]
    assert continuation([5, 6, 7], 1, 11, 3) != long[:3]
