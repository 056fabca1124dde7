"""Programmatic dependent launch: a kernel starts while the one before it in the stream still drains
(CUDA programming guide; NVIDIA GPUs of compute capability 9 and later; kept by a capture into a CUDA graph).

What a kernel may do early is read what no kernel writes, such as weights. The rules, without which results
are wrong from time to time:

1. A kernel launched with `launch_options` executes `await_earlier` before it touches anything that another
   kernel writes, and before it writes anything. The wait is for the whole of the kernel before it, which has
   itself waited for the one before, so it is for all.
2. `let_next_start` is only a hint that comes first in a kernel: the next one may take the processors that
   are left, once every program of this one has begun.

A kernel launched without the option starts when all before it have ended, as always.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

FIRST_CAPABILITY = (9, 0)


class _Switch:
    on = True


def launch_options(tensor: Tensor) -> dict[str, bool]:
    """Keyword arguments for the launch of a kernel that has a `PDL` constant, on the device of `tensor`."""
    if tensor.is_cuda and _Switch.on and _can(tensor.device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@lru_cache(maxsize=16)
def _can(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY


@contextmanager
def ordinary_launches() -> Iterator[None]:
    """Inside, kernels are launched one after the other's end: to measure, or to look for a missing wait.
    A captured graph keeps what it was captured with."""
    before, _Switch.on = _Switch.on, False
    try:
        yield
    finally:
        _Switch.on = before


@triton.jit
def let_next_start(PDL: tl.constexpr) -> None:
    if PDL:
        gdc_launch_dependents()


@triton.jit
def await_earlier(PDL: tl.constexpr) -> None:
    if PDL:
        gdc_wait()
