"""What the load generator of `baton bench serve` itself can do: `python -m deploy.bench.router.load_client`.

Three processes: `baton bench serve` as a user starts it, the router, and this one with a worker that gives
every stream one token a step. The client reports how late it was and what CPU it took; from that follows how
much it could generate with a core of its own, whatever else the machine does meanwhile.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deploy.bench.router.fake_worker import FakeWorker
from deploy.bench.router.http_client import HttpBenchError
from deploy.bench.router.router_process import Cores, cluster

STEP_S = 0.01
LIMIT_S = 600.0
REST_S = 0.0005
LOADS = ((50.0, 2), (200.0, 2), (50.0, 64), (100.0, 128))
"""Requests a second, and output tokens of each."""


def measure(cores: Cores, rate: float, output_tokens: int, seconds: float, out: Path) -> dict[str, Any]:
    """The figures of one rate as `baton bench serve` writes them. Raises HttpBenchError if it fails."""
    with cluster("unified", cores) as one:
        command = [sys.executable, "-m", "deploy", "bench", "serve", "--url", f"http://127.0.0.1:{one.port}"]
        command += ["--rates", f"{rate:g}", "--seconds", f"{seconds:g}", "--input-tokens", "512"]
        command += ["--output-tokens", str(output_tokens), "--out", str(out)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            one.loop.run(lambda: process.poll() is not None, LIMIT_S, _steps(one.workers[0]), rest_s=REST_S)
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        raise HttpBenchError(f"baton bench serve ended with code {process.returncode}")
    figures: dict[str, Any] = json.loads(out.read_text())["systems"][0]["rates"][0]
    return figures


def _steps(worker: FakeWorker) -> Callable[[float], float]:
    def at(now_s: float) -> float:
        worker.step()
        return now_s + STEP_S

    return at


def main() -> None:
    parser = argparse.ArgumentParser(description="What the load generator can generate")
    parser.add_argument("--seconds", type=float, default=10.0, help="of requests at each load")
    given = parser.parse_args()
    cores = Cores.pick()
    os.sched_setaffinity(0, set(os.sched_getaffinity(0)) - {cores.router})
    table = Table(title="`baton bench serve`, prompts of 512 token ids, the router on a core of its own")
    for column in ("offered", "completed", "tok/s", "lag p50", "lag p99", "client CPU", "with one core"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as name:
        for rate, output_tokens in LOADS:
            one = measure(cores, rate, output_tokens, given.seconds, Path(name) / "out.json")
            cpu_share, lag = one["client"]["cpu_share"], one["client"]["lag_ms"]
            table.add_row(
                f"{rate:g} req/s x {output_tokens} tok",
                f"{one['completed']} of {one['requests']}",
                f"{one['output_tokens_per_s']:.0f}",
                f"{lag['p50']:.2f} ms",
                f"{lag['p99']:.2f} ms",
                f"{cpu_share:.1%}",
                f"{rate / cpu_share:,.0f} req/s, {one['output_tokens_per_s'] / cpu_share:,.0f} tok/s",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
