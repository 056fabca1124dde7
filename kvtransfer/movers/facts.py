"""What this host allows movers to do. Looks, and changes nothing but this process."""

from collections.abc import Sequence
from pathlib import Path

from kvtransfer.buffer.cuda import CudaDevice
from kvtransfer.config import TransferConfig
from kvtransfer.movers.spec import HostFacts, MoverSpec

RDMA_CARDS = Path("/sys/class/infiniband")


def host_facts(config: TransferConfig, device: CudaDevice | None, movers: Sequence[MoverSpec]) -> HostFacts:
    """`device` is the GPU of the staging buffer, None for host memory."""
    unreachable: tuple[int, ...] = ()
    if device is not None:
        others = (gpu.index for gpu in device.visible() if gpu.index != device.index)
        unreachable = tuple(index for index in others if not device.can_access(index))
    missing = {mover.name: mover.missing() for mover in movers}
    return HostFacts(
        device=config.device,
        same_host=on_this_host(config.advertise or config.peer_listen),
        missing={name: what for name, what in missing.items() if what is not None},
        unreachable_gpus=unreachable,
        rdma_cards=rdma_cards(),
    )


def on_this_host(endpoint: str) -> bool:
    """Whether only processes of this host can reach a ZMQ endpoint."""
    return endpoint.startswith(("ipc://", "tcp://127."))


def rdma_cards(directory: Path = RDMA_CARDS) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in directory.iterdir())) if directory.is_dir() else ()
