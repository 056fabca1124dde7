"""A worker process: one engine, one role, one thread.

1. Prepare: plan the memory, attach the transfer process, load weights, measure, allocate (startup.py).
2. Listen for routers and greet each.
3. Turn: take in what routers and the transfer process sent; launch a step of the role, and take the results
   of the one before; send what came out. With nothing to do and no step in flight, sleep until a message
   comes.
4. About once a second: tell every router the status, end requests whose deadline has passed.
5. SIGTERM: refuse new work, finish what runs within the drain time, leave.
"""

import gc
import logging
import os
import secrets
import signal
import time
from collections import Counter
from collections.abc import Callable
from types import FrameType

import zmq

from kvtransfer.client import TransferLost, WorkerEvent
from kvtransfer.messages import TransferSpans
from kvtransfer.net.channel import ChannelKeys
from services.config import WorkerConfig
from services.protocol.frame_server import open_server
from services.protocol.messages import (
    VERSION,
    Failed,
    Generate,
    KvTransferFailed,
    Prefill,
    Refusal,
    RepushKv,
    Request,
    ReserveKv,
    RouterHello,
    StatusRequest,
    TraceRequest,
    WorkerHello,
    WorkerTransferAddress,
)
from services.protocol.worker_status import PageUsage, Slots, Status
from services.rates import Rate
from services.roles.decode import DecodeRole
from services.roles.decoding import step_times
from services.roles.limits import WorkerLimits, named_request
from services.roles.prefill import PrefillRole
from services.roles.report_queue import ReportQueue
from services.roles.role import Role, WorkerContext
from services.roles.unified import UnifiedRole
from services.scheduler.pages import PagePool
from services.scheduler.step_deadline import step_deadline
from services.startup import PreparedWorker, ledgers_now, prepare
from services.tracing import Tracing
from services.transfer.links import TransferRanks, total_counts
from services.transfer.receiver import KvReceiver
from services.transfer.sender import KvSender

log = logging.getLogger(__name__)

STATUS_INTERVAL_S = 1.0
ROUTER_SILENCE_S = 15.0
IDLE_WAIT_MS = 250


def run(config: WorkerConfig, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Serve until SIGTERM. Raises before listening if the worker cannot be built."""
    worker_epoch = secrets.randbits(62) | 1
    prepared = prepare(config, worker_epoch, progress)
    worker = Worker(prepared, worker_epoch)
    keep_for_good()
    signal.signal(signal.SIGTERM, worker.on_signal)
    signal.signal(signal.SIGINT, worker.on_signal)
    try:
        worker.serve()
    except Exception:
        log.exception("worker %s fails", config.name)  # before anything else can go wrong
        if config.tp > 1:
            # Leaving the group could wait for ranks that never come; the kernel ends them with this process.
            logging.shutdown()
            os._exit(1)
        raise
    finally:
        worker.close()


def keep_for_good() -> None:
    """Whatever exists now stays: a full collection would look at all of it, between two steps, in vain."""
    gc.collect()
    gc.freeze()


class Worker:
    def __init__(self, prepared: PreparedWorker, worker_epoch: int) -> None:
        config, engine = prepared.config, prepared.engine
        self.prepared = prepared
        self.config = config
        self.epoch = worker_epoch
        self.transfer: TransferRanks | None = prepared.transfer
        pool = PagePool(prepared.plan.pages, config.page_size_tokens, config.prefix_cache)
        keys = None if config.key_dir is None else ChannelKeys.load(config.key_dir)
        self._lost_routers: list[bytes] = []
        """Their connections have ended, their requests are still here."""
        self.server = open_server(
            config.listen,
            keys,
            on_drop=self._count_drop,
            on_bad=self._on_bad,
            on_end=self._lost_routers.append,
        )
        limits = WorkerLimits(
            vocab_size=engine.vocab_size,
            max_sequence_tokens=min(config.max_model_len, pool.total * pool.page_size_tokens),
            max_batch=config.max_batch,
            max_queue=config.max_queue,
            eos_token_ids=frozenset(engine.eos_token_ids),
        )
        self.context = WorkerContext(
            engine=engine,
            pool=pool,
            limits=limits,
            max_chunk_tokens=config.max_chunk_tokens,
            outbox=ReportQueue(self.server.send),
            clock=time.monotonic,
            overlap=config.device == "cuda",
            tail_chunk_tokens=config.tail_chunk_tokens,
            deadline=step_deadline(config.slo_itl_ms, config.device),
        )
        self.role = _build_role(self.context, prepared)
        self.tracing = Tracing(
            config.name, self.context.spans, self.transfer, self.context.outbox, self.context.clock
        )
        self._routers: dict[bytes, float] = {}
        self._sent_address = self._address()
        self._started_s = self._turn_began_s = time.monotonic()
        self._busy_s, self._was_busy = 0.0, False
        self._prompt_rate, self._output_rate = Rate(), Rate()
        self._draining_until_s: float | None = None
        self._next_status_s = 0.0
        self._poller = zmq.Poller()
        self._poller.register(self.server.socket, zmq.POLLIN)
        if self.transfer is not None:
            for socket in self.transfer.sockets:
                self._poller.register(socket, zmq.POLLIN)

    # ------------------------------------------------------------ life

    def serve(self) -> None:
        log.info("%s worker %s listens at %s", self.config.role, self.config.name, self.server.endpoint)
        busy = False
        while not self.finished():
            self._poller.poll(0 if busy else IDLE_WAIT_MS)
            busy = self.turn()

    def turn(self) -> bool:
        """Takes in whatever is there, does one step, sends what came of it. False: there was no step."""
        now_s = time.monotonic()
        if self._was_busy:  # up to here, for a loop that has a step to do does not wait between two turns
            self._busy_s += now_s - self._turn_began_s
        self._turn_began_s = now_s
        self._take_in()
        self._was_busy = self.role.step()
        self._once_a_second()
        self._send_out()
        return self._was_busy

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """First: drain. Second: leave at once."""
        now_s = time.monotonic()
        self._draining_until_s = now_s if self._draining_until_s else now_s + self.config.drain_timeout_s

    def close(self) -> None:
        self.server.close()
        if self.transfer is not None:
            self.transfer.close()
        if self.prepared.devices is not None:
            self.prepared.devices.close()
        self.context.engine.close()
        log.info("worker %s has ended", self.config.name)

    def finished(self) -> bool:
        """Whether a signal has come and nothing is left to wait for."""
        if self._draining_until_s is None:
            return False
        at_rest = not self.context.requests and not self.role.in_flight
        return at_rest or time.monotonic() >= self._draining_until_s

    # ------------------------------------------------------------ one turn

    def _take_in(self) -> None:
        now_s = time.monotonic()
        if self.transfer is not None:
            self.transfer.tick(now_s)
            for event in self.transfer.receive(now_s):
                try:
                    self._on_event(event)
                except Exception as error:
                    if isinstance(event, TransferLost):
                        raise  # of all requests at once, and half done
                    running = self.context.requests.of_transfer(getattr(event, "transfer_id", 0))
                    self.role.contain("event", None if running is None else running.work.request_id, error)
            self._send_address()
        for router, requests in self.server.receive():
            if router not in self._routers and not self._greet(router, requests):
                continue
            self._routers[router] = now_s
            for request in requests:
                try:
                    self._accept(router, request)
                except Exception as error:
                    self._refuse(router, request, error)
        while self._lost_routers:
            self._drop_router(self._lost_routers.pop())

    def _on_event(self, event: WorkerEvent) -> None:
        if isinstance(event, TransferSpans):
            self.tracing.answer(event)
            return
        self.role.on_transfer(event)
        if isinstance(event, TransferLost):
            self.prepared.copiers[event.rank].unmap_staging()

    def _on_bad(self, router: bytes, said: object, why: str) -> None:
        """A message that is no request. If it says which one it would be, its router need not wait for it."""
        self._count_drop("malformed_request")
        request_id = named_request(said)
        if request_id is not None:
            message = f"the worker cannot read this request: {why}"
            self.context.outbox.add(router, Failed(request_id, "internal", message, False))

    def _refuse(self, router: bytes, request: Request, error: Exception) -> None:
        """A request that could not be taken in is answered all the same, and those beside it are not hurt."""
        work = getattr(request, "work", None)
        request_id = getattr(request, "request_id", None) if work is None else work.request_id
        known = request_id is not None and request_id in self.context.requests
        self.role.contain("request", request_id, error)
        if request_id is not None and not known:
            message = "the worker failed on this request"
            self.context.outbox.add(router, Failed(request_id, "internal", message, False))

    def _send_address(self) -> None:
        """A transfer process that was restarted has a new address; without one, routers look elsewhere."""
        if self._address() != self._sent_address:
            self._sent_address = self._address()
            for router in list(self._routers):
                self.server.send(router, [self._hello()])

    def _address(self) -> WorkerTransferAddress | None:
        return self.transfer.address if self.transfer is not None and self.transfer.ready else None

    def _greet(self, router: bytes, requests: list[Request]) -> bool:
        """The first message must be a hello of our own version; anything else is refused."""
        first = requests[0] if requests else None
        if isinstance(first, RouterHello) and first.version == VERSION:
            return True
        theirs = first.version if isinstance(first, RouterHello) else "unknown (no hello)"
        self._count_drop("router_refused")
        self.server.send(router, [Refusal(f"this worker is version {VERSION}, the router is {theirs}")])
        return False

    def _accept(self, router: bytes, request: Request) -> None:
        match request:
            case RouterHello():
                self.server.send(router, [self._hello(), self._status(None)])
            case StatusRequest(ask_id=ask_id):
                self.server.send(router, [self._status(ask_id)])
            case TraceRequest():
                self.tracing.ask(router, request)
            case Generate(work=work) | Prefill(work=work) | ReserveKv(work=work) if self._draining_until_s:
                self.context.outbox.add(
                    router, Failed(work.request_id, "draining", "this worker is shutting down", True)
                )
            case Prefill(work=work) | ReserveKv(work=work) if self._address() is None:
                self.context.outbox.add(
                    router, Failed(work.request_id, "transfer", "the transfer process is not attached", True)
                )
            case RepushKv(request_id=request_id, transfer_id=transfer_id) if self._address() is None:
                message = "the transfer process is not attached"
                self.context.outbox.add(router, KvTransferFailed(request_id, transfer_id, message))
            case _:
                self.role.accept(router, request)

    def _send_out(self) -> None:
        if self.transfer is not None:
            self.transfer.flush()
        for router in self.context.outbox.flush():
            self._drop_router(router)

    def _once_a_second(self) -> None:
        now_s = time.monotonic()
        if now_s < self._next_status_s:
            return
        self._next_status_s = now_s + STATUS_INTERVAL_S
        self.role.sweep()
        self._prompt_rate.observe(now_s, self.context.counters["prompt_tokens"])
        self._output_rate.observe(now_s, self.context.counters["output_tokens"])
        status = self._status(None) if self._routers else None
        for router, heard_s in list(self._routers.items()):
            silent = now_s - heard_s > ROUTER_SILENCE_S
            if silent or (status is not None and not self.server.send(router, [status])):
                self._drop_router(router)

    def _drop_router(self, router: bytes) -> None:
        self._routers.pop(router, None)
        self.role.drop_router(router)

    def _count_drop(self, reason: str) -> None:
        self.context.counters[f"dropped_{reason}"] += 1

    # ------------------------------------------------------------ accounts

    def _hello(self) -> WorkerHello:
        return WorkerHello(
            version=VERSION,
            name=self.config.name,
            role=self.config.role,
            worker_epoch=self.epoch,
            model_digest=self.prepared.engine.geometry.model_digest,
            vocab_size=self.context.limits.vocab_size,
            max_model_len=self.config.max_model_len,
            max_sequence_tokens=self.context.limits.max_sequence_tokens,
            page_size_tokens=self.config.page_size_tokens,
            pages=self.context.pool.total,
            transfer=self._address(),
        )

    def _status(self, ask_id: int | None) -> Status:
        pool, occupancy, transfer = self.context.pool, self.role.occupancy(), self.transfer
        pages = pool.counts()
        stats = [] if transfer is None else transfer.stats()
        slots = None
        if transfer is not None and transfer.ready and stats:
            counts = total_counts(stats)
            slots = Slots(transfer.slots, counts.free, counts.granted, counts.filled, counts.quarantined)
        counters: dict[str, float] = dict(self.context.counters)
        counters["busy_seconds"] = self._busy_s
        counters["uptime_seconds"] = time.monotonic() - self._started_s
        counters["prefix_cache_queries"] = pool.prefix_queries_tokens
        counters["prefix_cache_hits"] = pool.prefix_hits_tokens
        counters["preemptions"] = self.role.preemptions()
        if stats:
            counters["transfer_bytes"] = sum(one.moved_bytes for one in stats)
            counters["transfer_segments"] = sum(one.moved_segments for one in stats)
            counters["transfer_seconds"] = sum(one.move_seconds for one in stats)
            counters["oldest_grant_age_s"] = max(one.oldest_grant_age_s for one in stats)
            dropped = Counter[str]()
            for one in stats:
                dropped.update(one.dropped)
            counters |= {f"transfer_dropped_{reason}": count for reason, count in dropped.items()}
        ledger, *others = ledgers_now(self.prepared)
        state = "draining" if self._draining_until_s else "ready"
        if transfer is not None and not transfer.ready:
            state = "no_transfer"
        return Status(
            ask_id=ask_id,
            worker_epoch=self.epoch,
            name=self.config.name,
            role=self.config.role,
            state=state,  # type: ignore[arg-type]
            pid=os.getpid(),
            transfer_pid=stats[0].pid if stats else None,
            queued=occupancy.queued,
            running=occupancy.running,
            reserved=occupancy.reserved,
            holding=occupancy.holding,
            pages=PageUsage(pages.total, pages.free, pages.cached, pages.used),
            slots=slots,
            slots_age_s=0.0 if transfer is None else time.monotonic() - transfer.stats_at_s,
            open_sends=sum(one.open_sends for one in stats),
            open_receives=sum(one.open_receives for one in stats),
            prompt_tokens_per_s=self._prompt_rate.per_second(),
            output_tokens_per_s=self._output_rate.per_second(),
            counters=counters,
            ledger=ledger,
            mover=transfer.clients[0].attached.mover if transfer is not None and transfer.ready else None,
            rank_ledgers=others,
            **({} if self.config.role == "prefill" else step_times(self.context.deadline.model)),
        )


def _build_role(context: WorkerContext, prepared: PreparedWorker) -> Role:
    role, transfer = prepared.config.role, prepared.transfer
    kv_heads = prepared.model.kv_heads
    if role == "unified":
        return UnifiedRole(context)
    if transfer is None:
        raise ValueError(f"--transfer: a {role} worker needs the address of its transfer process")
    ranks = zip(prepared.copiers, transfer.clients, strict=True)
    if role == "prefill":
        return PrefillRole(context, KvSender(ranks, kv_heads, context.clock, context.spans))
    return DecodeRole(context, KvReceiver(ranks, kv_heads, context.clock, context.spans))
