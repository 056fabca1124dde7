"""From what the configuration asks for to the mover that the process uses."""

import logging

from kvtransfer.buffer.cuda import CudaDevice
from kvtransfer.config import TransferConfig
from kvtransfer.movers.base import Mover
from kvtransfer.movers.choice import choose_mover
from kvtransfer.movers.facts import host_facts
from kvtransfer.movers.registry import registered_movers
from kvtransfer.movers.spec import MoverSetup

log = logging.getLogger(__name__)


def select_mover(
    config: TransferConfig, agent_name: str, device: CudaDevice | None, ipc_handle: bytes | None
) -> Mover:
    """`device` and `ipc_handle` are the staging buffer's, None for host memory. The log has what was chosen,
    and in one warning what makes it slower than it might be.

    Raises MoverUnavailable, naming the flag.
    """
    movers = registered_movers()
    facts = host_facts(config, device, movers)
    choice = choose_mover(config.mover, facts, movers)
    log.info("mover %s (--mover %s)", choice.mover.name, config.mover)
    if choice.warning is not None:
        log.warning("mover %s: %s", choice.mover.name, choice.warning)
    return choice.mover.build(MoverSetup(agent_name, facts.same_host, device, ipc_handle))
