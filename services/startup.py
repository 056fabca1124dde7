"""From a configuration to a worker that can take work: plan, attach, load, measure, allocate.

1. Read the model's configuration; plan the ledger with estimates; refuse before anything is allocated.
2. Attach the transfer process; its staging buffer is what the ledger really has to count.
3. Load the weights; run one worst-case forward; plan again with what was measured.
4. Allocate the pool in the pages that the plan leaves; on a GPU, record decode steps as CUDA graphs.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import msgspec

from kvtransfer.client import TransferClient
from kvtransfer.net.channel import ChannelKeys
from kvtransfer.watched import Watched
from services.config import WorkerConfig
from services.engine.engine import Engine
from services.engine.models.model_config import ModelConfig, read_model_config
from services.memory.estimate import plan_input_for, transfer_context_bytes
from services.memory.measure import NotMeasurable, gpu_facts, gpu_process_bytes, host_phase, resident_bytes
from services.memory.plan import Measured, MemoryPlan, plan_memory
from services.protocol.worker_status import Ledger
from services.tensor_parallel.leader_engine import LeaderEngine
from services.tensor_parallel.messages import RankMemory
from services.transfer.copies import KvCopier, OwnCopier, RankCopier
from services.transfer.links import TransferRanks
from services.transfer.staging import StagingSlots

log = logging.getLogger(__name__)

DEFAULT_CPU_DEVICE_BYTES = 2 << 30
ATTACH_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """A GPU's memory: what is taken by all processes, and by this one (None: not known)."""

    uuid: str
    used_bytes: int
    process_bytes: int | None


@dataclass(slots=True)
class PreparedWorker:
    """What `prepare` built. `measured` is what each rank knows of its own lines, rank 0 first."""

    config: WorkerConfig
    model: ModelConfig
    engine: Engine
    transfer: TransferRanks | None
    copiers: list[KvCopier]
    """Of each rank, rank 0 first; none without transfer processes."""
    plan: MemoryPlan
    measured: list[Measured]
    devices: Watched[list[DeviceUse]] | None
    """Of each rank, where they are GPUs. To be closed."""


def device_size(config: WorkerConfig) -> tuple[str, int]:
    """The device's name and bytes: what the driver says, or on a CPU what it was given."""
    if config.device == "cpu":
        return "cpu", config.device_memory_bytes or DEFAULT_CPU_DEVICE_BYTES
    facts = gpu_facts(config.device_index)
    return facts.name, config.device_memory_bytes or facts.total_bytes


def prepare(config: WorkerConfig, worker_epoch: int, progress: Callable[[int, int], None]) -> PreparedWorker:
    """Raises CheckpointError, DoesNotFit, StagingError or a transfer error, each with a message for users."""
    context_bytes = resident_bytes()
    model = read_model_config(config.model_dir)
    device_name, device_bytes = device_size(config)
    plan = plan_memory(plan_input_for(config, model, device_name=device_name, device_bytes=device_bytes))

    config = replace(config, max_model_len=plan.inputs.max_model_len)
    engine = Engine(config, model) if config.tp == 1 else LeaderEngine(config, model)
    transfer, copiers = None, []
    if config.transfers:
        transfer = _attach(config, engine, worker_epoch)
        copiers = _copiers(config, engine, transfer)

    started_s = time.monotonic()
    with host_phase() as loading:
        weights_bytes = engine.load(progress)
    log.info("weights: %d bytes in %.1f s", weights_bytes, time.monotonic() - started_s)
    activation_bytes = engine.measure_activations()

    inputs = replace(plan.inputs, weights_bytes=weights_bytes, activation_bytes=activation_bytes)
    if transfer is not None:
        own = transfer.clients[0]
        inputs = replace(
            inputs,
            staging_slots=own.slots,
            staging_slot_bytes=own.slot_bytes,
            transfer_context_bytes=transfer_context_bytes(config.device, own.attached.mover),
        )
    plan = plan_memory(inputs)
    engine.cap_allocator(plan.worker_cap_bytes)
    with host_phase() as pooling:
        pool_bytes = engine.allocate_pool(plan.pages)
    graphs_bytes = engine.capture_graphs()

    on_cpu = config.device == "cpu"
    measured = Measured(
        weights_bytes=loading.held_bytes if on_cpu else weights_bytes,
        kv_pool_bytes=pooling.held_bytes if on_cpu else pool_bytes,
        activation_bytes=activation_bytes,
        graphs_bytes=None if on_cpu else graphs_bytes,
        worker_context_bytes=context_bytes if on_cpu else None,
    )
    others = engine.rank_memory() if isinstance(engine, LeaderEngine) else []
    return PreparedWorker(
        config,
        model,
        engine,
        transfer,
        copiers,
        plan,
        [measured, *(_measured_by(rank) for rank in others)],
        None if on_cpu else Watched(partial(_look_at_devices, config)),
    )


def _measured_by(rank: RankMemory) -> Measured:
    return Measured(
        weights_bytes=rank.weights_bytes,
        kv_pool_bytes=rank.kv_pool_bytes,
        activation_bytes=rank.activation_bytes,
        graphs_bytes=rank.graphs_bytes,
        worker_context_bytes=rank.context_bytes,
    )


def _attach(config: WorkerConfig, engine: Engine, worker_epoch: int) -> TransferRanks:
    keys = None if config.key_dir is None else ChannelKeys.load(config.key_dir)
    return TransferRanks(
        [
            TransferClient(
                endpoint,
                worker_epoch=worker_epoch,
                geometry=engine.geometry,
                keys=keys,
                timeout_s=ATTACH_TIMEOUT_S,
                rank=rank,
                tp=config.tp,
                maps=rank == 0,
            )
            for rank, endpoint in enumerate(config.transfers)
        ]
    )


def _copiers(config: WorkerConfig, engine: Engine, transfer: TransferRanks) -> list[KvCopier]:
    first, *others = transfer.clients
    staging = StagingSlots(first, config.device_index)
    staging.open()
    copiers: list[KvCopier] = [OwnCopier(engine, staging)]
    if isinstance(engine, LeaderEngine):
        for rank, client in enumerate(others, 1):
            copier = RankCopier(engine, rank, client, config.page_size_tokens)
            copier.map_staging()
            copiers.append(copier)
    return copiers


def measure_now(prepared: PreparedWorker) -> list[Measured]:
    """The measured column of each rank as of now: what it knows of its own lines, and what its transfer
    process reports. Only rank 0's context is looked at again; those of the others are from their start."""
    ranks = list(prepared.measured)
    uses = [] if prepared.devices is None else prepared.devices.latest
    if uses and uses[0].process_bytes is not None:
        context_bytes = max(0, uses[0].process_bytes - prepared.engine.allocator_bytes())
        ranks[0] = replace(ranks[0], worker_context_bytes=context_bytes)
    if prepared.transfer is None:
        return ranks
    clients = prepared.transfer.clients
    return [_with_transfer(rank, client, prepared.plan) for rank, client in zip(ranks, clients, strict=True)]


def ledgers_now(prepared: PreparedWorker) -> list[Ledger]:
    """The ledger of each rank, measured now, with what the driver says of its device."""
    ledgers = [prepared.plan.ledger(rank) for rank in measure_now(prepared)]
    uses = [] if prepared.devices is None else prepared.devices.latest
    if not uses:
        return ledgers
    return [
        msgspec.structs.replace(ledger, device_id=use.uuid, device_used_bytes=use.used_bytes)
        for ledger, use in zip(ledgers, uses, strict=True)
    ]


def _look_at_devices(config: WorkerConfig) -> list[DeviceUse]:
    """Of every rank; empty where the driver does not know."""
    try:
        facts = [gpu_facts(config.device_index + rank) for rank in range(config.tp)]
    except NotMeasurable as error:
        log.debug("devices not measured: %s", error)
        return []
    process_bytes = None
    try:
        process_bytes = gpu_process_bytes(config.device_index)
    except NotMeasurable as error:
        log.debug("context not measured: %s", error)
    first, *others = facts
    return [
        DeviceUse(first.uuid, first.used_bytes, process_bytes),
        *(DeviceUse(one.uuid, one.used_bytes, None) for one in others),
    ]


def _with_transfer(measured: Measured, client: TransferClient, plan: MemoryPlan) -> Measured:
    stats = client.last_stats
    if stats is None:
        return measured
    if stats.device_bytes is not None:
        staging_bytes, total_bytes = plan.inputs.staging_bytes, stats.device_bytes
    else:
        staging_bytes, total_bytes = stats.staging_resident_bytes, stats.resident_bytes
    return replace(
        measured, staging_bytes=staging_bytes, transfer_context_bytes=max(0, total_bytes - staging_bytes)
    )
