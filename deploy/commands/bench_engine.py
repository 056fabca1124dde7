"""`baton bench engine`: the engine on this machine, beside the machine's own limits."""

import os
import tempfile
from pathlib import Path
from typing import cast

import typer

from deploy.errors import UserError
from deploy.settings.options import BENCH_GROUPS, BenchEngineSettings
from deploy.settings.planning import (
    CPU_DEVICE_BYTES,
    check_gpu_is_here,
    checked_plan,
    device_facts,
    resolve_dtype,
    resolve_mem_fraction,
)
from services.config import Device, KvDtype, Quantization, WorkerConfig
from services.engine.errors import CheckpointError
from services.engine.models.model_config import read_model_config

CPU_SHRINK = 64
MAX_QUEUE = 1 << 16


def run(settings: BenchEngineSettings) -> None:
    device = cast(Device, settings.device)
    if settings.trace is None and settings.only == ("trace",):
        raise UserError("--only trace: --trace is missing, the name of the file")
    for flag, file in (("--out", settings.out), ("--trace", settings.trace)):
        if file is not None and not (file.parent.is_dir() and os.access(file.parent, os.W_OK)):
            raise UserError(f"{flag}: {file.parent} is not a directory that can be written to")
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as name:
        code = _run(settings, device, Path(name))
    raise typer.Exit(code)


def _run(settings: BenchEngineSettings, device: Device, directory: Path) -> int:
    from deploy.bench.engine.shapes import write_shape
    from deploy.bench.engine.workload import workload

    model_dir = write_shape(settings.model_config, directory)
    if device == "cuda":
        check_gpu_is_here(0, settings.device_memory)
    try:
        model_tokens = read_model_config(model_dir).max_model_len
    except CheckpointError as error:
        raise UserError(f"--model-config: {error}") from None
    shrink = settings.shrink or (1 if device == "cuda" else CPU_SHRINK)
    load = workload(shrink, settings.quick)
    config = WorkerConfig(
        name="bench",
        role="unified",
        model_dir=model_dir,
        listen=f"ipc://{directory}/bench.sock",
        device=device,
        dtype=resolve_dtype(settings.dtype, device),
        kv_dtype=cast(KvDtype, settings.kv_dtype),
        quantization=cast(Quantization, settings.quantization),
        load_format="dummy",
        mem_fraction=resolve_mem_fraction(settings.mem_fraction, device),
        device_memory_bytes=settings.device_memory or (CPU_DEVICE_BYTES if device == "cpu" else None),
        max_model_len=min(load.longest_tokens, model_tokens),
        page_size_tokens=settings.page_size,
        max_batch=settings.max_batch,
        max_chunk_tokens=settings.max_chunk_tokens,
        max_queue=MAX_QUEUE,
        prefix_cache=False,
    )
    checked_plan(config, settings.device_memory)
    facts = device_facts(device, 0, settings.device_memory)

    from deploy.bench.engine.engine import BenchRequest
    from deploy.bench.engine.engine import run as run_bench

    request = BenchRequest(
        config=config,
        worker_flags=_worker_flags(config),
        model_name=settings.model_config,
        workload=load,
        directory=directory,
        only=frozenset(settings.only or BENCH_GROUPS),
        quick=settings.quick,
        settings={
            "quick": settings.quick,
            "shrink": shrink,
            "dtype": config.dtype,
            "kv_dtype": config.kv_dtype,
            "quantization": config.quantization,
            "page_size": config.page_size_tokens,
            "max_batch": config.max_batch,
            "max_chunk_tokens": config.max_chunk_tokens,
            "max_model_len": config.max_model_len,
            "mem_fraction": config.mem_fraction,
            "steps": load.steps,
        },
        device_name=facts.name,
        device_bytes=facts.size_bytes,
        out=settings.out,
        trace=settings.trace,
    )
    return run_bench(request)


def _worker_flags(config: WorkerConfig) -> tuple[str, ...]:
    """The same worker as a process of its own."""
    flags = {
        "--role": config.role,
        "--device": config.device,
        "--dtype": config.dtype,
        "--kv-dtype": config.kv_dtype,
        "--quantization": config.quantization,
        "--load-format": config.load_format,
        "--mem-fraction": str(config.mem_fraction),
        "--max-model-len": str(config.max_model_len),
        "--page-size": str(config.page_size_tokens),
        "--max-batch": str(config.max_batch),
        "--max-chunk-tokens": str(config.max_chunk_tokens),
    }
    if config.device_memory_bytes is not None:
        flags["--device-memory"] = str(config.device_memory_bytes)
    return (str(config.model_dir), *(part for pair in flags.items() for part in pair))
