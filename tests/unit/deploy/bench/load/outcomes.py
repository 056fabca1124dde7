"""Outcomes made by hand, for tests of what is made of them."""

from collections.abc import Sequence

from deploy.bench.load.outcome import Outcome
from deploy.bench.load.plan import Planned, PlannedLoad


def outcome(
    due_s: float,
    arrivals: Sequence[tuple[float, int]],
    *,
    output_tokens: int = 4,
    lag_s: float = 0.001,
    measured: bool = True,
    usage: int | None = None,
    failure: str | None = None,
) -> Outcome:
    """`arrivals`: seconds after it was due, and how many chunks came then."""
    made = Outcome(Planned(due_s, 10, output_tokens, measured, b""), due_s, due_s + lag_s)
    made.arrived_s = [due_s + after_s for after_s, _ in arrivals]
    made.chunks = [count for _, count in arrivals]
    made.completion_tokens = usage
    made.end(due_s + (arrivals[-1][0] if arrivals else 0.5) + 0.01, failure)
    return made


def load_of(outcomes: Sequence[Outcome], span_s: float) -> PlannedLoad:
    measured = sum(one.planned.measured for one in outcomes)
    return PlannedLoad([one.planned for one in outcomes], measured / span_s, span_s, 0)
