"""From what the configuration asks for to the mover that the process uses."""

import logging

from kvtransfer.buffer.cuda import CudaDevice
from kvtransfer.config import TransferConfig
from kvtransfer.errors import MoverUnavailable
from kvtransfer.movers.base import Mover
from kvtransfer.movers.choice import choose_mover
from kvtransfer.movers.cuda_ipc import CudaIpcMover
from kvtransfer.movers.facts import host_facts
from kvtransfer.movers.nccl import NcclMover
from kvtransfer.movers.nccl_library import NcclError, NcclLibrary
from kvtransfer.movers.nixl import NixlMover

log = logging.getLogger(__name__)


def select_mover(
    config: TransferConfig, agent_name: str, device: CudaDevice | None, ipc_handle: bytes | None
) -> Mover:
    """`device` and `ipc_handle` are the staging buffer's, None for host memory. Says in the log what was
    chosen, and in one warning what makes it slower than it might be.

    Raises MoverUnavailable, naming the flag.
    """
    facts = host_facts(config, device)
    choice = choose_mover(config.mover, facts)
    log.info("mover %s (--mover %s)", choice.mover, config.mover)
    if choice.warning is not None:
        log.warning("mover %s: %s", choice.mover, choice.warning)
    if choice.mover == "nixl":
        # Peers of host memory on this host: keep it off every network card.
        return NixlMover(agent_name, same_host=facts.same_host and device is None)
    if choice.mover == "cuda_ipc" and device is not None and ipc_handle is not None:
        return CudaIpcMover(agent_name, device, ipc_handle)
    if choice.mover == "nccl" and device is not None:
        try:
            return NcclMover(agent_name, NcclLibrary(same_host=facts.same_host), device)
        except NcclError as error:
            raise MoverUnavailable(f"--mover nccl: {error}") from error
    raise MoverUnavailable(f"--mover {choice.mover}: needs device memory")
