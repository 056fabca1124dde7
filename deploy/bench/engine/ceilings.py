"""The machine's own limits: `python -m deploy.bench.engine.ceilings --device cuda` prints them as JSON.

Reading: the best of several reductions over a buffer much larger than the caches. Copying: one buffer onto
another, bytes read and written. Products: a square matmul of random numbers, since a GPU runs zeros faster.

The benchmark runs this as a process of its own (`measure`), so that what it leaves behind on a device is not
counted as the worker's.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

import msgspec

from deploy.bench.engine.limits import Ceilings
from deploy.bench.errors import BenchError
from services.config import Device

if TYPE_CHECKING:
    import torch

CUDA_BUFFER_BYTES, CPU_BUFFER_BYTES = 4 << 30, 64 << 20
CUDA_MATMUL_SIZE, CPU_MATMUL_SIZE = 8192, 512
READ_REPEATS, MATMUL_REPEATS = 9, 40
COLUMNS = 8192
TIMEOUT_S = 180.0


def measure(device: Device) -> Ceilings:
    """The ceilings of GPU 0, or of the CPU. Raises BenchError with what the process said last."""
    command = [sys.executable, "-m", "deploy.bench.engine.ceilings", "--device", device]
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise BenchError(f"no answer within {TIMEOUT_S:g} s") from None
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise BenchError(said[-1] if said else f"exit code {done.returncode}")
    return msgspec.json.decode(done.stdout, type=Ceilings)


def measure_here(device_name: Device) -> Ceilings:
    """On a GPU in bfloat16, on a CPU in float32 with as many threads as an engine takes."""
    import torch

    from services.engine.engine import cpu_threads

    on_gpu = device_name == "cuda"
    if not on_gpu:
        torch.set_num_threads(cpu_threads())
    torch.manual_seed(0)
    device = torch.device(device_name)
    buffer_bytes = CUDA_BUFFER_BYTES if on_gpu else CPU_BUFFER_BYTES
    read_s, copy_s = _memory_s(device, buffer_bytes)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    size = CUDA_MATMUL_SIZE if on_gpu else CPU_MATMUL_SIZE
    left, right = (torch.randn((size, size), dtype=dtype, device=device) for _ in range(2))
    matmul_s = median_s(lambda: left @ right, on_gpu, MATMUL_REPEATS)
    fp8_s = _fp8_s(device, size)
    return Ceilings(
        read_bytes_per_s=buffer_bytes / read_s,
        copy_bytes_per_s=buffer_bytes / copy_s,
        matmul_flop_per_s=2 * size**3 / matmul_s,
        matmul_size=size,
        matmul_dtype=str(dtype).removeprefix("torch."),
        buffer_bytes=buffer_bytes,
        fp8_flop_per_s=None if fp8_s is None else 2 * size**3 / fp8_s,
    )


def _fp8_s(device: "torch.device", size: int) -> float | None:
    """Seconds of a square product in fp8 with a scale for each row and column, as the linear layers have
    it; None where the device has no fp8."""
    import torch

    from services.engine.precision import FP8_CAPABILITY

    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        return None
    left, right = (
        torch.randn((size, size), dtype=torch.bfloat16, device=device).to(torch.float8_e4m3fn)
        for _ in range(2)
    )
    scale = torch.ones((size, 1), dtype=torch.float32, device=device)
    return median_s(
        lambda: torch._scaled_mm(
            left, right.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        ),
        True,
        MATMUL_REPEATS,
    )


def _memory_s(device: "torch.device", buffer_bytes: int) -> tuple[float, float]:
    """Seconds to read a buffer once, and to copy its one half onto the other."""
    import torch

    on_gpu = device.type == "cuda"
    buffer = torch.empty(buffer_bytes // 4, dtype=torch.float32, device=device).normal_()
    matrix, vector = buffer.view(-1, COLUMNS), torch.ones(COLUMNS, device=device)
    upper, lower = buffer.chunk(2)
    reads: list[Callable[[], object]] = [
        lambda: buffer.sum(),
        lambda: matrix.sum(dim=1),
        lambda: torch.mv(matrix, vector),
    ]
    read_s = min(median_s(read, on_gpu, READ_REPEATS) for read in reads)
    return read_s, median_s(lambda: upper.copy_(lower), on_gpu, READ_REPEATS)


def median_s(call: Callable[[], object], on_gpu: bool, repeats: int) -> float:
    """Of calls queued without a gap on a GPU, by its own clock; of calls one by one on a CPU."""
    import torch

    call()
    if not on_gpu:
        times_s: list[float] = []
        for _ in range(repeats):
            started_s = time.perf_counter()
            call()
            times_s.append(time.perf_counter() - started_s)
        return statistics.median(times_s)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    events[-1].synchronize()
    return statistics.median(float(before.elapsed_time(after)) for before, after in pairwise(events)) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.bench.engine.ceilings", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    device: Device = parser.parse_args().device
    print(msgspec.json.encode(measure_here(device)).decode())


if __name__ == "__main__":
    main()
