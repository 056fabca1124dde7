"""The configuration of a transfer process: one frozen value, built by the command line, and nothing else."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvtransfer.errors import TransferConfigError

Device = Literal["cpu", "cuda"]
AUTO = "auto"
"""The mover that leaves the choice to the process."""

DEFAULT_SHARE = 0.75
"""The part of the slots that one transfer may have. The rest is left for the next transfers."""


@dataclass(frozen=True, slots=True)
class TransferConfig:
    """Addresses are ZMQ endpoints (`ipc:///path` in a directory of mode 0700, or `tcp://host:port` with
    keys). Raises TransferConfigError, naming the field, for values that cannot work."""

    name: str
    listen: str
    """Where the worker reaches this process."""
    peer_listen: str
    """Where other transfer processes reach this one."""
    staging_socket: Path | None
    """The UNIX socket that hands the host buffer to the worker. Device memory needs none."""
    advertise: str | None = None
    """The endpoint that is sent to peers instead of `peer_listen`: needed where that binds every
    interface."""
    device: Device = "cpu"
    device_index: int = 0
    slots: int = 32
    slot_bytes: int = 8 << 20
    mover: str = AUTO
    """A registered mover's name, or AUTO; `choose_mover` refuses any other."""
    checksum: bool = False
    key_dir: Path | None = None
    transfer_timeout_s: float = 60.0
    """The longest that an offer waits for the worker to open it, and that a single write may take."""
    peer_timeout_s: float = 5.0
    """After so long a peer that is silent, or not connected yet, is lost."""
    heartbeat_s: float = 0.5
    share: float = DEFAULT_SHARE
    """The part of the slots that one transfer may have."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.name) <= 64:
            raise TransferConfigError("name: must have 1 to 64 characters")
        if not 2 <= self.slots < 1 << 20:
            raise TransferConfigError(f"slots: {self.slots} is not allowed, must be 2 to {(1 << 20) - 1}")
        if not 1 <= self.slot_bytes < 1 << 40:
            raise TransferConfigError(f"slot_bytes: {self.slot_bytes} is not allowed, must be 1 to 2^40 - 1")
        if self.slot_bytes % 256:
            raise TransferConfigError(f"slot_bytes: {self.slot_bytes} is not a multiple of 256")
        if self.device == "cpu" and self.staging_socket is None:
            raise TransferConfigError("staging_socket: needed with host memory (device cpu)")
        if not 0 < self.share <= 1:
            raise TransferConfigError(f"share: {self.share} is not allowed, must be above 0 and at most 1")
        for field in ("transfer_timeout_s", "peer_timeout_s", "heartbeat_s"):
            if not 0 < getattr(self, field) <= 86400:
                raise TransferConfigError(f"{field}: must be above 0 and at most 86400")
        if self.heartbeat_s * 2 > self.peer_timeout_s:
            raise TransferConfigError(
                f"heartbeat_s: {self.heartbeat_s} is over half of peer_timeout_s ({self.peer_timeout_s})"
            )
        if "*" in self.peer_listen and self.advertise is None:
            raise TransferConfigError("advertise: needed where peer_listen binds every interface")
