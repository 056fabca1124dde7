"""What this host allows movers to do. Looks, and changes nothing but this process."""

import importlib.util
from pathlib import Path

from kvtransfer.buffer.cuda import CudaDevice
from kvtransfer.config import TransferConfig
from kvtransfer.movers.choice import HostFacts
from kvtransfer.movers.nccl_library import find_nccl

RDMA_CARDS = Path("/sys/class/infiniband")


def host_facts(config: TransferConfig, device: CudaDevice | None) -> HostFacts:
    """`device` is the GPU of the staging buffer, None for host memory."""
    unreachable: tuple[int, ...] = ()
    if device is not None:
        others = (gpu.index for gpu in device.visible() if gpu.index != device.index)
        unreachable = tuple(index for index in others if not device.can_access(index))
    return HostFacts(
        device=config.device,
        same_host=on_this_host(config.advertise or config.peer_listen),
        no_nixl=_no_nixl(),
        no_nccl=None if find_nccl() else "libnccl.so.2 is not found (package nvidia-nccl-cu13)",
        unreachable_gpus=unreachable,
        rdma_cards=rdma_cards(),
    )


def on_this_host(endpoint: str) -> bool:
    """Whether only processes of this host can reach a ZMQ endpoint."""
    return endpoint.startswith(("ipc://", "tcp://127."))


def rdma_cards(directory: Path = RDMA_CARDS) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in directory.iterdir())) if directory.is_dir() else ()


def _no_nixl() -> str | None:
    """Only whether it is there: to load it is to choose it, and what fails then says why."""
    if importlib.util.find_spec("nixl_cu13") is None:
        return "the package nixl-cu13 is not installed"
    return None
