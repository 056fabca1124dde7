"""The description that every mover's file gives of its mover.

A mover is one file of this folder: its class, and a `MoverSpec` called `MOVER`, which the registry finds. No
other file names it. A spec loads no library of its mover: a command line that only lists names, and a worker
that only counts memory, read it too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kvtransfer.buffer.cuda import CudaDevice
from kvtransfer.config import Device
from kvtransfer.errors import MoverUnavailable
from kvtransfer.movers.base import Mover

NOT_ON_HOST = "it moves device memory, and this staging buffer is on the host (see --device cuda)"


@dataclass(frozen=True, slots=True)
class HostFacts:
    """The facts about one transfer process and its host that the choice of a mover depends on."""

    device: Device
    same_host: bool
    """Every peer is on this host, as far as the endpoint shows: UNIX sockets, or the loopback network."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Movers whose libraries are not here, by name, each with what is missing."""
    unreachable_gpus: tuple[int, ...] = ()
    """GPUs visible here that ours cannot copy into."""
    rdma_cards: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MoverSetup:
    """What a mover is built from. `device` and `cuda_ipc_handle` are the staging buffer's, None for host
    memory."""

    agent_name: str
    same_host: bool
    device: CudaDevice | None
    cuda_ipc_handle: bytes | None

    @property
    def gpu(self) -> CudaDevice:
        """The device of a mover that needs one. Raises MoverUnavailable for host memory."""
        if self.device is None:
            raise MoverUnavailable(NOT_ON_HOST)
        return self.device


def needs_device_memory(facts: HostFacts) -> str | None:
    """The `why_not` of a mover that moves nothing but device memory."""
    return NOT_ON_HOST if facts.device == "cpu" else None


def _nothing(facts: HostFacts) -> str | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class MoverSpec:
    """One mover: when it is chosen, what it costs, how it is built. Questions about the host are answered by
    one clause of a message, or None where nothing has to be added."""

    name: str
    """The value of `--mover`, and what peers compare: the `name` of what `build` gives."""
    preference: int
    """Among the movers that work, `--mover auto` takes the one with the highest."""
    build: Callable[[MoverSetup], Mover]
    """Loads the library. Raises MoverUnavailable, naming the flag."""
    automatic: Callable[[HostFacts], bool] = lambda facts: True
    """Whether `--mover auto` considers it at all."""
    missing: Callable[[], str | None] = lambda: None
    """What it needs that is not installed here. Looks, and loads nothing."""
    why_not: Callable[[HostFacts], str | None] = _nothing
    """Why it cannot be used here, whatever is installed."""
    unreachable: Callable[[HostFacts], str | None] = _nothing
    """Which peers it cannot reach from here: `--mover auto` passes it over, and one that is forced warns."""
    drawback: Callable[[HostFacts], str | None] = _nothing
    """Why it is slower than it might be, and which flag or setting changes that: it warns when chosen."""
    context_bytes: int = 0
    """Device memory that its library takes, beside the buffer and a process's bare context."""
