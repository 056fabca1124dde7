"""The transfer process, one beside every worker rank. Its life cycle:

    1. allocate the staging buffer, and register it with the mover
    2. listen: for the worker, for peers that receive from here, and to hand out the buffer
    3. the worker attaches; only then does the process know the KV's shape, and greet peers
    4. serve: receive, tick the state machines, hand out free slots, carry out the actions they ask for;
       sleep until the next message or deadline, briefly only while a write is in flight
    5. the worker is gone: its transfers are cancelled, the next worker may attach
    6. SIGTERM: cancel everything, wait a moment for writes in flight, release, remove, deregister, unlink

The pure state machines (`protocol/machine.py`) take all decisions; this file does what touches the world. One
thread.
"""

import logging
import os
import secrets
import time

import zmq

from kvtransfer.buffer.cuda import CudaDevice
from kvtransfer.buffer.staging import (
    DeviceStaging,
    HostStaging,
    StagingSocketServer,
)
from kvtransfer.codecs import PEER_MESSAGES, WORKER_COMMANDS, WORKER_EVENTS
from kvtransfer.config import TransferConfig
from kvtransfer.errors import MoverBroken, TransferConfigError
from kvtransfer.messages import (
    VERSION,
    AskSpans,
    Attached,
    AttachRefused,
    AttachWorker,
    Command,
    KvGeometry,
    Ping,
    TransferAddress,
    TransferSpans,
)
from kvtransfer.movers.base import two_sided
from kvtransfer.movers.select import select_mover
from kvtransfer.net.channel import ChannelKeys, Server
from kvtransfer.peers.destinations import Destinations
from kvtransfer.peers.handshake import PEER_VERSION
from kvtransfer.peers.sources import PeerLink, Sources
from kvtransfer.peers.writes import Writes
from kvtransfer.protocol.limits import TransferLimits
from kvtransfer.protocol.machine import TransferMachine
from kvtransfer.protocol.outbox import Destination
from kvtransfer.protocol.peer_messages import PeerHello, PeerMessage
from kvtransfer.stats import StatsCollector
from kvtransfer.stop_signal import StopSignal
from kvtransfer.worker_port import WorkerPort

log = logging.getLogger(__name__)

STATS_S = 1.0
LONGEST_SLEEP_S = 30.0
SHUTDOWN_S = 1.0
SPIN_S = 0.0005
"""For so long the process polls a quick mover's write without sleeping: many times what a slot takes."""
BROKEN_EXIT_CODE = 1


def run(config: TransferConfig) -> None:
    """Serves until SIGTERM. Raises TransferConfigError / MoverUnavailable if it cannot start.

    Where the device has failed it does not return: the process ends at once, since another call to the driver
    might wait for ever. Only that end surely stops what is in flight.
    """
    process = TransferProcess(config)
    try:
        process.serve()
    except MoverBroken as error:
        log.critical("%s ends: %s", config.name, error)
        os._exit(BROKEN_EXIT_CODE)
    finally:
        process.close()


class TransferProcess:
    """One incarnation of a transfer process; see the module for its life cycle."""

    def __init__(self, config: TransferConfig) -> None:
        self.config = config
        self.epoch = secrets.randbelow(2**63 - 1) + 1
        keys = ChannelKeys.load(config.key_dir) if config.key_dir is not None else None
        size_bytes = config.slots * config.slot_bytes
        device = CudaDevice(config.device_index) if config.device == "cuda" else None
        self._staging: HostStaging | DeviceStaging
        self._staging = HostStaging(size_bytes) if device is None else DeviceStaging(size_bytes, device)
        agent_name = f"{config.name}-{self.epoch:x}"
        self._mover = select_mover(config, agent_name, device, self._staging.cuda_ipc_handle)
        self._two_sided = two_sided(self._mover)
        self._mover.register(self._staging.region)
        self._metadata = self._mover.metadata()
        self._machine = TransferMachine(self._limits(None))
        drops = self._machine.outbox.drops

        def on_drop(reason: str) -> None:
            drops[reason] += 1

        server = Server(
            config.listen, WORKER_COMMANDS, WORKER_EVENTS, keys=keys, on_drop=on_drop, refusal=AttachRefused
        )
        self._peer_server = Server(
            config.peer_listen, PEER_MESSAGES, PEER_MESSAGES, keys=keys, on_drop=on_drop
        )
        self._worker_server = server
        self._worker = WorkerPort(server, self.epoch)
        self.address = TransferAddress(config.advertise or self._peer_server.endpoint, self.epoch)
        self._destinations = Destinations(
            self._peer_server,
            self._machine,
            self._mover,
            self.epoch,
            self._hello,
            config.device == "cuda",
            config.peer_timeout_s,
            config.heartbeat_s,
        )
        self._sources = Sources(
            self._machine,
            PEER_MESSAGES,
            keys,
            self.epoch,
            self._hello,
            config.peer_timeout_s,
            config.heartbeat_s,
            self._watch,
            self._unwatch,
            self._two_sided,
        )
        self._writes = Writes(
            self._mover,
            self._machine.sender,
            config.slot_bytes,
            config.transfer_timeout_s,
            self._destinations.lose,
        )
        self._staging_server: StagingSocketServer | None = None
        self._poller = zmq.Poller()
        self._poller.register(self._worker_server.socket, zmq.POLLIN)
        self._poller.register(self._peer_server.socket, zmq.POLLIN)
        if isinstance(self._staging, HostStaging) and config.staging_socket is not None:
            self._staging_server = StagingSocketServer(config.staging_socket, self._staging.fd)
            self._poller.register(self._staging_server.fileno(), zmq.POLLIN)
        self._stats_at_s = 0.0
        self._stats_collector = StatsCollector(self.epoch, self._machine, self._writes, self._staging, device)
        self._stop: StopSignal | None = None

    # ------------------------------------------------------------ 4. serve

    def serve(self) -> None:
        """Returns after SIGTERM (or SIGINT, which a terminal sends to the whole group)."""
        self._stop = stop = StopSignal()
        self._poller.register(stop.fileno(), zmq.POLLIN)
        log.info(
            "%s ready: %d slots of %d bytes, mover %s, peers at %s, epoch %d",
            self.config.name,
            self.config.slots,
            self.config.slot_bytes,
            self._mover.name,
            self.address.endpoint,
            self.epoch,
        )
        while not stop.received:
            self._sleep(time.monotonic())
            self.step(time.monotonic())
        self._shut_down()

    def step(self, now_s: float) -> None:
        """Receives whatever is there and carries out whatever follows. Never waits."""
        if self._staging_server is not None:
            self._staging_server.serve()
        for command in self._worker.receive():
            self._on_command(command, now_s)
        self._destinations.receive(now_s)
        self._sources.receive(now_s)
        if self._two_sided is not None:
            self._two_sided.step()
        self._writes.poll(now_s)
        self._destinations.tick(now_s)
        self._sources.tick(now_s)
        self._machine.tick(now_s)
        self._machine.settle(now_s)
        self._carry_out(now_s)
        if self._worker.attached is not None and now_s >= self._stats_at_s:
            self._send_stats(now_s)

    def _carry_out(self, now_s: float) -> None:
        """Empties the outbox; what that leads to at once (a write already done) is carried out too."""
        self._destinations.send_notes(now_s)
        out = self._machine.outbox
        while not out.empty:
            connects, out.connects = out.connects, []
            for address in connects:
                self._sources.connect(address, now_s)
            writes, out.writes = out.writes, []
            for write in writes:
                peer = write.destination
                agent, slot_bytes = self._destinations.agent(peer), self._destinations.slot_bytes(peer)
                self._writes.post(write, agent, now_s, slot_bytes)
            if writes:
                self._destinations.send_notes(now_s)
                self._writes.poll(time.monotonic())
                self._machine.settle(now_s)
            to_sources, out.to_sources = out.to_sources, []
            by_source: dict[TransferAddress, list[PeerMessage]] = {}
            for address, message in to_sources:
                by_source.setdefault(address, []).append(message)
            for address, messages in by_source.items():
                self._sources.send(address, messages, now_s)
            to_destinations, out.to_destinations = out.to_destinations, []
            by_destination: dict[Destination, list[PeerMessage]] = {}
            for destination, message in to_destinations:
                by_destination.setdefault(destination, []).append(message)
            for destination, messages in by_destination.items():
                self._destinations.send(destination, messages, now_s)
            events, out.to_worker = out.to_worker, []
            if events and not self._worker.send(events) and self._worker.attached is not None:
                self._worker_lost(now_s)

    def _sleep(self, now_s: float) -> None:
        """Until something comes, or the next deadline; a write in flight is looked after meanwhile."""
        if len(self._writes):
            # Fine steps at first (ZMQ's are a millisecond at least), coarse ones for a write that hangs.
            waited_s = now_s - self._writes.last_progress_s
            if waited_s < 0.02:
                if not self._poller.poll(0) and not (self._mover.quick and waited_s < SPIN_S):
                    time.sleep(0.0001)
            else:
                self._poller.poll(1 if waited_s < 1.0 else 20)
            return
        if self._two_sided is not None and self._two_sided.busy:
            self._poller.poll(1)
            return
        until_s = self.next_deadline_s(now_s)
        sleep_s = min(max(until_s - now_s, 0.0), LONGEST_SLEEP_S)
        self._poller.poll(int(sleep_s * 1000) + 1)

    def next_deadline_s(self, now_s: float) -> float:
        """When `step` has something to do at the latest, if no message comes and no write is in flight."""
        deadlines = [
            self._machine.next_deadline_s(),
            self._destinations.next_deadline_s(),
            self._sources.next_deadline_s(),
            self._stats_at_s if self._worker.attached is not None else None,
        ]
        return min((d for d in deadlines if d is not None), default=now_s + LONGEST_SLEEP_S)

    # ------------------------------------------------------------ 3., 5. the worker

    def _on_command(self, command: Command, now_s: float) -> None:
        if isinstance(command, AttachWorker):
            self._attach(command, now_s)
        elif isinstance(command, Ping):
            self._send_stats(now_s)
        elif isinstance(command, AskSpans):
            out = self._machine.outbox
            out.to_worker.append(TransferSpans(command.transfer_id, out.spans.of(command.transfer_id)))
        else:
            self._machine.on_command(command, now_s)

    def _attach(self, command: AttachWorker, now_s: float) -> None:
        former = self._worker.attached
        self._machine.worker_gone("the worker has started anew", now_s)
        if command.version != VERSION:
            self._worker.refuse(f"this transfer process is version {VERSION}, the worker {command.version}")
            return
        try:
            limits = self._limits(command)
        except TransferConfigError as error:
            self._worker.refuse(str(error))
            return
        if former is not None and _shape(former) != _shape(command):
            self._destinations.lose_all("the worker's KV has another shape now", now_s)
            self._sources.lose_all("the worker's KV has another shape now", now_s)
        self._machine.set_limits(limits)
        device = isinstance(self._staging, DeviceStaging)
        reply = Attached(
            address=self.address,
            mover=self._mover.name,
            slots=self.config.slots,
            slot_bytes=self.config.slot_bytes,
            checksum=self.config.checksum,
            staging_socket=None if device else str(self.config.staging_socket),
            cuda_ipc_handle=self._staging.cuda_ipc_handle,
            cuda_device=self.config.device_index if device else None,
        )
        self._worker.accept(command, reply)

    def _worker_lost(self, now_s: float) -> None:
        log.warning("worker lost: its connection is gone")
        self._worker.detach()
        self._machine.worker_gone("the worker is gone", now_s)

    def _send_stats(self, now_s: float) -> None:
        self._stats_at_s = now_s + STATS_S
        peers = len(self._sources) + len(self._destinations)
        if (
            not self._worker.send([self._stats_collector.collect(peers, now_s)])
            and self._worker.attached is not None
        ):
            self._worker_lost(now_s)
            self._carry_out(now_s)

    def _limits(self, worker: AttachWorker | None) -> TransferLimits:
        config = self.config
        geometry, tp = (worker.geometry, worker.tp) if worker is not None else (None, 1)
        return TransferLimits.of(
            geometry, config.slots, config.slot_bytes, config.share, config.transfer_timeout_s, tp
        )

    def _hello(self, expected_epoch: int | None) -> PeerHello | None:
        worker, region = self._worker.attached, self._staging.region
        if worker is None:
            return None
        return PeerHello(
            version=PEER_VERSION,
            epoch=self.epoch,
            expected_epoch=expected_epoch,
            mover=f"{self._mover.name}/{self.config.device}",
            geometry=worker.geometry,
            slots=self.config.slots,
            slot_bytes=self.config.slot_bytes,
            agent_name=self._mover.agent_name,
            agent_metadata=self._metadata,
            base_address=region.address,
            device_id=region.device_id,
            rank=worker.rank,
            tp=worker.tp,
        )

    def _watch(self, link: PeerLink) -> None:
        self._poller.register(link.socket, zmq.POLLIN)

    def _unwatch(self, link: PeerLink) -> None:
        self._poller.unregister(link.socket)

    # ------------------------------------------------------------ 6. the end

    def _shut_down(self) -> None:
        """Notifies worker and peers, and gives writes in flight a moment, so that peers receive `Closed`."""
        log.info("%s ends", self.config.name)
        now_s = time.monotonic()
        until_s = now_s + SHUTDOWN_S
        self._machine.worker_gone("the transfer process ends", now_s)
        self._carry_out(now_s)
        while len(self._writes) and now_s < until_s:
            time.sleep(0.001)
            now_s = time.monotonic()
            if self._two_sided is not None:
                self._two_sided.step()
            self._writes.poll(now_s)
            self._carry_out(now_s)

    def close(self) -> None:
        """Frees everything: first nobody can reach this process, then the mover lets go, then the memory
        goes. Idempotent."""
        if self._stop is not None:
            self._stop.close()
            self._stop = None
        if self._staging_server is not None:
            self._staging_server.close()
        self._sources.close()
        self._stats_collector.close()
        self._worker_server.close()
        self._peer_server.close()
        self._mover.close()
        self._staging.close()


def _shape(worker: AttachWorker) -> tuple[KvGeometry, int, int]:
    """What this process's hello has sent to peers about a worker."""
    return worker.geometry, worker.rank, worker.tp
