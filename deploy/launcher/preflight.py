"""Checks of a system before anything of it is started."""

from deploy.errors import UserError
from deploy.launcher.children import WorkerSlot, worker_configs, worker_slots
from deploy.settings.options import ServeSettings
from deploy.settings.planning import (
    check_checkpoint,
    check_gpu_is_here,
    check_model_dir,
    check_shared_gpus,
    resolve_device,
)
from services.config import Device
from services.engine.models.model_config import ModelConfig
from services.memory.measure import gpu_count


def checked_slots(settings: ServeSettings) -> tuple[Device, list[WorkerSlot], ModelConfig]:
    """The device, the workers and the model of a system. Raises UserError for whatever can be known to be
    wrong before anything starts."""
    check_model_dir(settings.model_dir)
    model = check_checkpoint(settings.model_dir, settings.load_format)
    device = resolve_device(settings.device)
    gpus = gpu_count() if device == "cuda" else 0
    if device == "cuda" and not gpus:
        raise UserError("--device cuda: no NVIDIA GPU is visible here; use --device cpu")
    slots = worker_slots(settings, gpus)
    if device == "cuda":
        for index in sorted({index for slot in slots for index in slot.device_indices}):
            check_gpu_is_here(index, settings.device_memory)
        check_shared_gpus(worker_configs(settings, slots), settings.device_memory)
    return device, slots, model
