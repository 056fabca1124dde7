"""Chooses the mover from what the configuration says about the topology."""

from kvtransfer.config import TransferConfig
from kvtransfer.errors import MoverUnavailable
from kvtransfer.movers.base import Mover
from kvtransfer.movers.nixl import NixlMover

AVAILABLE = ("auto", "nixl")


def select_mover(config: TransferConfig, agent_name: str) -> Mover:
    """`auto` is NIXL, the one that works everywhere: between hosts, GPUs and plain processes.

    Peers on UNIX sockets are on this host, so host memory then stays off every network card. Raises
    MoverUnavailable, naming the flag.
    """
    if config.mover not in AVAILABLE:
        raise MoverUnavailable(f"--mover {config.mover}: not known, must be one of {', '.join(AVAILABLE)}")
    same_host = config.device == "cpu" and (
        config.peer_listen.startswith("ipc://") or config.peer_listen.startswith("tcp://127.")
    )
    return NixlMover(agent_name, same_host=same_host)
