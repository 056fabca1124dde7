"""The measured column of the ledger: by the kernel on a CPU, by the driver (NVML) on a GPU.

Nothing here allocates on a device or imports torch, so that any process may look.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PROC = Path("/proc")


class NotMeasurable(RuntimeError):
    """The kernel or the driver does not tell: no such file, process, driver or permission."""


# ---------------------------------------------------------------- host memory


def resident_bytes(pid: int | None = None) -> int:
    """VmRSS of a process (this one by default): what it holds in memory now. Raises NotMeasurable."""
    return _field_bytes("status", "VmRSS", pid)


def peak_resident_bytes(pid: int | None = None) -> int:
    """VmHWM: the most it held since its start, or since `reset_peak`. Raises NotMeasurable."""
    return _field_bytes("status", "VmHWM", pid)


def reset_peak() -> bool:
    """Start VmHWM of this process anew; False where the kernel does not allow it."""
    try:
        (_PROC / "self" / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


@dataclass(slots=True)
class MeasurePhase:
    """What one phase of a process did to its memory; filled in when the phase ends.

    `held_bytes` is what it left behind, `peak_bytes` the most it held above its start. Both may come out
    slightly off where the allocator returned pages of an earlier phase; they are never negative.
    """

    held_bytes: int = 0
    peak_bytes: int = 0


@contextmanager
def host_phase() -> Iterator[MeasurePhase]:
    """Measure the block's resident memory. Raises NotMeasurable at its start if the kernel does not tell."""
    phase = MeasurePhase()
    before_bytes = resident_bytes()
    fresh_peak = reset_peak()
    yield phase
    after_bytes = resident_bytes()
    phase.held_bytes = max(0, after_bytes - before_bytes)
    top_bytes = peak_resident_bytes() if fresh_peak else after_bytes
    phase.peak_bytes = max(phase.held_bytes, top_bytes - before_bytes)


def _field_bytes(file: str, field: str, pid: int | None) -> int:
    path = _PROC / ("self" if pid is None else str(pid)) / file
    try:
        for line in path.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError) as error:
        raise NotMeasurable(f"{path}: {error}") from error
    raise NotMeasurable(f"{path} has no field {field}")


# ---------------------------------------------------------------- device memory


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """`uuid` is the driver's, unlike any other GPU's anywhere."""

    name: str
    total_bytes: int
    used_bytes: int
    uuid: str


def gpu_count() -> int:
    """GPUs this process may use: `CUDA_VISIBLE_DEVICES` counts where it is set. 0 without a driver."""
    try:
        with _nvml() as nvml:
            physical = int(nvml.nvmlDeviceGetCount())
    except NotMeasurable:
        return 0
    visible = _visible_devices()
    return physical if visible is None else len(visible)


def gpu_facts(device_index: int) -> GpuFacts:
    """Name, size and use of a GPU, numbered as torch numbers them. Raises NotMeasurable."""
    with _nvml() as nvml:
        handle = _handle(nvml, device_index)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        return GpuFacts(
            str(nvml.nvmlDeviceGetName(handle)),
            int(memory.total),
            int(memory.used),
            str(nvml.nvmlDeviceGetUUID(handle)),
        )


def gpu_process_bytes(device_index: int, pid: int | None = None) -> int:
    """What the driver says a process holds of a GPU: its context, pools and handles together.

    Raises NotMeasurable if the driver does not know the process (a container with its own process
    numbers sees other pids) or does not tell.
    """
    wanted = os.getpid() if pid is None else pid
    with _nvml() as nvml:
        handle = _handle(nvml, device_index)
        for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid == wanted and process.usedGpuMemory is not None:
                return int(process.usedGpuMemory)
    raise NotMeasurable(f"the driver shows no process {wanted} on GPU {device_index}")


@contextmanager
def _nvml() -> Iterator[Any]:
    try:
        import pynvml
    except ImportError as error:
        raise NotMeasurable("nvidia-ml-py is not installed") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NotMeasurable(f"no NVIDIA driver: {error}") from error
    try:
        yield pynvml
    except pynvml.NVMLError as error:
        raise NotMeasurable(f"NVML: {error}") from error
    finally:
        pynvml.nvmlShutdown()


def _visible_devices() -> list[str] | None:
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if value is None else [entry.strip() for entry in value.split(",") if entry.strip()]


def _handle(nvml: Any, device_index: int) -> Any:
    visible = _visible_devices()
    if visible is None:
        return nvml.nvmlDeviceGetHandleByIndex(device_index)
    if device_index >= len(visible):
        raise NotMeasurable(f"GPU {device_index} is not among CUDA_VISIBLE_DEVICES={','.join(visible)}")
    entry = visible[device_index]
    if entry.isdigit():
        return nvml.nvmlDeviceGetHandleByIndex(int(entry))
    return nvml.nvmlDeviceGetHandleByUUID(entry)
