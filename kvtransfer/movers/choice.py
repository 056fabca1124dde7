"""Which mover a transfer process uses, decided from facts about its host. Pure: facts come in.

    auto   device    peers          choice
           cpu       anywhere       nixl
           cuda      this host      cuda_ipc; else nixl, then nccl, with the reason in a warning
           cuda      other hosts    nixl; else nccl, with the reason in a warning

Whatever is forced is taken or refused, never replaced. Both ends choose for themselves; that they chose the
same is compared when they greet.
"""

from dataclasses import dataclass
from typing import get_args

from kvtransfer.config import Device, MoverName
from kvtransfer.errors import MoverUnavailable

NCCL_SLOWS = "nccl runs kernels on the GPU, which slow the worker's own steps"
NOT_ON_HOST = "it moves device memory, and this staging buffer is on the host (see --device cuda)"


@dataclass(frozen=True, slots=True)
class HostFacts:
    """`no_…` is why a way is closed, None where it is open."""

    device: Device
    same_host: bool
    """Every peer is on this host, as far as the endpoint tells: UNIX sockets, or the loopback network."""
    no_nixl: str | None = None
    no_nccl: str | None = None
    no_cuda_ipc: str | None = None
    unreachable_gpus: tuple[int, ...] = ()
    """GPUs visible here that ours cannot copy into."""
    rdma_cards: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MoverChoice:
    mover: MoverName
    warning: str | None = None
    """Why this is slower than it might be, and which flag or setting changes that."""


def choose_mover(wanted: MoverName, facts: HostFacts) -> MoverChoice:
    """Raises MoverUnavailable, naming what is missing and the flag, if nothing that is allowed works."""
    match wanted:
        case "auto":
            return _automatic(facts)
        case "nixl":
            if facts.no_nixl is not None:
                raise MoverUnavailable(f"--mover nixl: {facts.no_nixl}; {_else(facts, 'nixl')}")
            return MoverChoice("nixl", _slow_network(facts))
        case "cuda_ipc":
            why = _no_cuda_ipc(facts)
            if why is not None:
                raise MoverUnavailable(f"--mover cuda_ipc: {why}; {_else(facts, 'cuda_ipc')}")
            return MoverChoice("cuda_ipc", _unreachable(facts))
        case "nccl":
            why = _no_nccl(facts)
            if why is not None:
                raise MoverUnavailable(f"--mover nccl: {why}; {_else(facts, 'nccl')}")
            return MoverChoice("nccl", NCCL_SLOWS)
        case _:
            known = ", ".join(get_args(MoverName))
            raise MoverUnavailable(f"--mover {wanted}: not known, must be one of {known}")


def _automatic(facts: HostFacts) -> MoverChoice:
    reasons = []
    if facts.device == "cuda" and facts.same_host:
        why = _no_cuda_ipc(facts) or _unreachable(facts)
        if why is None:
            return MoverChoice("cuda_ipc")
        reasons.append(f"not cuda_ipc: {why}")
    if facts.no_nixl is None:
        reasons.append(_slow_network(facts) or "")
        return MoverChoice("nixl", "; ".join(filter(None, reasons)) or None)
    reasons.append(f"not nixl: {facts.no_nixl}")
    why = _no_nccl(facts)
    if why is not None:
        reasons.append(f"not nccl: {why}")
        raise MoverUnavailable(f"--mover auto: nothing here can move KV: {'; '.join(reasons)}")
    return MoverChoice("nccl", "; ".join([*reasons, NCCL_SLOWS]))


def _no_cuda_ipc(facts: HostFacts) -> str | None:
    return NOT_ON_HOST if facts.device == "cpu" else facts.no_cuda_ipc


def _no_nccl(facts: HostFacts) -> str | None:
    return NOT_ON_HOST if facts.device == "cpu" else facts.no_nccl


def _unreachable(facts: HostFacts) -> str | None:
    if not facts.unreachable_gpus:
        return None
    gpus = ", ".join(map(str, facts.unreachable_gpus))
    return (
        f"no peer access from this GPU to GPU {gpus}; leave those out of CUDA_VISIBLE_DEVICES, or take "
        "--mover nixl for all"
    )


def _slow_network(facts: HostFacts) -> str | None:
    if facts.device == "cpu" or facts.same_host or facts.rdma_cards:
        return None
    return (
        "no RDMA card is visible (/sys/class/infiniband is empty): NIXL moves KV over TCP and through host "
        "memory, far slower than cards would; in a container pass /dev/infiniband in"
    )


def _else(facts: HostFacts, refused: MoverName) -> str:
    """The other movers that would work."""
    closed = {"nixl": facts.no_nixl, "cuda_ipc": _no_cuda_ipc(facts), "nccl": _no_nccl(facts)}
    open_movers = [name for name, why in closed.items() if why is None and name != refused]
    if not open_movers:
        return "no other mover works here"
    return f"here would work: {', '.join(f'--mover {name}' for name in open_movers)}"
