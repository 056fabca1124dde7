"""The worker's ledger beside what it really came to, after everything has run."""

from dataclasses import dataclass, replace

from deploy.bench.engine.report import MemoryLine
from services.memory.estimate import plan_input_for
from services.memory.measure import gpu_facts
from services.memory.plan import MemoryPlan
from services.startup import PreparedWorker, measure_now

BEYOND_REST, HELD = "allocator: most beyond its rest", "allocator: most it held, of its cap"


@dataclass(slots=True)
class DeviceMarks:
    """What only a GPU's allocator and driver know. `others_bytes` were in use before this benchmark began:
    it is alone on the device, so that the driver's sum shows the worker's context even where the driver
    does not name processes."""

    others_bytes: int
    rest_bytes: int = 0
    peak_bytes: int = 0
    held_bytes: int = 0
    context_bytes: int = 0

    def start(self, prepared: PreparedWorker) -> None:
        import torch

        device = prepared.engine.device
        torch.cuda.reset_peak_memory_stats(device)
        self.rest_bytes = torch.cuda.memory_allocated(device)

    def stop(self, prepared: PreparedWorker) -> None:
        import torch

        device = prepared.engine.device
        self.peak_bytes = torch.cuda.max_memory_allocated(device)
        self.held_bytes = torch.cuda.max_memory_reserved(device)
        used_bytes = gpu_facts(prepared.config.device_index).used_bytes
        self.context_bytes = max(0, used_bytes - self.others_bytes - prepared.engine.allocator_bytes())


def memory_report(prepared: PreparedWorker, marks: DeviceMarks | None) -> list[MemoryLine]:
    """Each line as it is planned before a worker starts, and as it was measured; on a GPU also the
    allocator: the most that steps took beyond what rests there, against the measured activations, and the
    most it held, against its cap."""
    inputs, (measured, *_) = prepared.plan.inputs, measure_now(prepared)
    if marks is not None:
        measured = replace(measured, worker_context_bytes=marks.context_bytes)
    before = plan_input_for(
        prepared.config, prepared.model, device_name=inputs.device, device_bytes=inputs.device_bytes
    )
    figures = [
        (entry.name, entry.planned_bytes, entry.measured_bytes)
        for entry in MemoryPlan(before).entries(measured)
        if entry.measured_bytes is not None
    ]
    if marks is not None:
        figures.append((BEYOND_REST, inputs.activation_bytes, marks.peak_bytes - marks.rest_bytes))
        figures.append((HELD, prepared.plan.worker_cap_bytes, marks.held_bytes))
    return [
        MemoryLine(name, planned, held, 100 * (held - planned) / inputs.device_bytes)
        for name, planned, held in figures
    ]
