"""What the ranks of one worker do together in a step: sums, the logits' columns, and the sampled ids.

gloo on a CPU, NCCL on GPUs, where the calls are only queued and may be captured in a CUDA graph.
"""

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from services.config import WorkerConfig
from services.engine.errors import EngineError

COLLECTIVE_TIMEOUT_S = 120.0
"""A rank that has not come to a collective by then never will. Long, because kernels are compiled between the
first ones."""


class RankGroupError(EngineError):
    """The ranks could not find each other."""


class RankGroup:
    """One rank alone, which has nothing to sum. `rank` is counted from 0, `size` is how many there are."""

    rank = 0
    size = 1

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the ranks' `x`, in `x` itself."""
        return x

    def columns(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The ranks' `x` `[n, m]` side by side, `[n, size * m]`, in `out` if given, on every rank."""
        if out is None:
            return x
        return out.copy_(x)

    def share(self, x: Tensor) -> None:
        """Rank 0's `x` on every rank."""

    def close(self) -> None:
        """No collective may follow. Idempotent."""


class DistributedGroup(RankGroup):
    """One of several. Every rank calls the same methods in the same order with the same shapes; a rank that
    dies makes the others' calls raise on a CPU, and on a GPU leaves them waiting until they are ended."""

    def __init__(self, config: WorkerConfig, store: Path) -> None:
        """Waits for all. `store` is a file in a private directory that did not exist before the first life.
        Raises `RankGroupError`."""
        self.rank, self.size = rank, size = config.rank, config.tp
        device = torch.device("cpu")
        if config.device == "cuda":
            device = torch.device("cuda", config.device_index)
            torch.cuda.set_device(device)
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")  # ranks share a host: nobody outside it may connect
        try:
            dist.init_process_group(
                backend="nccl" if device.type == "cuda" else "gloo",
                store=FileStore(str(store), size),
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
                device_id=device if device.type == "cuda" else None,
            )
            dist.all_reduce(torch.zeros(1, device=device))
        except RuntimeError as error:
            raise RankGroupError(f"rank {rank} of {size} found no group: {error}") from error

    def sum(self, x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x

    def columns(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        count, width = x.shape
        gathered = x.new_empty((self.size, count, width))
        if x.is_cuda:
            # one call without copies, which a CUDA graph can hold
            dist.all_gather_into_tensor(gathered.view(-1, width), x.contiguous())
        else:
            dist.all_gather(list(gathered.unbind()), x.contiguous())
        if out is None:
            out = x.new_empty((count, self.size * width))
        out.view(count, self.size, width).copy_(gathered.transpose(0, 1))
        return out

    def share(self, x: Tensor) -> None:
        dist.broadcast(x, src=0)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
