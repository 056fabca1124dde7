"""The memory ledger: what goes on a device, what it is allowed, and what to change when it does not fit.

`mem_fraction` of the device is for weights and KV pool; everything else lies outside that budget and
must fit in the rest. All of it is arithmetic on one frozen value, so the same rules hold for a GPU, for
a CPU with an explicit size, and for `baton plan` on a machine with neither.
"""

from dataclasses import dataclass

from services.memory.change import smallest_changes
from services.memory.inputs import Change, PlanInput, Shortfall, shortfall
from services.memory.render import table
from services.memory.sizes import format_bytes, format_flag
from services.protocol.worker_status import Ledger, LedgerEntry

WEIGHTS = "weights"
KV_POOL = "kv pool"
ACTIVATIONS = "activations"
GRAPHS = "cuda graphs"
WORKER_CONTEXT = "worker context"
STAGING = "staging buffer"
TRANSFER_CONTEXT = "transfer context"


@dataclass(frozen=True, slots=True)
class Measured:
    """What the driver or the kernel says of each line; None where nobody measured."""

    weights_bytes: int | None = None
    kv_pool_bytes: int | None = None
    activation_bytes: int | None = None
    graphs_bytes: int | None = None
    worker_context_bytes: int | None = None
    staging_bytes: int | None = None
    transfer_context_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """A ledger computed from `inputs`; `plan_memory` only returns those that fit."""

    inputs: PlanInput

    @property
    def pages(self) -> int:
        return self.inputs.pages

    @property
    def pool_bytes(self) -> int:
        return self.inputs.pages * self.inputs.page_bytes

    @property
    def pool_tokens(self) -> int:
        return self.inputs.pages * self.inputs.page_size_tokens

    @property
    def worker_cap_bytes(self) -> int:
        """What the worker's own allocator may ever hold: its lines' sum, without its context."""
        return (
            self.inputs.weights_bytes
            + self.pool_bytes
            + self.inputs.activation_bytes
            + self.inputs.graphs_bytes
        )

    @property
    def total_bytes(self) -> int:
        return self.inputs.weights_bytes + self.pool_bytes + self.inputs.outside_bytes

    def entries(self, measured: Measured | None = None) -> list[LedgerEntry]:
        """The lines, in the order of DESIGN's table; those that do not exist here are left out."""
        i, m = self.inputs, measured or Measured()
        pool_note = f"{self.pages} pages of {i.page_size_tokens} tokens: {self.pool_tokens} tokens"
        forward_note = f"one forward of {i.max_chunk_tokens} tokens, {i.max_batch} sequences"
        staging_note = f"{i.staging_slots} slots of {format_flag(i.staging_slot_bytes)}"
        lines = [
            LedgerEntry("worker", WEIGHTS, True, i.weights_bytes, m.weights_bytes),
            LedgerEntry("worker", KV_POOL, True, self.pool_bytes, m.kv_pool_bytes, pool_note),
            LedgerEntry("worker", ACTIVATIONS, False, i.activation_bytes, m.activation_bytes, forward_note),
        ]
        if i.graphs_bytes or m.graphs_bytes:
            lines.append(LedgerEntry("worker", GRAPHS, False, i.graphs_bytes, m.graphs_bytes))
        lines.append(
            LedgerEntry("worker", WORKER_CONTEXT, False, i.worker_context_bytes, m.worker_context_bytes)
        )
        if i.staging_slots:
            lines.append(
                LedgerEntry("transfer", STAGING, False, i.staging_bytes, m.staging_bytes, staging_note)
            )
            lines.append(
                LedgerEntry(
                    "transfer", TRANSFER_CONTEXT, False, i.transfer_context_bytes, m.transfer_context_bytes
                )
            )
        return lines

    def ledger(self, measured: Measured | None = None) -> Ledger:
        i = self.inputs
        return Ledger(i.device, i.device_bytes, i.mem_fraction, self.entries(measured))


class DoesNotFit(ValueError):
    """The whole table, the line that does not fit, and the smallest changes that make it fit, best first."""

    def __init__(self, inputs: PlanInput, why: Shortfall, changes: tuple[Change, ...]) -> None:
        self.inputs = inputs
        self.shortfall = why
        self.line, reason = _explain(inputs, why)
        self.changes = changes
        if changes:
            advice = f"smallest change that fits: {changes[0]}"
            if len(changes) > 1:
                advice += f" (or {', or '.join(str(change) for change in changes[1:])})"
        else:
            advice = "no single change of a flag makes it fit: the model needs a larger device"
        self.summary = f"does not fit: {self.line}: {reason}; {advice}"
        super().__init__(f"{self.summary}\n{table(MemoryPlan(inputs).ledger())}")


def plan_memory(inputs: PlanInput) -> MemoryPlan:
    """The plan for `inputs`. Raises DoesNotFit, before anything is allocated, if there is none."""
    why = shortfall(inputs)
    if why is not None:
        raise DoesNotFit(inputs, why, smallest_changes(inputs))
    return MemoryPlan(inputs)


def _explain(inputs: PlanInput, why: Shortfall) -> tuple[str, str]:
    budget = format_bytes(inputs.budget_bytes)
    share = f"mem_fraction {inputs.mem_fraction:g} of {format_bytes(inputs.device_bytes)} is {budget}"
    if why is Shortfall.WEIGHTS:
        return WEIGHTS, f"{format_bytes(inputs.weights_bytes)} of weights; {share}"
    if why is Shortfall.POOL:
        need = format_bytes(inputs.sequence_pages * inputs.page_bytes)
        return KV_POOL, (
            f"one sequence of {inputs.max_model_len} tokens needs {inputs.sequence_pages} pages ({need}), "
            f"there is room for {inputs.pages}; {share}"
        )
    rest = inputs.device_bytes - inputs.budget_bytes
    outside = [line for line in MemoryPlan(inputs).entries() if not line.inside]
    largest = max(outside, key=lambda line: line.planned_bytes)
    return largest.name, (
        f"the lines outside the budget need {format_bytes(inputs.outside_bytes)}, "
        f"{format_bytes(rest)} is left; {share}"
    )
