"""The kernel's accounting, against memory whose size is known."""

import os
import subprocess
import sys

import psutil
import pytest

from services.memory import measure

MIB = 1 << 20
SLACK = 8 * MIB


def test_resident_is_what_psutil_says() -> None:
    assert abs(measure.resident_bytes() - psutil.Process().memory_info().rss) < SLACK


def test_resident_of_another_process() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert abs(measure.resident_bytes(child.pid) - psutil.Process(child.pid).memory_info().rss) < SLACK
    finally:
        child.communicate(b"\n")
    with pytest.raises(measure.NotMeasurable, match=str(child.pid)):
        measure.resident_bytes(child.pid)


PHASE = """
import mmap, sys
from services.memory import measure

def touched(mib):
    area = mmap.mmap(-1, mib << 20)
    for offset in range(0, mib << 20, mmap.PAGESIZE):
        area[offset] = 1
    return area

with measure.host_phase() as phase:
    held = touched(32)
    touched(64).close()
print(phase.held_bytes, phase.peak_bytes, int(measure.reset_peak()))
"""


def test_a_phase_tells_what_is_held_from_what_was_touched() -> None:
    """In a process of its own: one that has lived may give back an earlier test's memory meanwhile."""
    done = subprocess.run([sys.executable, "-c", PHASE], capture_output=True, text=True, check=True)
    held_bytes, peak_bytes, peak_is_measured = (int(word) for word in done.stdout.split())
    assert abs(held_bytes - 32 * MIB) < SLACK
    if peak_is_measured:
        assert abs(peak_bytes - 96 * MIB) < SLACK


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert measure.gpu_count() == 0
    with pytest.raises(measure.NotMeasurable, match="nvidia-ml-py"):
        measure.gpu_facts(0)


class FakeNvml:
    """Two GPUs of a driver, told apart by size."""

    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index > 1:
            raise self.NVMLError("Invalid Argument")
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return {"GPU-a": 0, "GPU-b": 1}[uuid]

    def nvmlDeviceGetName(self, handle: int) -> str:
        return f"Fake {handle}"

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{'ab'[handle]}"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> object:
        return type("Memory", (), {"total": (handle + 1) * 1000, "used": 10})

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[object]:
        return [type("Process", (), {"pid": os.getpid(), "usedGpuMemory": 77 + handle})]


def test_the_drivers_answers_by_torchs_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert measure.gpu_count() == 2
    assert measure.gpu_facts(1) == measure.GpuFacts("Fake 1", 2000, 10, "GPU-b")
    assert measure.gpu_process_bytes(0) == 77
    with pytest.raises(measure.NotMeasurable, match="shows no process 1 "):
        measure.gpu_process_bytes(0, pid=1)
    with pytest.raises(measure.NotMeasurable, match="Invalid Argument"):
        measure.gpu_facts(2)
    for visible in ("1", "GPU-b"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert measure.gpu_count() == 1
        assert measure.gpu_facts(0).name == "Fake 1"
        with pytest.raises(measure.NotMeasurable, match="CUDA_VISIBLE_DEVICES"):
            measure.gpu_facts(1)
