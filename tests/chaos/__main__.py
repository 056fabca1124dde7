"""`python -m tests.chaos --seconds 600 --seed 7`: processes are killed and stopped under load.

Checks every answer and all that must be left as it was; ends with 1 at any violation. The last
line says what happened.
"""

import argparse
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.run import run_chaos
from tests.chaos.system import LAYOUTS, ONE_HOST
from tests.e2e.two_hosts import NoNamespaces


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="under faults; the rest comes on top")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of requests and faults")
    parser.add_argument("--layout", choices=sorted(LAYOUTS), help="default: those of one host in turn")
    parser.add_argument("--requests", type=int, default=60, help="how many different ones")
    parser.add_argument("--logs", type=Path, help="a new directory for the processes' output")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the cluster ends with it
    layouts = [chosen.layout] if chosen.layout else sorted(ONE_HOST)
    scratch = Path(tempfile.mkdtemp(prefix="chaos-"))
    directory = chosen.logs or scratch / "logs"
    directory.mkdir(parents=True)
    kept = True
    try:
        report = run_chaos(directory, chosen.seconds, chosen.seed, layouts, chosen.requests)
        kept = bool(report.violations)
    except NoNamespaces as error:
        print(f"two hosts need network namespaces and TAP devices: {error}")
        return 2
    finally:
        if chosen.logs is not None or not kept:
            shutil.rmtree(scratch, ignore_errors=True)
    for line in report.details():
        print(line)
    if report.violations:
        print(f"the processes' output is kept in {directory}")
    print(report.summary(), flush=True)
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
