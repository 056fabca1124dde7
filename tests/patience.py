"""How long tests wait before they give up: all their deadlines come from here.

A deadline is meant for a machine that has little else to do, and is multiplied where there is more: by
`BATON_TEST_PATIENCE`, or else by what is found when the tests begin. So are the time limits that tests set
for what they test, where they mean "longer than it takes".
"""

import functools
import os
from pathlib import Path

VARIABLE = "BATON_TEST_PATIENCE"
MOST = 10.0


def patient(seconds: float) -> float:
    """A deadline, in the same unit."""
    return seconds * factor()


@functools.cache
def factor() -> float:
    """At least 1. The same for as long as the process lasts, so that deadlines fit each other."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return max(1.0, float(named))
    beside = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    return factor_of(max(os.getloadavg()[0], running()), beside, len(os.sched_getaffinity(0)))


def factor_of(busy: float, beside: int, cores: int) -> float:
    """`busy` processes, of which two a core may be these tests' own, and `beside` that run tests."""
    return min(MOST, max(1.0, busy / cores - 1.0, beside / cores))


def running() -> int:
    """Processes and threads that run or want to, now: the average would tell of them a minute later."""
    return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
