"""Specs of the processes that `baton serve` starts: each one's command line. Settings in, values out."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from deploy.errors import UserError
from deploy.launcher.run_directory import WORKERS
from deploy.launcher.supervision import ChildKind, drain_of
from deploy.settings.options import ServeSettings
from deploy.settings.planning import resolve_dtype, resolve_mem_fraction, resolve_slot_bytes, worker_config
from kvtransfer.protocol.layout import rank_slot_bytes
from services.config import Device, WorkerConfig
from services.protocol.messages import Role


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """One process. `arguments` follow `python -m deploy`; `secrets` go by environment, where `ps` does
    not show them."""

    name: str
    kind: ChildKind
    arguments: tuple[str, ...]
    secrets: tuple[tuple[str, str], ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class WorkerSlot:
    """One worker before it is started: role, number within the role, ranks, the first rank's GPU."""

    role: Role
    number: int
    device_index: int
    tp: int = 1

    @property
    def name(self) -> str:
        return f"{self.role}-{self.number}"

    @property
    def device_indices(self) -> list[int]:
        return [self.device_index + rank for rank in range(self.tp)]

    @property
    def transfer_names(self) -> list[str]:
        """The names of its transfer processes, one for each rank."""
        if not self.staged:
            return []
        return [f"{self.name}-transfer", *(f"{self.name}-transfer-{rank}" for rank in range(1, self.tp))]

    @property
    def staged(self) -> bool:
        return self.role != "unified"


def worker_slots(settings: ServeSettings, gpus: int) -> list[WorkerSlot]:
    """The workers that a system starts with. They take GPUs one after the other, as many as they have ranks,
    and begin anew where the rest are too few. Raises UserError if no worker could serve."""
    alone = settings.unified > 0
    prefill = (0 if alone else 1) if settings.prefill is None else settings.prefill
    decode = (0 if alone else 1) if settings.decode is None else settings.decode
    check_counts(prefill, decode, settings.unified)
    wanted: list[tuple[Role, int]] = [
        *(("prefill", number) for number in range(prefill)),
        *(("decode", number) for number in range(decode)),
        *(("unified", number) for number in range(settings.unified)),
    ]
    slots: list[WorkerSlot] = []
    first = 0
    for role, number in wanted:
        tp = ranks_of(settings, role, gpus)
        if first + tp > gpus:
            first = 0
        slots.append(WorkerSlot(role, number, first, tp))
        first += tp if gpus else 0
    return slots


def check_counts(prefill: int, decode: int, unified: int) -> None:
    """Raises UserError if so many workers could not serve."""
    if bool(prefill) != bool(decode):
        missing, present = ("--decode", "prefill") if prefill else ("--prefill", "decode")
        raise UserError(f"{missing}: must be at least 1 when there are {present} workers")
    if prefill + decode + unified == 0:
        raise UserError("--prefill, --decode, --unified: at least one worker is needed")


def ranks_of(settings: ServeSettings, role: Role, gpus: int) -> int:
    """The ranks of one worker of a role. Raises UserError for more than there are `gpus` (0: on a CPU)."""
    given = {"prefill": settings.prefill_tp, "decode": settings.decode_tp, "unified": None}
    tp = given[role] or settings.tp
    if gpus and tp > gpus:
        raise UserError(f"--tp: a {role} worker of {tp} ranks needs {tp} GPUs, and there are {gpus}")
    return tp


def worker_configs(settings: ServeSettings, slots: list[WorkerSlot]) -> list[WorkerConfig]:
    """The configurations that the workers' command lines will give, for checks before anything starts."""
    return [
        worker_config(
            settings,
            name=slot.name,
            role=slot.role,
            listen="ipc:///-",
            transfers=tuple("ipc:///-" for _ in slot.transfer_names),
            device_index=slot.device_index,
            tp=slot.tp,
            staging_slots=settings.staging_slots,
            staging_slot_bytes=settings.staging_slot_bytes,
            slo_itl_ms=settings.slo_itl_ms,
        )
        for slot in slots
    ]


def child_specs(
    settings: ServeSettings, slots: list[WorkerSlot], device: Device, run_dir: Path, port: int
) -> list[ChildSpec]:
    """The specs of every child, in the order of starting. All "auto" values are settled here, once."""
    specs = worker_specs(settings, slots, device, run_dir)
    common = _common(run_dir)
    router = ["router", str(settings.model_dir), "--host", settings.host, "--port", str(port), *common]
    router += ["--workers-file", str(run_dir / WORKERS)]
    router += ["--drain-timeout", _number(drain_of(ChildKind.ROUTER, settings.drain_timeout))]
    router += ["--generation-config", settings.generation_config]
    router += ["--request-timeout", _number(settings.request_timeout)]
    router += ["--max-body-bytes", str(settings.max_body_bytes)]
    router += ["--worker-timeout", _number(settings.worker_timeout)]
    router += ["--max-retries", str(settings.max_retries)]
    router += ["--max-choices", str(settings.max_choices), "--max-running", str(settings.max_running)]
    router += ["--max-prompts", str(settings.max_prompts)]
    router += ["--max-total-choices", str(settings.max_total_choices)]
    router += ["--stall-timeout", _number(settings.stall_timeout)]
    router += ["--upload-timeout", _number(settings.upload_timeout)]
    router += ["--keep-alive-timeout", _number(settings.keep_alive_timeout)]
    router += ["--keyless-probes"] if settings.keyless_probes else []
    for origins in settings.allowed_origins:
        router += ["--allowed-origins", origins]
    for flag, limit in (("--ttft-slo", settings.ttft_slo), ("--max-kv-load", settings.max_kv_load)):
        if limit is not None:
            router += [flag, _number(limit)]
    if settings.api_key_file is not None:
        router += ["--api-key-file", str(settings.api_key_file)]
    if settings.served_model_name is not None:
        router += ["--served-model-name", settings.served_model_name]
    secrets = (("BATON_API_KEY", ",".join(settings.api_key)),) if settings.api_key else ()
    specs.append(ChildSpec("router", ChildKind.ROUTER, tuple(router), secrets))
    return specs


def worker_specs(
    settings: ServeSettings, slots: list[WorkerSlot], device: Device, run_dir: Path
) -> list[ChildSpec]:
    """The specs of these workers' transfer processes, then of the workers."""
    common = _common(run_dir)
    transfers = [
        _transfer(settings, slot, rank, device, run_dir, common)
        for slot in slots
        for rank in range(len(slot.transfer_names))
    ]
    return [*transfers, *(_worker(settings, slot, device, run_dir, common) for slot in slots)]


def worker_endpoints(slots: list[WorkerSlot], run_dir: Path) -> list[str]:
    """The endpoints where routers find these workers."""
    return [_ipc(run_dir, slot.name) for slot in slots]


def _common(run_dir: Path) -> tuple[str, ...]:
    return ("--run-dir", str(run_dir), "--parent-pid", str(os.getpid()))


def _transfer(
    settings: ServeSettings,
    slot: WorkerSlot,
    rank: int,
    device: Device,
    run_dir: Path,
    common: tuple[str, ...],
) -> ChildSpec:
    name = slot.transfer_names[rank]
    peer, staging = name.replace("-transfer", "-peer"), name.replace("-transfer", "-staging")
    arguments = ["transfer", "--name", name, *common]
    arguments += ["--listen", _ipc(run_dir, name), "--peer-listen", _ipc(run_dir, peer)]
    arguments += ["--staging-socket", str(run_dir / staging)]
    arguments += ["--device", device, "--device-index", str(slot.device_indices[rank])]
    arguments += ["--mover", settings.mover]
    arguments += [*_staging(settings, device, slot.tp), _switch("checksum", settings.checksum)]
    arguments += ["--transfer-timeout", _number(settings.transfer_timeout)]
    arguments += ["--peer-timeout", _number(settings.peer_timeout)]
    return ChildSpec(name, ChildKind.TRANSFER, tuple(arguments))


def _worker(
    settings: ServeSettings, slot: WorkerSlot, device: Device, run_dir: Path, common: tuple[str, ...]
) -> ChildSpec:
    arguments = ["worker", str(settings.model_dir), "--role", slot.role, "--name", slot.name, *common]
    arguments += ["--listen", _ipc(run_dir, slot.name)]
    for name in slot.transfer_names:
        arguments += ["--transfer", _ipc(run_dir, name)]
    arguments += ["--device", device, "--device-index", str(slot.device_index)]
    arguments += ["--dtype", resolve_dtype(settings.dtype, device), "--load-format", settings.load_format]
    arguments += ["--kv-dtype", settings.kv_dtype, "--quantization", settings.quantization]
    arguments += ["--mem-fraction", _number(resolve_mem_fraction(settings.mem_fraction, device))]
    if settings.device_memory is not None:
        arguments += ["--device-memory", str(settings.device_memory)]
    arguments += ["--max-model-len", str(settings.max_model_len), "--tp", str(slot.tp)]
    for flag, value in (
        ("--page-size", settings.page_size),
        ("--max-batch", settings.max_batch),
        ("--max-chunk-tokens", settings.max_chunk_tokens),
        ("--slo-itl-ms", settings.slo_itl_ms),
    ):
        if value is not None:
            arguments += [flag, str(value)]
    arguments += ["--tail-chunk-tokens", str(settings.tail_chunk_tokens), *_staging(settings, device)]
    arguments += [_switch("prefix-cache", settings.prefix_cache)]
    arguments += ["--drain-timeout", _number(drain_of(ChildKind.WORKER, settings.drain_timeout))]
    return ChildSpec(slot.name, ChildKind.WORKER, tuple(arguments))


def _staging(settings: ServeSettings, device: Device, tp: int = 1) -> list[str]:
    """The staging flags of one rank: `tp` ranks divide a worker's slots."""
    slot_bytes = rank_slot_bytes(resolve_slot_bytes(settings.staging_slot_bytes, device), tp)
    return ["--staging-slots", str(settings.staging_slots), "--staging-slot-bytes", str(slot_bytes)]


def _switch(name: str, value: bool) -> str:
    return f"--{name}" if value else f"--no-{name}"


def _number(value: float) -> str:
    return f"{value:.6g}"


def _ipc(run_dir: Path, name: str) -> str:
    return f"ipc://{run_dir}/{name}"
