"""The ledgers of one GPU added up: what all its workers take together, beside what the driver says. Pure."""

from collections.abc import Sequence

from msgspec import Struct

from services.protocol.worker_status import Ledger


class DeviceShare(Struct, frozen=True):
    """One worker's part. `measured_bytes` counts planned bytes for a line that nobody measured."""

    name: str
    planned_bytes: int
    measured_bytes: int


class SharedDevice(Struct, frozen=True):
    """`used_bytes` is what the driver says is taken, by these workers and by others; None: nobody says."""

    device_id: str
    device: str
    device_bytes: int
    used_bytes: int | None
    workers: list[DeviceShare]

    @property
    def planned_bytes(self) -> int:
        return sum(worker.planned_bytes for worker in self.workers)

    @property
    def measured_bytes(self) -> int:
        return sum(worker.measured_bytes for worker in self.workers)


def shared_devices(ledgers: Sequence[tuple[str, Ledger]]) -> list[SharedDevice]:
    """Of the GPUs that `(name, ledger)` name, in their order. Host memory is left out: on a CPU each worker
    has a device of its own."""
    found: dict[str, SharedDevice] = {}
    for name, ledger in ledgers:
        if not ledger.device_id:
            continue
        device = found.setdefault(
            ledger.device_id,
            SharedDevice(ledger.device_id, ledger.device, ledger.device_bytes, ledger.device_used_bytes, []),
        )
        planned = [entry.planned_bytes for entry in ledger.entries]
        measured = [
            entry.planned_bytes if entry.measured_bytes is None else entry.measured_bytes
            for entry in ledger.entries
        ]
        device.workers.append(DeviceShare(name, sum(planned), sum(measured)))
    return list(found.values())
