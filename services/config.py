"""What a worker process is told at start, and nothing else: one frozen value, built by the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from services.protocol.messages import Role

Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "bfloat16", "float16"]
KvDtype = Literal["auto", "fp8"]
Quantization = Literal["none", "fp8"]


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """Sizes are in the unit their name ends with; addresses are ZMQ endpoints (`ipc://` or `tcp://`)."""

    name: str
    role: Role
    model_dir: Path
    listen: str
    transfers: tuple[str, ...] = ()
    """The worker endpoint of each rank's transfer process; empty for a unified worker without any."""
    device: Device = "cpu"
    device_index: int = 0
    dtype: Dtype = "float32"
    kv_dtype: KvDtype = "auto"
    """auto: the KV cache is kept in `dtype`; fp8: in e4m3 with a scale for each head."""
    quantization: Quantization = "none"
    """fp8: the decoder's linear layers multiply e4m3 weights with e4m3 activations."""
    load_format: Literal["auto", "dummy"] = "auto"
    tp: int = 1
    """Ranks: processes that divide every layer among them, each on a device of its own."""
    rank: int = 0
    """Which of them this process is; rank 0 leads."""
    mem_fraction: float = 0.85
    device_memory_bytes: int | None = None
    """The size of the device where it is not read from a driver (CPU)."""
    max_model_len: int = 0
    """0: what the checkpoint's configuration says."""
    page_size_tokens: int = 16
    max_batch: int = 64
    """Sequences in one decode step."""
    max_chunk_tokens: int = 512
    """Tokens in one forward pass, prefill and decode together."""
    tail_chunk_tokens: int = 512
    """A long prompt's last chunk, on a prefill worker: its KV is what nothing hides. 0: as it comes."""
    slo_itl_ms: float = 0.0
    """The longest gap between two tokens, to which prompts are cut beside decodes. 0: no limit."""
    max_queue: int = 1024
    """Requests waiting; more are refused as overloaded."""
    prefix_cache: bool = True
    staging_slots: int = 32
    """What the ledger plans for; the transfer process owns the buffer and says what it really is."""
    staging_slot_bytes: int = 8 << 20
    """Of the worker's ranks together: each has a slot of `layout.rank_slot_bytes`."""
    drain_timeout_s: float = 30.0
    key_dir: Path | None = None
    """CURVE keys and the allow-list for `tcp://` addresses."""
