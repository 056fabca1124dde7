"""A worker's configuration from its settings: the "auto" values, and the ledger check before the start."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from deploy.errors import UserError
from deploy.settings.options import EngineSettings
from kvtransfer.protocol.layout import rank_slot_bytes
from services.config import Device, Dtype, KvDtype, Quantization, WorkerConfig
from services.engine.checkpoint.model_directory import hint
from services.engine.checkpoint.safetensors_files import read_checkpoint_files
from services.engine.errors import CheckpointError
from services.engine.models.model_config import ModelConfig, read_model_config
from services.engine.models.stored_tensors import check_tensors
from services.engine.precision import PrecisionError, check_flags
from services.memory.estimate import contexts, plan_input_for
from services.memory.measure import NotMeasurable, gpu_count, gpu_facts
from services.memory.plan import MemoryPlan, plan_memory
from services.protocol.messages import Role
from services.protocol.worker_status import share_of

CPU_DEVICE_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a setting that was not given is on one kind of device."""

    mem_fraction: float
    staging_slot_bytes: int
    page_size: int
    max_batch: int
    max_chunk_tokens: int
    slo_itl_ms: float


DEFAULTS: dict[Device, Defaults] = {
    # An interpreter with torch is a large part of a small device; on a GPU the rest is small change.
    # On a CPU steps take as long as others leave them time.
    "cpu": Defaults(0.6, 1 << 20, page_size=16, max_batch=64, max_chunk_tokens=512, slo_itl_ms=0.0),
    "cuda": Defaults(0.85, 8 << 20, page_size=64, max_batch=256, max_chunk_tokens=2048, slo_itl_ms=25.0),
}


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    name: str
    size_bytes: int


def resolve_device(device: str) -> Device:
    """The device to run on: `auto` is cuda where the driver shows a GPU, else cpu."""
    if device == "auto":
        return "cuda" if gpu_count() else "cpu"
    return cast(Device, device)


def resolve_dtype(dtype: str, device: Device) -> Dtype:
    if dtype == "auto":
        return "bfloat16" if device == "cuda" else "float32"
    return cast(Dtype, dtype)


def resolve_mem_fraction(mem_fraction: float | None, device: Device) -> float:
    return _given(mem_fraction, DEFAULTS[device].mem_fraction)


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def resolve_slot_bytes(slot_bytes: int | None, device: Device) -> int:
    return DEFAULTS[device].staging_slot_bytes if slot_bytes is None else slot_bytes


def check_model_dir(model_dir: Path) -> None:
    """Raises UserError unless the directory looks like a model's. Says nothing of its weights."""
    if not model_dir.is_dir():
        raise UserError(f"MODEL_DIR: {model_dir} is not a directory{hint(model_dir)}")
    try:
        content = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"MODEL_DIR: {model_dir} has no config.json: it is not a model directory{hint(model_dir)}"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"MODEL_DIR: {model_dir / 'config.json'} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"MODEL_DIR: {model_dir / 'config.json'} does not hold a JSON object")


def check_checkpoint(model_dir: Path, load_format: str) -> ModelConfig:
    """Raises UserError if the model cannot be served, or if weights are to be loaded and are missing, torn or
    in another format.

    Reads headers only, and none of torch or transformers: `serve` finds out in a moment, before it starts
    processes that would each find out for themselves.
    """
    try:
        model = read_model_config(model_dir)
        if load_format != "dummy":
            check_tensors(model, read_checkpoint_files(model_dir))
    except CheckpointError as error:
        raise UserError(f"MODEL_DIR: {error}") from None
    return model


def device_facts(device: Device, device_index: int, device_memory: int | None) -> DeviceFacts:
    """The device's name and size; `device_memory` overrides the driver, and needs none."""
    if device == "cpu":
        return DeviceFacts("cpu", device_memory or CPU_DEVICE_BYTES)
    try:
        facts = gpu_facts(device_index)
    except NotMeasurable as error:
        if device_memory is None:
            raise UserError(
                f"--device cuda: {error}; give --device-memory to plan for a GPU that is not here"
            ) from None
        return DeviceFacts("cuda", device_memory)
    return DeviceFacts(facts.name, device_memory or facts.total_bytes)


def check_gpu_is_here(device_index: int, device_memory: int | None) -> None:
    """Raises UserError unless the driver shows the GPU, and it is as large as it is said to be."""
    try:
        facts = gpu_facts(device_index)
    except NotMeasurable as error:
        raise UserError(f"--device cuda: {error}; use --device cpu") from None
    if device_memory is not None and device_memory > facts.total_bytes:
        raise UserError(
            f"--device-memory: GPU {device_index} has {facts.total_bytes >> 20} MiB, "
            f"not {device_memory >> 20} MiB"
        )


def worker_config(
    settings: EngineSettings,
    *,
    name: str,
    role: Role,
    listen: str,
    transfers: tuple[str, ...],
    device_index: int = 0,
    tp: int | None = None,
    staging_slots: int = 0,
    staging_slot_bytes: int | None = None,
    slo_itl_ms: float | None = None,
    max_queue: int = 1024,
    prefix_cache: bool = True,
    drain_timeout_s: float = 30.0,
    key_dir: Path | None = None,
) -> WorkerConfig:
    """A worker's configuration, each "auto" replaced by what it means here.

    Raises UserError for options that cannot be combined.
    """
    device = resolve_device(settings.device)
    defaults = DEFAULTS[device]
    config = WorkerConfig(
        name=name,
        role=role,
        model_dir=settings.model_dir,
        listen=listen,
        transfers=transfers,
        device=device,
        device_index=device_index,
        dtype=resolve_dtype(settings.dtype, device),
        kv_dtype=cast(KvDtype, settings.kv_dtype),
        quantization=cast(Quantization, settings.quantization),
        load_format="dummy" if settings.load_format == "dummy" else "auto",
        tp=settings.tp if tp is None else tp,
        mem_fraction=resolve_mem_fraction(settings.mem_fraction, device),
        device_memory_bytes=settings.device_memory or (CPU_DEVICE_BYTES if device == "cpu" else None),
        max_model_len=settings.max_model_len,
        page_size_tokens=settings.page_size or defaults.page_size,
        max_batch=settings.max_batch or defaults.max_batch,
        max_chunk_tokens=settings.max_chunk_tokens or defaults.max_chunk_tokens,
        tail_chunk_tokens=settings.tail_chunk_tokens,
        slo_itl_ms=0.0 if role == "prefill" else _given(slo_itl_ms, defaults.slo_itl_ms),
        max_queue=max_queue,
        prefix_cache=prefix_cache,
        staging_slots=staging_slots,
        staging_slot_bytes=resolve_slot_bytes(staging_slot_bytes, device),
        drain_timeout_s=drain_timeout_s,
        key_dir=key_dir,
    )
    try:
        check_flags(config)
    except PrecisionError as error:
        raise UserError(str(error)) from None
    return config


def checked_plan(config: WorkerConfig, device_memory: int | None) -> MemoryPlan:
    """The plan of one worker, from the checkpoint's configuration and headers.

    Raises UserError where the model directory or a flag cannot be used, or, holding the whole table and the
    smallest change, where it does not fit.
    """
    facts = device_facts(config.device, config.device_index, device_memory)
    model = check_checkpoint(config.model_dir, config.load_format)
    try:
        inputs = plan_input_for(config, model, device_name=facts.name, device_bytes=facts.size_bytes)
        return plan_memory(inputs)
    except ValueError as error:
        raise UserError(str(error)) from None


def check_shared_gpus(configs: list[WorkerConfig], device_memory: int | None) -> None:
    """Workers on one GPU: their budgets, staging buffers and contexts together must fit it.

    Raises UserError, one clear message with the largest mem_fraction that would do.
    """
    by_index: dict[int, list[WorkerConfig]] = {}
    for config in configs:
        if config.device == "cuda":
            for rank in range(config.tp):
                by_index.setdefault(config.device_index + rank, []).append(config)
    for index, sharers in by_index.items():
        if len(sharers) < 2:
            continue
        size_bytes = device_facts("cuda", index, device_memory).size_bytes
        outside_bytes = sum(_outside_bytes(config) for config in sharers)
        inside_bytes = sum(share_of(size_bytes, config.mem_fraction) for config in sharers)
        if inside_bytes + outside_bytes > size_bytes:
            most = int((size_bytes - outside_bytes) / size_bytes / len(sharers) * 100) / 100
            names = ", ".join(config.name for config in sharers)
            advice = f"--mem-fraction {most:g} or less fits" if most > 0 else "use fewer workers or more GPUs"
            raise UserError(
                f"--mem-fraction: {names} share GPU {index} and together take "
                f"{(inside_bytes + outside_bytes) >> 20} MiB of its {size_bytes >> 20} MiB; {advice}"
            )


def _outside_bytes(config: WorkerConfig) -> int:
    outside = contexts(config.device, config.tp)
    worker_bytes = outside.worker_bytes + outside.graphs_bytes
    if not config.transfers:
        return worker_bytes
    slot_bytes = rank_slot_bytes(config.staging_slot_bytes, config.tp)
    return worker_bytes + outside.transfer_bytes + config.staging_slots * slot_bytes
