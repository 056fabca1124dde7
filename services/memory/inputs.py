"""What a ledger is computed from, the three rules it must keep, and changes to it."""

from dataclasses import dataclass, replace
from enum import Enum

from services.memory.sizes import format_flag
from services.protocol.worker_status import share_of


@dataclass(frozen=True, slots=True)
class PlanInput:
    """Everything the ledger depends on. A page is `page_size_tokens` tokens over all layers.

    `staging_slots` 0 means no transfer process. Raises ValueError, naming the field, on a senseless value.
    """

    device: str
    device_bytes: int
    mem_fraction: float
    weights_bytes: int
    page_bytes: int
    page_size_tokens: int
    max_model_len: int
    max_chunk_tokens: int
    max_batch: int
    activation_bytes: int
    worker_context_bytes: int
    graphs_bytes: int = 0
    staging_slots: int = 0
    staging_slot_bytes: int = 0
    transfer_context_bytes: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.mem_fraction < 1:
            raise ValueError(f"mem_fraction is {self.mem_fraction}; it must lie between 0 and 1")
        for name in ("device_bytes", "page_bytes", "page_size_tokens", "max_model_len", "max_chunk_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in (
            "weights_bytes",
            "activation_bytes",
            "worker_context_bytes",
            "graphs_bytes",
            "staging_slots",
            "staging_slot_bytes",
            "transfer_context_bytes",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")

    @property
    def budget_bytes(self) -> int:
        return share_of(self.device_bytes, self.mem_fraction)

    @property
    def staging_bytes(self) -> int:
        return self.staging_slots * self.staging_slot_bytes

    @property
    def pages(self) -> int:
        return max(0, self.budget_bytes - self.weights_bytes) // self.page_bytes

    @property
    def sequence_pages(self) -> int:
        """Pages of one sequence of `max_model_len` tokens: less than this and it could never finish."""
        return -(-self.max_model_len // self.page_size_tokens)

    @property
    def inside_need_bytes(self) -> int:
        return self.weights_bytes + self.sequence_pages * self.page_bytes

    @property
    def outside_bytes(self) -> int:
        return (
            self.activation_bytes
            + self.graphs_bytes
            + self.worker_context_bytes
            + self.staging_bytes
            + self.transfer_context_bytes
        )


class Shortfall(Enum):
    """Which of the three rules an input breaks."""

    WEIGHTS = "the weights exceed the budget"
    POOL = "the KV pool cannot hold one sequence of max_model_len tokens"
    OUTSIDE = "the lines outside the budget do not fit in the rest of the device"


def shortfall(inputs: PlanInput) -> Shortfall | None:
    """The first rule that `inputs` breaks, or None if it fits."""
    if inputs.weights_bytes > inputs.budget_bytes:
        return Shortfall.WEIGHTS
    if inputs.pages < inputs.sequence_pages:
        return Shortfall.POOL
    if inputs.outside_bytes > inputs.device_bytes - inputs.budget_bytes:
        return Shortfall.OUTSIDE
    return None


@dataclass(frozen=True, slots=True)
class Change:
    """New values for some flags; None leaves a flag as it is."""

    mem_fraction: float | None = None
    max_model_len: int | None = None
    staging_slots: int | None = None
    device_bytes: int | None = None

    def applied(self, inputs: PlanInput) -> PlanInput:
        return replace(
            inputs,
            mem_fraction=inputs.mem_fraction if self.mem_fraction is None else self.mem_fraction,
            max_model_len=inputs.max_model_len if self.max_model_len is None else self.max_model_len,
            staging_slots=inputs.staging_slots if self.staging_slots is None else self.staging_slots,
            device_bytes=inputs.device_bytes if self.device_bytes is None else self.device_bytes,
        )

    def __str__(self) -> str:
        flags = []
        if self.mem_fraction is not None:
            flags.append(f"--mem-fraction {self.mem_fraction:g}")
        if self.max_model_len is not None:
            flags.append(f"--max-model-len {self.max_model_len}")
        if self.staging_slots is not None:
            flags.append(f"--staging-slots {self.staging_slots}")
        if self.device_bytes is not None:
            flags.append(f"--device-memory {format_flag(self.device_bytes)}")
        return " ".join(flags)
