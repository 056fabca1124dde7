"""How much memory a piece of work takes at its peak, beyond what was held before it."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

from services.engine.errors import EngineError

ALLOCATOR_SLACK_BYTES = 2 * (2 << 20) + (20 << 20)
"""What torch's caching allocator may reserve beyond a peak that was measured once. It takes small blocks from
segments of 2 MiB, one set for each of the two streams that a worker has, and those up to 10 MiB from segments
of 20 MiB; how many it needs depends on the order in which blocks of different sizes come and go. A mixture of
experts, whose sizes follow the tokens, was refused 2 MiB under a cap without this."""
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""What makes Linux set VmHWM back to the present resident size (proc(5))."""


def peak_bytes(work: Callable[[], None], device: torch.device) -> int:
    """Run `work`; return its peak. On a GPU what torch's allocator used or had to reserve, which is what
    its cap bounds; on a CPU by the kernel's account of the process. Where the kernel does not let the peak
    be reset, the growth of the all-time peak is returned, which a bigger peak before may hide."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        used, held = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        # A small peak may fit into what was reserved already.
        used_more = torch.cuda.max_memory_allocated(device) - used
        return max(0, used_more, torch.cuda.max_memory_reserved(device) - held)
    _give_back_free_heap()
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
        before = _status_bytes("VmRSS")
    except OSError:
        before = _status_bytes("VmHWM")
    work()
    return max(0, _status_bytes("VmHWM") - before)


def _give_back_free_heap() -> None:
    """Memory that the C library keeps for later would be used again unnoticed. Only glibc has the call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise EngineError(f"{_STATUS} has no {field}: cannot measure memory on this system")
