"""A short run of `make chaos`: some faults under load, every answer compared, all at rest at the end."""

from pathlib import Path

import pytest

from tests.chaos.run import run_chaos

SECONDS_OF_FAULTS = 10.0
SEED = 578
"""Begins with the kill of a decode worker, then that of a transfer process, then a stop."""


@pytest.mark.slow
@pytest.mark.timeout(170)
def test_no_token_is_wrong_and_nothing_is_left_after_faults(tmp_path: Path) -> None:
    report = run_chaos(tmp_path, SECONDS_OF_FAULTS, seed=SEED, layouts=["1P2D"], requests=24)
    assert not report.violations, "\n".join([*report.details(), report.summary()])
    assert report.faults["kill decode"] > 0 and report.requests > 0
