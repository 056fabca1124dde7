"""The router's process for its benchmark: on a core of its own, with its CPU time."""

import contextlib
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from deploy.bench.router.fake_worker import FakeWorker
from deploy.bench.router.http_client import HttpBenchError, HttpLoop, KeepAliveConnection, Stamps
from router.config import RouterConfig
from router.process import run
from services.protocol.messages import Role

DEMO_MODEL = Path(__file__).parents[2] / "demo" / "model"
START_TIMEOUT_S = 30.0
ROLES: dict[str, tuple[Role, ...]] = {"pair": ("prefill", "decode"), "unified": ("unified",)}


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE of this package's own sources, for where the demo model is not built yet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    sources = [path.read_text() for path in sorted(Path(__file__).parents[3].glob("router/**/*.py"))]
    trainer = trainers.BpeTrainer(
        vocab_size=2048, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(sources, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))


@dataclass(frozen=True, slots=True)
class Cores:
    """`router` is all that the router's threads may use; `bench` is this process's, which never sleeps.

    `real_time`: the router goes before all other work on its core (SCHED_FIFO)."""

    router: int
    bench: int
    real_time: bool = False

    @classmethod
    def pick(cls, real_time: bool = False) -> "Cores":
        """The last core for the router, one that shares no execution units with it for the rest.

        Raises HttpBenchError where there is only one."""
        usable = sorted(os.sched_getaffinity(0))
        if len(usable) < 2:
            raise HttpBenchError("two cores are needed: one for the router, one for everything else")
        router = usable.pop()
        apart = [core for core in usable if core not in _siblings(router)]
        return cls(router=router, bench=(apart or usable)[-1], real_time=real_time)


def _siblings(core: int) -> set[int]:
    """The hardware threads of the same core; empty where the kernel does not say."""
    path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for part in path.read_text().strip().split(","):
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    return found


@dataclass
class Cluster:
    """A router with its workers; everything but the router runs in `loop`."""

    loop: HttpLoop
    port: int
    workers: list[FakeWorker]
    stamps: dict[int, Stamps]
    _router: psutil.Process
    _cores: Cores

    @property
    def router_pid(self) -> int:
        return self._router.pid

    def cpu_s(self) -> float:
        """The router process's CPU time so far, all its threads."""
        times = self._router.cpu_times()
        return times.user + times.system

    def others_cpu_s(self) -> float:
        """CPU time so far that anything but the router took from the router's core."""
        times = psutil.cpu_times(percpu=True)[self._cores.router]
        return float(sum(times) - times.guest - times.guest_nice - times.idle - times.iowait) - self.cpu_s()

    def connect(self) -> KeepAliveConnection:
        return KeepAliveConnection(self.loop, self.port)


def _router(config: RouterConfig, cores: Cores) -> None:
    os.sched_setaffinity(0, {cores.router})
    if cores.real_time:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    run(config)


@contextlib.contextmanager
def cluster(kind: str, cores: Cores, of_each: int = 1) -> Iterator[Cluster]:
    """A router with so many workers of each role. Raises HttpBenchError if the router does not get ready."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o700)
        model_dir = DEMO_MODEL
        if not (DEMO_MODEL / "tokenizer.json").exists():
            write_tokenizer(directory)
            model_dir = directory
        loop = HttpLoop()
        stamps: dict[int, Stamps] = {}
        roles = [(role, number) for number in range(of_each) for role in ROLES[kind]]
        listening = [(directory / f"{role}-{number}", role) for role, number in roles]
        workers = [FakeWorker(loop, path, role, stamps) for path, role in listening]
        endpoints = tuple(f"ipc://{path}" for path, _ in listening)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        config = RouterConfig(workers=endpoints, model_dir=model_dir, served_model_name="bench", port=port)
        router = context.Process(target=_router, args=(config, cores), daemon=True)
        router.start()
        try:

            def is_ready() -> bool:
                if not router.is_alive():
                    raise HttpBenchError("the router ended at its start")
                # The second question comes after the first answer was taken in.
                return all(worker.asked >= 2 for worker in workers)

            loop.run(is_ready, START_TIMEOUT_S)
            yield Cluster(loop, port, workers, stamps, psutil.Process(router.pid), cores)
        finally:
            router.terminate()
            router.join(10)
