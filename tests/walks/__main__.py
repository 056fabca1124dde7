"""Through how many files a request goes: `python -m tests.walks [--tree ANOTHER_CHECKOUT]`.

Starts the demo model on one prefill and two decode workers, has every process note which functions are called
(tests/walks/hook), and prints their files, without those of an idle system and of the model's forward pass,
for three walks: a chat request to its first token, its KV from the step that computed it to the decode
worker's pages, and a killed decode worker under a running answer. Then, by searching, the files that name one
model family and one mover.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from tests.patience import patient
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
MODEL = Path("deploy") / "demo" / "model"
_MODEL = "models/ ops/ attention/ sampling/ kv/pool kv/kv_write rank_group"
_MODEL_BEFORE = "attention_plan step_attention sampler layers linear rope uniform kv_pool"
"""Where the same stood before folders were stages: for `--tree`."""
FORWARD = tuple(f"services/engine/{name}" for name in f"{_MODEL} {_MODEL_BEFORE}".split())


class System:
    """One launched system, whose processes record."""

    def __init__(self, tree: Path, directory: Path) -> None:
        self.directory, port = directory, free_port()
        hook = ROOT / "tests" / "walks" / "hook"
        env = os.environ | {
            "PYTHONPATH": f"{hook}{os.pathsep}{tree}",
            "WALKS_DIRECTORY": str(directory),
            "WALKS_TREE": str(tree),
        }
        command = [sys.executable, "-m", "deploy", "serve", str(tree / MODEL), "--prefill", "1", "--decode"]
        self.launcher = subprocess.Popen(
            [*command, "2", "--mem-fraction", "0.1", "--port", str(port)],
            cwd=tree,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=patient(60))

    def wait_ready(self) -> None:
        end_s = time.monotonic() + patient(90)
        while time.monotonic() < end_s:
            try:
                if self.http.get("/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise SystemExit("the system does not become ready")

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.launcher.pid).children()

    def of_kind(self, *kinds: str) -> list[psutil.Process]:
        """Children by the command that they were started with: `worker`, `transfer`, `router`."""
        return [child for child in self.children() if set(child.cmdline()[1:4]) & set(kinds)]

    def record(self) -> None:
        for child in self.children():
            child.send_signal(signal.SIGUSR1)
        time.sleep(0.2)  # the handlers run between two byte codes of each process

    def recorded(self) -> dict[int, set[str]]:
        pids = [child.pid for child in self.children()]
        for old in self.directory.glob("*.txt"):
            old.unlink()
        for pid in pids:
            os.kill(pid, signal.SIGUSR2)
        found: dict[int, set[str]] = {}
        end_s = time.monotonic() + patient(20)
        while len(found) < len(pids) and time.monotonic() < end_s:
            for pid in pids:
                path = self.directory / f"{pid}.txt"
                if path.exists():
                    found[pid] = set(path.read_text().splitlines())
            time.sleep(0.05)
        return found

    def chat(self, tokens: int) -> Iterator[str]:
        body = {
            "model": "model",
            "messages": [{"role": "user", "content": "What is prefill?"}],
            "max_tokens": tokens,
            "stream": True,
            "ignore_eos": True,
        }
        body["model"] = self.http.get("/v1/models").json()["data"][0]["id"]
        with self.http.stream("POST", "/v1/chat/completions", json=body) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    delta = json.loads(line[6:])["choices"]
                    if delta and delta[0]["delta"].get("content"):
                        yield line

    def stop(self) -> None:
        self.launcher.send_signal(signal.SIGTERM)
        self.launcher.wait(patient(60))


@contextmanager
def running(tree: Path) -> Iterator[System]:
    with tempfile.TemporaryDirectory(prefix="walks-") as scratch:
        system = System(tree, Path(scratch))
        try:
            system.wait_ready()
            for _ in range(2):  # what is done once, and its idle life after it, is no part of a walk
                list(system.chat(4))
            yield system
        finally:
            system.stop()


def of_idling(system: System) -> set[str]:
    system.record()
    time.sleep(3.0)  # every process has taken its turns, pings and status reports
    return joined(system.recorded())


def to_first_token(system: System) -> set[str]:
    system.record()
    next(system.chat(1))
    return {one for one in joined(system.recorded()) if not one.startswith(FORWARD)}


def of_kv(system: System) -> set[str]:
    """In workers and transfer processes, beside the model's forward pass and its samples."""
    pids = {child.pid for child in system.of_kind("worker", "transfer")}
    system.record()
    list(system.chat(3))
    functions = joined({pid: found for pid, found in system.recorded().items() if pid in pids})
    return {one for one in functions if not one.startswith(FORWARD)}


def of_a_kill(system: System) -> set[str]:
    answer = system.chat(200)
    next(answer)
    (pid,) = (
        worker["status"]["pid"]
        for worker in system.http.get("/cluster").json()["workers"]
        if worker["hello"]["role"] == "decode" and worker["router_view"]["live_requests"]
    )
    launcher = {one.pid for one in system.children() if one.pid != pid}
    system.record()
    os.kill(pid, signal.SIGKILL)
    list(answer)
    return joined({one: found for one, found in system.recorded().items() if one in launcher})


def joined(recorded: dict[int, set[str]]) -> set[str]:
    return set().union(*recorded.values())


def naming(tree: Path, pattern: str) -> set[str]:
    found = set()
    for package in ("router", "services", "kvtransfer", "deploy"):
        for path in (tree / package).rglob("*.py"):
            if re.search(pattern, path.read_text(encoding="utf-8")):
                found.add(path.relative_to(tree).as_posix())
    return found


def show(what: str, functions: set[str]) -> None:
    files = {one.split()[0] for one in functions}
    print(f"{what}: {len(files)} files")
    for name in sorted(files):
        print(f"    {name}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.walks", description=__doc__)
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout to walk through")
    tree: Path = parser.parse_args().tree.resolve()
    with running(tree) as system:
        idle = of_idling(system)
        first, kv = to_first_token(system), of_kv(system)
        show("a chat request to its first token", first - idle)
        show("KV from the step to the pages", kv - idle)
        show("a killed decode worker, beyond an answer", of_a_kill(system) - idle - first - kv)
    show("a model family (Qwen3)", naming(tree, r"(?i)qwen3(?!-8B|_moe|moe|-moe)"))
    show("a mover (cuda_ipc)", naming(tree, r"cuda_ipc(?!_handle|_device)"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
