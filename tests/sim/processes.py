"""The processes of a cluster, each the shipped one driven by its own entry points, turn by turn."""

import asyncio.events
from collections import deque
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

from kvtransfer.config import TransferConfig
from kvtransfer.process import TransferProcess
from router.config import RouterConfig
from router.routing.dispatcher import Dispatcher
from router.routing.metrics import Metrics
from services.config import WorkerConfig
from services.memory.plan import Measured
from services.protocol.messages import Role
from services.protocol.worker_status import Ledger
from services.scheduler.step_time import StepCosts
from services.transfer.copies import OwnCopier
from services.transfer.links import TransferRanks
from services.transfer.staging import StagingSlots
from services.worker import Worker
from tests.sim.engine import CELL_BYTES, GEOMETRY, PAGE_TOKENS, SimEngine
from tests.sim.invariants import check_borders, check_pages, check_slots, transfer_rest, worker_rest
from tests.sim.kernel import Process
from tests.sim.network import Link
from tests.sim.seams import Seams, SimTransferClient

IDLE_S = 0.25
SLOT_BYTES = 256
TOKENS_PER_SLOT = SLOT_BYTES // CELL_BYTES
LEDGER = Ledger("simulated", 0, 0.5, [])
TERM = 15
STEP_COSTS = StepCosts(4e-3, 1e-3, 0.1e-3, 1e-3, 0.1e-3)
"""As if they had been measured: a deadline leaves a prompt a few tokens beside decodes, or one."""


class TransferHost(Process):
    def __init__(self, seams: Seams, name: str, slots: int, checksum: bool, timeout_s: float) -> None:
        super().__init__(seams.world, name)
        self.seams = seams
        self.config = TransferConfig(
            name=name,
            listen=f"ipc:///{name}/worker",
            peer_listen=f"ipc:///{name}/peers",
            staging_socket=Path(f"/{name}/staging"),
            slots=slots,
            slot_bytes=SLOT_BYTES,
            checksum=checksum,
            transfer_timeout_s=timeout_s,
            peer_timeout_s=2.0,
        )
        self.process: TransferProcess | None = None

    @property
    def machine(self) -> Any:
        return None if self.process is None else self.process._machine

    def begin(self) -> None:
        self.process = process = TransferProcess(self.config)
        staging: Any = process._staging
        process._mover.serve(process._machine, memoryview(staging.fd))  # type: ignore[attr-defined]

    def work(self) -> float:
        process, now_s = self.process, self.world.clock_s()
        assert process is not None
        process.step(now_s)
        # Whole milliseconds, as its poll takes them: a deadline is never met a rounding error too early.
        sleep_ms = int(max(process.next_deadline_s(now_s) - now_s, 0.0) * 1000) + 1
        return self.world.now_s + sleep_ms / 1000

    def terminate(self) -> None:
        """What SIGTERM leads to. The second one changes nothing."""
        if not self.alive or self.process is None or self.asleep or self.world.now_s < self.hung_until_s:
            return
        self.world.note(self.name, "terminates")
        process, incarnation = self.process, self.incarnation

        def end() -> None:
            process._shut_down()
            process.close()

        self._run(end)
        if self.incarnation == incarnation:
            self.crash("has ended")

    def die(self) -> None:
        if self.process is not None:
            self.process._mover.die()  # type: ignore[attr-defined]
        self.process = None
        self.seams.network.gone(self)

    def check(self) -> None:
        if self.process is not None:
            check_slots(self.name, self.process._machine)

    def rest(self) -> str | None:
        return None if self.process is None else transfer_rest(self.process._machine)


class WorkerHost(Process):
    """`step_s` draws how long a step takes."""

    def __init__(
        self,
        seams: Seams,
        name: str,
        role: Role,
        pages: int,
        transfer: str | None,
        step_s: Callable[[], float],
    ) -> None:
        super().__init__(seams.world, name)
        self.seams, self.pages, self.step_s = seams, pages, step_s
        rng = self.world.rng
        self.config = WorkerConfig(
            name=name,
            role=role,
            model_dir=Path("/model"),
            listen=f"ipc:///{name}/routers",
            transfers=() if transfer is None else (f"ipc:///{transfer}/worker",),
            max_model_len=pages * PAGE_TOKENS,
            page_size_tokens=PAGE_TOKENS,
            max_batch=rng.choice((3, 4, 8)),
            max_chunk_tokens=rng.choice((3, 8, 32)),
            prefix_cache=rng.random() < 0.8,
            drain_timeout_s=2.0,
            slo_itl_ms=Random(f"{self.world.seed} {name}").choice((0.0, 10.0, 25.0)),
        )
        self.overlap = rng.random() < 0.5
        self.worker: Worker | None = None
        self.engine = SimEngine(pages)
        self._client: SimTransferClient | None = None
        self._epoch = 0

    def begin(self) -> None:
        self.worker, self.engine = None, SimEngine(self.pages)
        self._epoch = self.world.rng.getrandbits(62) | 1
        if self.config.transfers:
            self._client = SimTransferClient(self.config.transfers[0], self._epoch, GEOMETRY)

    def work(self) -> float:
        worker = self.worker
        if worker is None:
            return self._attach()
        busy = worker.turn()
        if worker.finished():
            worker.close()
            self.crash("has ended")
        return self.world.now_s + (self.step_s() if busy else IDLE_S)

    def terminate(self) -> None:
        if self.alive and self.worker is not None and self.world.now_s >= self.hung_until_s:
            self.world.note(self.name, "is told to end")
            self._run(lambda: self.worker.on_signal(TERM, None) if self.worker is not None else None)
            self.wake()

    def die(self) -> None:
        self.worker = self._client = None
        self.seams.network.gone(self)

    def check(self) -> None:
        if self.worker is not None:
            check_pages(self.name, self.worker)
            check_borders(self.name, self.worker.context.counters)

    def rest(self) -> str | None:
        return None if self.worker is None else worker_rest(self.worker)

    def _attach(self) -> float:
        client = self._client
        if client is not None:
            client.tick(self.world.clock_s())
            client.receive(self.world.clock_s())
        if client is None or client.ready:
            self._build()
            return self.world.now_s
        return self.world.now_s + 0.1

    def _build(self) -> None:
        plan = SimpleNamespace(
            pages=self.pages,
            ledger=lambda measured: LEDGER,
            inputs=SimpleNamespace(staging_bytes=0),
        )
        client, engine = self._client, self.engine
        prepared: Any = SimpleNamespace(
            config=self.config,
            engine=self.engine,
            model=SimpleNamespace(kv_heads=GEOMETRY.kv_heads),
            transfer=None if client is None else TransferRanks([client]),
            copiers=[] if client is None else [OwnCopier(engine, StagingSlots(client, 0))],
            plan=plan,
            measured=[Measured()],
            devices=None,
        )
        self.worker = Worker(prepared, self._epoch)
        self.worker.context.overlap = self.overlap
        self.worker.context.deadline.model.costs = STEP_COSTS
        self.worker.context.deadline.least_prompt_tokens = 1
        self.world.note(self.name, "serves", self._epoch)


class Loop:
    """As much of an event loop as the router's clients use."""

    def __init__(self, host: "RouterHost") -> None:
        self._host, self._life = host, host.incarnation
        self.ready: deque[Callable[[], object]] = deque()
        self.readers: dict[int, Callable[[], object]] = {}

    def time(self) -> float:
        return self._host.world.now_s + self._host.offset_s

    def call_soon(self, callback: Callable[..., object], *values: object) -> None:
        self.ready.append(lambda: callback(*values))
        self._host.wake()

    def call_later(self, delay_s: float, callback: Callable[..., object], *values: object) -> "Timer":
        timer = Timer()

        def due() -> None:
            if not timer.cancelled and self._host.incarnation == self._life:
                self.call_soon(callback, *values)

        self._host.world.after(delay_s, due)
        return timer

    def add_reader(self, descriptor: int, callback: Callable[[], object]) -> None:
        self.readers[descriptor] = callback

    def remove_reader(self, descriptor: int) -> None:
        self.readers.pop(descriptor, None)


class Timer:
    cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class RouterHost(Process):
    def __init__(self, seams: Seams, name: str, workers: tuple[str, ...], timeout_s: float) -> None:
        super().__init__(seams.world, name)
        self.seams = seams
        self.config = RouterConfig(
            workers=workers,
            model_dir=Path("/model"),
            served_model_name="simulated",
            request_timeout_s=timeout_s,
            heartbeat_s=1.0,
            worker_timeout_s=4.0,
        )
        self.loop = Loop(self)
        self.dispatcher: Dispatcher | None = None
        self.on_death: list[Callable[[], None]] = []
        """Called once each: clients whose connections end with this life."""

    def begin(self) -> None:
        self.loop = Loop(self)
        self.dispatcher = Dispatcher(
            self.config,
            Metrics(started_s=0.0),
            draw_id=lambda: self.world.rng.getrandbits(62) or 1,
            clock=self.loop.time,
        )
        self._inside(self.dispatcher.start)

    def work(self) -> None:
        def serve() -> None:
            for _ in range(len(self.loop.ready)):
                self.loop.ready.popleft()()
            for link in self._links():
                monitor = link.socket.monitor
                if link.pending() and (read := self.loop.readers.get(link.socket.number)):
                    read()
                if (
                    monitor is not None
                    and link.socket.disconnects
                    and (read := self.loop.readers.get(monitor.number))
                ):
                    read()

        self._inside(serve)
        if self.loop.ready:
            self.wake()

    def call(self, action: Callable[[Dispatcher], None]) -> None:
        """Something that an endpoint does, in a turn of its own."""
        if self.dispatcher is not None and self.alive:
            dispatcher = self.dispatcher
            self.loop.call_soon(action, dispatcher)

    def die(self) -> None:
        self.dispatcher = None
        self.seams.network.gone(self)
        gone, self.on_death = self.on_death, []
        for tell in gone:
            tell()

    def check(self) -> None:
        dispatcher = self.dispatcher
        if dispatcher is not None:
            counts = dispatcher._borders.counts
            check_borders(self.name, {f"internal_errors_{at}": count for at, count in counts.items()})
            for attempt in dispatcher._attempts.values():
                if attempt.ended:
                    raise AssertionError(f"attempt {attempt.work.request_id} has ended and is still there")

    def rest(self) -> str | None:
        dispatcher = self.dispatcher
        if dispatcher is None:
            return None
        worker_loads = [
            worker_load
            for worker_load in dispatcher._worker_loads.of.values()
            if worker_load.live_requests or worker_load.live_tokens
        ]
        queued = [
            worker_load for worker_load in dispatcher._worker_loads.of.values() if worker_load.queued_tokens
        ]
        if dispatcher.live or worker_loads or queued or dispatcher._worker_loads._queued:
            return f"{dispatcher.live} attempts, loads {worker_loads + queued}"
        return None

    def ready(self) -> bool:
        return self.dispatcher is not None and self.dispatcher.can_take_work

    def _links(self) -> list[Link]:
        return [link for link in self.seams.network.links if link.owner is self and not link.closed]

    def _inside(self, action: Callable[[], None]) -> None:
        asyncio.events._set_running_loop(self.loop)  # type: ignore[arg-type]
        try:
            action()
        finally:
            asyncio.events._set_running_loop(None)
