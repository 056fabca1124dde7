"""Fills a decoder's parameters: from safetensors, mapped and copied tensor by tensor straight to their place,
or with random numbers of the real shape."""

from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from services.engine.checkpoint.safetensors_files import read_checkpoint_files
from services.engine.errors import CheckpointError
from services.engine.models.model_config import ModelConfig
from services.engine.models.parameters import Parameters
from services.engine.models.stored_tensors import DUMMY_SEED, Located, check_tensors

Progress = Callable[[int, int], None]


def load_safetensors(model: ModelConfig, parameters: Parameters, progress: Progress) -> None:
    """Fill every parameter from the checkpoint, converting the dtype or quantising on the way.

    Files are mapped, so that beyond the parameters themselves only one tensor is in memory at a time, and
    only the part of it that this rank holds.
    `progress(done_bytes, total_bytes)` counts the files' bytes. Raises `CheckpointError`.
    """
    files = read_checkpoint_files(model.model_dir)
    located = check_tensors(model, files)
    total_bytes = sum(found.tensor.byte_count for found in located.values())
    done_bytes = 0
    progress(0, total_bytes)
    for file in files:
        try:
            with safe_open(file.path, framework="pt", device="cpu") as stored:
                for name, found in located.items():
                    if found.file is not file:
                        continue
                    _fill(parameters, name, found, stored)
                    done_bytes += found.tensor.byte_count
                    progress(done_bytes, total_bytes)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file.path}: cannot be read: {error}") from error


def _fill(parameters: Parameters, name: str, found: Located, stored: Any) -> None:
    part = parameters.part(name)
    if part is None:
        parameters.views[name].zero_()
    elif parameters.group.size == 1:
        parameters.fill(name, stored.get_tensor(found.tensor.name))
    else:
        parameters.fill(name, stored.get_slice(found.tensor.name)[part])


def fill_dummy(parameters: Parameters, progress: Progress) -> None:
    """Random weights from a fixed seed, sampled on the device: norms are 1, matrices keep the variance.

    A matrix that is to be quantised is sampled in the model's dtype, so that its numbers are those of the
    model without quantization. A rank draws every matrix whole and keeps its part, so that ranks together are
    the model that one alone would have.
    """
    generator = torch.Generator(device=parameters.device).manual_seed(DUMMY_SEED)
    total_bytes = sum(view.numel() * view.element_size() for view in parameters.views.values())
    done_bytes = 0
    progress(0, total_bytes)
    for name, view in parameters.views.items():
        shape = parameters.specs[name].shape
        if name.endswith(".bias"):
            view.zero_()
        elif len(shape) == 1:
            view.fill_(1.0)
        else:
            in_place = name not in parameters.scales and parameters.group.size == 1
            sampled = (
                view if in_place else torch.empty(shape, dtype=parameters.dtype, device=parameters.device)
            )
            sampled.normal_(0.0, shape[-1] ** -0.5, generator=generator)
            if not in_place:
                parameters.fill(name, sampled[parameters.part(name)])
        done_bytes += view.numel() * view.element_size()
        progress(done_bytes, total_bytes)
