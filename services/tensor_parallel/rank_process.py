"""A rank of a worker beside its first: one engine, no scheduler, no role.

1. The leading rank (rank_pool.py) starts it with one end of a socket pair; the first message configures it.
2. It meets the other ranks, and builds its engine.
3. It executes the leader's commands in their order. Steps meet in their sums, which is all the waiting.
4. It leaves when the leader says so, or is gone: the kernel kills this process with it.

It ignores SIGTERM and SIGINT: a signal to the whole group must not take the ranks from a leader that drains.
"""

import ctypes
import logging
import os
import signal
import socket
import sys
from collections import deque
from pathlib import Path

from services.config import WorkerConfig
from services.engine.engine import Engine
from services.engine.events import StepsUpTo
from services.engine.kv.copies import Copy
from services.engine.kv.run_table import SlotRun
from services.engine.models.model_config import read_model_config
from services.engine.rank_group import DistributedGroup
from services.memory.measure import NotMeasurable, gpu_process_bytes, host_phase, resident_bytes
from services.tensor_parallel.link import RankLink, RankLost
from services.tensor_parallel.messages import (
    AllocatePool,
    Answer,
    CaptureGraphs,
    Copied,
    CopyKv,
    CopyPages,
    Done,
    FenceSteps,
    LoadWeights,
    MapStaging,
    MeasureActivations,
    RankCommand,
    RankFailed,
    RankMemory,
    ReportMemory,
    StartRank,
    Step,
    StopRank,
    decode_config,
)
from services.tensor_parallel.page_tables import PageTables
from services.tensor_parallel.rank_staging import RankStaging

log = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
COPY_POLL_S = 0.0002
"""How often a pack or unpack on the device is looked at."""
_PR_SET_PDEATHSIG = 1


def run(end: socket.socket) -> int:
    """The exit code: 0 when it was to leave, 1 when the leader is gone or something failed."""
    link: RankLink[RankCommand, Answer] = RankLink(end, RankCommand, Answer)
    try:
        start = link.receive(START_TIMEOUT_S)
        if not isinstance(start, StartRank):
            raise RankLost(f"the first command is {start!r}")
        config = decode_config(start.config)
        RankProcess(config, Path(start.store), link).serve()
    except RankLost as error:
        log.info("leaving: the leading rank is gone: %s", error)
        return 1
    except Exception as error:  # whatever it is, the leader has to say it, and ends
        log.exception("rank failed")
        link.send(RankFailed(f"{type(error).__name__}: {error}"))
        return 1
    finally:
        link.close()
    return 0


class RankProcess:
    def __init__(self, config: WorkerConfig, store: Path, link: RankLink[RankCommand, Answer]) -> None:
        self._link = link
        self._context_bytes = resident_bytes()
        group = DistributedGroup(config, store)
        self._engine = Engine(config, read_model_config(config.model_dir), group)
        self._tables = PageTables()
        self._sizes: dict[str, int] = {}
        self._held_bytes: dict[str, int] = {}
        self._staging = RankStaging(config.device_index)
        self._copies: deque[Copy] = deque()
        self._last_copy: Copy | None = None

    def serve(self) -> None:
        while not isinstance(command := self._next_command(), StopRank):
            self._execute(command)
        self._engine.synchronize()
        self._staging.close()
        self._engine.close()

    def _next_command(self) -> RankCommand:
        """Packs and unpacks are answered as they are done, while commands come."""
        while self._copies:
            while self._copies and self._copies[0].is_done:
                self._link.send(Copied(self._copies.popleft().checksums()))
            if (command := self._link.poll(COPY_POLL_S if self._copies else 0.0)) is not None:
                return command
        return self._link.receive(None)

    def _execute(self, command: RankCommand) -> None:
        engine = self._engine
        match command:
            case Step():
                engine.launch(self._tables.rows(command))
            case CopyPages(pairs=pairs):
                engine.copy_pages(pairs)
            case CopyKv():
                self._last_copy = self._copy(command)
                self._copies.append(self._last_copy)
            case FenceSteps():
                if self._last_copy is not None:
                    engine.fence(self._last_copy)
            case MapStaging():
                engine.synchronize()
                self._staging.map(command)
            case LoadWeights():
                with host_phase() as phase:
                    self._done("weights", engine.load(lambda done_bytes, total_bytes: None))
                self._held_bytes["weights"] = phase.held_bytes
            case MeasureActivations():
                self._done("activations", engine.measure_activations())
            case AllocatePool(pages=pages, limit_bytes=limit_bytes):
                engine.cap_allocator(limit_bytes)
                with host_phase() as phase:
                    self._done("pool", engine.allocate_pool(pages))
                self._held_bytes["pool"] = phase.held_bytes
            case CaptureGraphs():
                self._done("graphs", engine.capture_graphs())
            case ReportMemory():
                self._link.send(self._memory())
            case _:
                raise RankLost(f"command {command!r} comes at no such time")

    def _done(self, what: str, byte_count: int) -> None:
        self._sizes[what] = byte_count
        self._link.send(Done(byte_count))

    def _memory(self) -> RankMemory:
        """As startup.py measures rank 0: on a CPU what became resident, on a GPU what was allocated."""
        on_cpu, sizes = self._engine.device.type == "cpu", self._sizes
        context_bytes: int | None = self._context_bytes
        if not on_cpu:
            try:
                held_bytes = self._engine.allocator_bytes()
                context_bytes = max(0, gpu_process_bytes(self._engine.config.device_index) - held_bytes)
            except NotMeasurable as error:
                log.debug("context not measured: %s", error)
                context_bytes = None
        return RankMemory(
            weights_bytes=self._held_bytes["weights"] if on_cpu else sizes["weights"],
            kv_pool_bytes=self._held_bytes["pool"] if on_cpu else sizes["pool"],
            activation_bytes=sizes["activations"],
            graphs_bytes=None if on_cpu else sizes["graphs"],
            context_bytes=context_bytes,
        )

    def _copy(self, command: CopyKv) -> Copy:
        copy = self._engine.pack if command.is_pack else self._engine.unpack
        runs = [
            SlotRun(
                run.pages, run.first_offset, run.token_count, run.slot, range(run.first_head, run.end_head)
            )
            for run in command.runs
        ]
        return copy(runs, self._staging.slots(), command.with_checksums, StepsUpTo(command.after_step))


def _end_with_leader(leader_pid: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if os.getppid() != leader_pid:  # it ended before prctl, so no signal will come
        raise SystemExit(1)


def main() -> None:
    """`python -m services.tensor_parallel.rank_process FD LEADER_PID`."""
    descriptor, leader_pid = int(sys.argv[1]), int(sys.argv[2])
    _end_with_leader(leader_pid)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    with socket.socket(fileno=descriptor) as end:
        code = run(end)
    if code:  # an interpreter that ends would leave the group, and wait for ranks that may never come
        logging.shutdown()
        os._exit(code)


if __name__ == "__main__":
    main()
