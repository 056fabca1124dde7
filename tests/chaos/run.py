"""A whole run: the reference first, then one cluster after another until the time is up."""

from itertools import cycle
from pathlib import Path

from tests.chaos.borders import Borders, WrongReference
from tests.chaos.cluster_round import Round, run_round
from tests.chaos.reference import compute_reference
from tests.chaos.report import Report
from tests.chaos.requests import MAX_MODEL_LEN, sample_plans
from tests.checkpoints import make_checkpoint

LONGEST_ROUND_S = 150.0


def run_chaos(directory: Path, seconds: float, seed: int, layouts: list[str], requests: int) -> Report:
    """`seconds` under faults, divided among rounds that take the layouts in turn. The output of every
    cluster is kept below `directory`, which exists."""
    model_dir = make_checkpoint("qwen3", directory / "model", seed=5, max_model_len=MAX_MODEL_LEN)
    plans = sample_plans(seed, requests)
    right, tokens = compute_reference(model_dir, directory / "reference", plans)
    report = Report(seed)
    try:
        borders = Borders(model_dir)
        close = {number for number in right if borders.is_close(plans[number], tokens[number])}
    except WrongReference as error:
        report.violate("wrong", str(error))
        return report
    report.left_out = len(close)
    plans = [plan for plan in plans if plan.number not in close]
    rounds = max(len(layouts), round(seconds / LONGEST_ROUND_S))
    for number, layout in zip(range(rounds), cycle(layouts), strict=False):
        log_dir = directory / f"{number}-{layout}"
        one = Round(layout, seconds / rounds, f"{seed} {number}", model_dir, log_dir)
        run_round(one, plans, right, report)
    return report
