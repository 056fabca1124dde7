"""How many programs a device runs side by side."""

import functools

import torch


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
