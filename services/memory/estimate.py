"""What a ledger's lines will be before anything runs, from the model's configuration and the device's kind.

Weights and pages are exact. Activations, graphs and contexts are formulas; the worker measures them at
start and the ledger shows both.
"""

from dataclasses import dataclass

from kvtransfer.movers.registry import mover_context_bytes
from kvtransfer.protocol.layout import rank_slot_bytes
from services.config import Device, Dtype, WorkerConfig
from services.engine.models.model_config import ModelConfig, dtype_bytes
from services.engine.models.sharding import check_tp, rank_parameter_bytes, rank_shape
from services.engine.precision import check_precision
from services.memory.inputs import PlanInput

_MIB = 1 << 20
_CPU_ATTENTION_COPIES = 2
"""Scores and their softmax, which the torch reference holds whole and in float32."""


@dataclass(frozen=True, slots=True)
class Contexts:
    """What processes take of a device by being there, outside every other line."""

    worker_bytes: int
    transfer_bytes: int
    graphs_bytes: int


def contexts(device: Device, tp: int = 1) -> Contexts:
    """CPU: the resident size of an interpreter with torch and transformers, and of one with NIXL. CUDA: a
    context after the first torch kernel with cuBLAS workspaces and compiled kernels, a bare driver context
    (527 and 639 MiB were measured on H200), and the shared graph pool. NCCL of a rank adds its buffers
    and kernels (1722 MiB in all were measured with two ranks on two H200)."""
    if device == "cuda":
        worker_bytes = (896 if tp == 1 else 896 + 832) * _MIB
        return Contexts(worker_bytes, transfer_bytes=544 * _MIB, graphs_bytes=512 * _MIB)
    return Contexts(worker_bytes=320 * _MIB, transfer_bytes=96 * _MIB, graphs_bytes=0)


def transfer_context_bytes(device: Device, mover: str) -> int:
    """What the transfer process takes besides its buffer: a context, and what its mover's library adds."""
    return contexts(device).transfer_bytes + mover_context_bytes(mover)


def estimate_activation_bytes(
    model: ModelConfig,
    dtype: Dtype,
    max_chunk_tokens: int,
    max_batch: int,
    device: Device = "cuda",
    tp: int = 1,
) -> int:
    """The peak of one forward of `max_chunk_tokens` tokens that samples for `max_batch` sequences, on one of
    `tp` ranks.

    The widest moment of a layer is the feed-forward (residual, its input, and what the family says) or
    attention (residual, input, q, k, v, output), of which one at a time is alive; the logits follow in
    float32 with two copies for sorting and probabilities. On a CPU the plain attention also holds a chunk's
    scores against itself.
    """
    feed_forward_width = 2 * model.hidden_size + model.family.feed_forward_width(model.published, tp)
    attention_width = 2 * model.hidden_size + model.head_dim * 2 * (model.heads + model.kv_heads) // tp
    forward_bytes = max_chunk_tokens * max(feed_forward_width, attention_width) * dtype_bytes(dtype)
    scores_bytes = 0
    if device == "cpu":
        scores_bytes = _CPU_ATTENTION_COPIES * (model.heads // tp) * max_chunk_tokens * max_chunk_tokens * 4
    logits_bytes = 3 * max_batch * model.vocab_size * 4
    return forward_bytes + scores_bytes + logits_bytes + 8 * _MIB


def plan_input_for(
    config: WorkerConfig,
    model: ModelConfig,
    *,
    device_name: str,
    device_bytes: int,
) -> PlanInput:
    """The ledger's input for one rank of a worker, before it has allocated anything: all ranks are alike.

    `max_model_len` 0 takes the checkpoint's own; more than that raises ValueError, as do precision options
    that cannot be combined, and a `tp` that does not divide the model.
    """
    check_tp(model, config.tp)
    shape = rank_shape(model, config.tp)
    check_precision(config, model)
    if config.max_model_len > model.max_model_len:
        raise ValueError(
            f"--max-model-len: {config.max_model_len} exceeds the model's own limit of "
            f"{model.max_model_len} tokens"
        )
    outside = contexts(config.device, config.tp)
    staged = bool(config.transfers)
    return PlanInput(
        device=device_name,
        device_bytes=device_bytes,
        mem_fraction=config.mem_fraction,
        weights_bytes=rank_parameter_bytes(model, config.tp, config.dtype, config.quantization),
        page_bytes=config.page_size_tokens * shape.kv_token_bytes(config.dtype, config.kv_dtype),
        page_size_tokens=config.page_size_tokens,
        max_model_len=config.max_model_len or model.max_model_len,
        max_chunk_tokens=config.max_chunk_tokens,
        max_batch=config.max_batch,
        activation_bytes=estimate_activation_bytes(
            model, config.dtype, config.max_chunk_tokens, config.max_batch, config.device, config.tp
        ),
        worker_context_bytes=outside.worker_bytes,
        graphs_bytes=outside.graphs_bytes if model.family.captures_graphs else 0,
        staging_slots=config.staging_slots if staged else 0,
        staging_slot_bytes=rank_slot_bytes(config.staging_slot_bytes, config.tp) if staged else 0,
        transfer_context_bytes=outside.transfer_bytes if staged else 0,
    )
