"""`baton serve` as a user starts it: real processes, asked over HTTP, checked to be at rest afterwards."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil

from tests.patience import patient
from tests.ports import free_port

READY_DEADLINE_S = patient(90.0)
REST_DEADLINE_S = patient(30.0)
STOP_DEADLINE_S = patient(45.0)
SMALL_FRACTION = "0.1"
"""Of a device of 2 GiB. A larger pool of pages would be filled with zeros for seconds at every start."""


def wait_until(what: str, holds: Callable[[], bool], deadline_s: float = REST_DEADLINE_S) -> None:
    """Poll a state; a deadline that passes is a failure that says what was waited for."""
    pause = threading.Event()
    end_s = time.monotonic() + deadline_s
    while not holds():
        if time.monotonic() > end_s:
            raise AssertionError(f"not within {deadline_s:g} s: {what}")
        pause.wait(0.05)


class Accounts:
    """What a cluster says of itself at `url`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.http = httpx.Client(base_url=url, timeout=patient(120))

    def is_ready(self) -> bool:
        try:
            return self.http.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    def cluster(self) -> dict[str, Any]:
        answer = self.http.get("/cluster")
        assert answer.status_code == 200
        values: dict[str, Any] = answer.json()
        return values

    def worker(self, role: str) -> dict[str, Any]:
        """The first worker of a role, as `/cluster` shows it."""
        for worker in self.cluster()["workers"]:
            if worker["hello"] is not None and worker["hello"]["role"] == role:
                found: dict[str, Any] = worker
                return found
        raise AssertionError(f"no {role} worker")

    def assert_at_rest(self) -> None:
        """Pages, slots, grants and requests are given back, by accounts that were made after this call."""
        asked_s = time.monotonic()
        unrest: list[str] = []

        def rests() -> bool:
            unrest[:] = self._unrest(time.monotonic() - asked_s)
            return not unrest

        try:
            wait_until("cluster at rest", rests)
        except AssertionError as error:
            raise AssertionError(f"{error}: {unrest}") from None

    def _unrest(self, since_s: float) -> list[str]:
        cluster = self.cluster()
        found = []
        if cluster["router"]["live_requests"]:
            found.append(f"router: {cluster['router']['live_requests']} live requests")
        for worker in cluster["workers"]:
            status = worker["status"]
            if status is None or worker["status_age_s"] + status["slots_age_s"] >= since_s:
                found.append("no fresh status")
                continue
            for name in ("queued", "running", "reserved", "holding", "open_sends", "open_receives"):
                if status[name]:
                    found.append(f"{status['name']}: {name} {status[name]}")
            if status["pages"]["used"]:
                found.append(f"{status['name']}: pages {status['pages']}")
            slots = status["slots"]
            if slots is not None and slots["free"] != slots["total"]:
                found.append(f"{status['name']}: slots {slots}")
        return found


class Cluster(Accounts):
    """Use it as a context manager; leaving it stops everything and checks that nothing is left behind."""

    def __init__(
        self,
        model_dir: Path,
        log_dir: Path,
        *arguments: str,
        device: str = "cpu",
        threads: int = 1,
        port: int | None = None,
    ) -> None:
        self.port = free_port() if port is None else port
        super().__init__(f"http://127.0.0.1:{self.port}")
        self.log_path = log_dir / "serve.log"
        self.run_root = log_dir / "run"
        self.run_root.mkdir(mode=0o700)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
        self.environment = environment | {"OMP_NUM_THREADS": str(threads), "TMPDIR": str(self.run_root)}
        command = [sys.executable, "-m", "deploy", "serve", str(model_dir), "--port", str(self.port)]
        command += ["--device", device, "--dtype", "float32", "--checksum", *arguments]
        if device == "cpu" and "--mem-fraction" not in arguments:
            command += ["--mem-fraction", SMALL_FRACTION]
        with self.log_path.open("w") as log:
            self.launcher = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=self.environment, start_new_session=True
            )

    def __enter__(self) -> Self:
        try:
            self.wait_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.kill()
            print(self.log_path.read_text())
            return
        self.stop()

    # ------------------------------------------------------------ life

    def wait_ready(self) -> None:
        def ready() -> bool:
            if self.launcher.poll() is not None:
                raise AssertionError(f"baton serve ended: {self.log_path.read_text()}")
            return self.is_ready()

        wait_until(f"/ready answers 200; log:\n{self.log_path.read_text()}", ready, READY_DEADLINE_S)

    def processes(self) -> list[psutil.Process]:
        """The launcher's children and their children."""
        try:
            return psutil.Process(self.launcher.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def stop(self) -> None:
        """SIGTERM, as a service manager would; nothing may be left behind."""
        children = self.processes()
        self.http.close()
        self.launcher.send_signal(signal.SIGTERM)
        code = self.launcher.wait(STOP_DEADLINE_S)
        assert code == 0, self.log_path.read_text()
        self.assert_nothing_left(children)

    def assert_nothing_left(self, children: list[psutil.Process]) -> None:
        wait_until("every process has ended", lambda: not any(_runs(child) for child in children))
        wait_until("the run directory is gone", lambda: not list(self.run_root.iterdir()))

    def log_lines(self) -> list[str]:
        return self.log_path.read_text(errors="replace").splitlines()

    def kill(self) -> None:
        children = self.processes()
        for process in [self.launcher, *children]:
            if _runs(process):
                process.kill()
        self.launcher.wait(patient(20))
        self.http.close()


def _runs(process: "psutil.Process | subprocess.Popen[bytes]") -> bool:
    if isinstance(process, subprocess.Popen):
        return process.poll() is None
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
