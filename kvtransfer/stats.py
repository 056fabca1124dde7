"""The statistics that a transfer process sends to its worker."""

import os
from functools import partial

import psutil

from kvtransfer.buffer.cuda import CudaDevice
from kvtransfer.buffer.staging import StagingBuffer, device_bytes_of_this_process
from kvtransfer.messages import Stats
from kvtransfer.peers.writes import Writes
from kvtransfer.protocol.machine import TransferMachine
from kvtransfer.watched import Watched


class StatsCollector:
    """Collects `Stats` from every part of one transfer process. `device` is None where the staging buffer is
    host memory. To be closed."""

    def __init__(
        self,
        epoch: int,
        machine: TransferMachine,
        writes: Writes,
        staging: StagingBuffer,
        device: CudaDevice | None,
    ) -> None:
        self._epoch, self._machine, self._writes = epoch, machine, writes
        self._staging = staging
        self._device_bytes: Watched[int | None] | None = None
        if device is not None:
            self._device_bytes = Watched(partial(device_bytes_of_this_process, device.uuid))
        self._process = psutil.Process()

    def collect(self, peers: int, now_s: float) -> Stats:
        machine, writes = self._machine, self._writes
        return Stats(
            epoch=self._epoch,
            pid=os.getpid(),
            counts=machine.pool.counts(),
            open_sends=machine.sender.open_transfers,
            open_receives=machine.receiver.open_transfers,
            peers=peers,
            moved_bytes=writes.moved_bytes,
            moved_segments=writes.moved_segments,
            move_seconds=writes.move_seconds,
            oldest_grant_age_s=machine.pool.oldest_grant_age_s(now_s),
            dropped=dict(machine.outbox.drops),
            resident_bytes=self._process.memory_info().rss,
            staging_resident_bytes=self._staging.resident_bytes(),
            device_bytes=None if self._device_bytes is None else self._device_bytes.latest,
        )

    def close(self) -> None:
        """Ends the thread that asks the driver for figures. Idempotent."""
        if self._device_bytes is not None:
            self._device_bytes.close()
