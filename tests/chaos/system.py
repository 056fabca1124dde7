"""What is under load and faults: `baton serve` on one host, or the processes of two hosts and their cable."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.chaos.requests import MODEL
from tests.e2e.cluster import Cluster
from tests.e2e.two_hosts import Cable, TwoHosts
from tests.patience import patient

System = Cluster | TwoHosts
LAYOUTS = {"1P2D": (1, 2), "2P1D": (2, 1), "2hosts": (1, 1)}
"""Prefill and decode workers."""
ONE_HOST = ("1P2D", "2P1D")
RETRIES = "30"
"""Of one request: with a fault every two seconds it may well lose more workers than the default allows."""
STAGING = ("--staging-slots", "8", "--staging-slot-bytes", "65536")
ROUTER = ("--worker-timeout", str(patient(3)), "--max-retries", RETRIES)
CHUNK = ("--max-chunk-tokens", "256")


@contextmanager
def started(layout: str, model_dir: Path, log_dir: Path) -> Iterator[System]:
    """A system that serves; whatever is left of it ends here. Raises NoNamespaces for two hosts."""
    if layout == "2hosts":
        hosts = TwoHosts(
            model_dir,
            log_dir,
            transfer=("--peer-timeout", str(patient(3)), *STAGING),
            worker=(*CHUNK, *STAGING),
            router=ROUTER,
            revives=True,
        )
        with hosts:
            yield hosts
        return
    prefill, decode = LAYOUTS[layout]
    flags = ["--served-model-name", MODEL, "--prefill", str(prefill), "--decode", str(decode)]
    flags += ["--peer-timeout", str(patient(3))]
    cluster = Cluster(model_dir, log_dir, *flags, *ROUTER, *CHUNK, *STAGING)
    try:
        cluster.wait_ready()
        yield cluster
    finally:
        cluster.kill()


def cable_of(system: System) -> Cable | None:
    return system.cable if isinstance(system, TwoHosts) else None


def lasting(system: System) -> dict[str, psutil.Process]:
    """Processes that no fault meets."""
    return {} if isinstance(system, TwoHosts) else {"launcher": psutil.Process(system.launcher.pid)}
