"""What is printed of a seed that failed: the seed, what was violated, and all that happened, in order."""

import msgspec

from services.protocol.messages import StatusRequest
from services.protocol.worker_status import Status
from tests.sim.kernel import START_S, LogEntry
from tests.sim.scenario import Outcome

QUIET = (StatusRequest, Status)
LONG = 400


def line_of(entry: LogEntry) -> str | None:
    """None for heartbeats."""
    time_s, who, what, detail = entry
    if not isinstance(detail, list):
        return f"{time_s - START_S:10.6f} {who}: {what} {detail}"
    said = [one for one in detail if not isinstance(one, QUIET)]
    if not said:
        return None
    texts = ", ".join(repr(one) if isinstance(one, msgspec.Struct) else str(one) for one in said)
    return f"{time_s - START_S:10.6f} {who} -> {what}: {texts[:LONG]}"


def text_of(outcome: Outcome) -> str:
    lines = [line for entry in outcome.log if (line := line_of(entry)) is not None]
    head = f"seed {outcome.seed}: {outcome.violation or 'holds'}"
    return "\n".join([*lines, head, f"again: python -m tests.sim --seeds 1 --from {outcome.seed}"])
