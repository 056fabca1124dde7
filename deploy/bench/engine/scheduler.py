"""Scheduler time for one decode step (plan and count as launched): `python -m deploy.bench.engine.scheduler`.

No engine, no I/O: what is timed is exactly what a step pays between two engine calls. Sequences grow as
they do in service, so page allocation and prefix publishing are in the figure.
"""

import statistics
import time

from rich.console import Console
from rich.table import Table

from services.protocol.messages import FirstToken, Sampling, SequenceRequest
from services.scheduler.pages import PagePool
from services.scheduler.unified import UnifiedScheduler

STEPS = 400
PROMPT_TOKENS = 64
PAGE_SIZE_TOKENS = 16
AIM_US = {256: 100.0}


def step_times_us(batch: int) -> list[float]:
    """Microseconds of each of `STEPS` decode steps with `batch` sequences running."""
    pool = PagePool(batch * 64, PAGE_SIZE_TOKENS)
    scheduler = UnifiedScheduler(pool, batch, batch * PROMPT_TOKENS)
    for request_id in range(1, batch + 1):
        prompt = [(request_id * 7919 + at) % 50_000 for at in range(PROMPT_TOKENS - request_id % 16)]
        scheduler.add(SequenceRequest(request_id, prompt, Sampling(max_tokens=10_000, seed=0)))
    plan = scheduler.schedule()
    scheduler.launched(plan)
    for chunk in plan.chunks:
        scheduler.fork(chunk.sequence, [FirstToken(0, 1)])
    times: list[float] = []
    for _ in range(STEPS):
        started = time.perf_counter()
        plan = scheduler.schedule()
        scheduler.launched(plan)
        times.append((time.perf_counter() - started) * 1e6)
        for sequence in plan.decodes:
            sequence.settle(2)
    return times


def main() -> None:
    table = Table(title="scheduler, one decode step")
    for column in ("sequences", "p50 µs", "p99 µs", "aim µs"):
        table.add_column(column, justify="right")
    for batch in (1, 64, 256):
        times = sorted(step_times_us(batch))
        aim = f"{AIM_US[batch]:.0f}" if batch in AIM_US else ""
        table.add_row(
            str(batch), f"{statistics.median(times):.1f}", f"{times[int(len(times) * 0.99)]:.1f}", aim
        )
    Console().print(table)


if __name__ == "__main__":
    main()
