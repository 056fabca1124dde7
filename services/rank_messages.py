"""What the leading rank of a worker and its other ranks say to each other, over a socket pair.

The leader orders (`Order`), in the order in which it calls its own engine; a rank answers (`Answer`) only
what has an answer. Steps have none: the ranks meet in the step's sums.
"""

from typing import Annotated

from msgspec import Meta, Struct

Rank = Annotated[int, Meta(ge=1, lt=1024)]


class StartRank(Struct, frozen=True, tag="start", forbid_unknown_fields=True):
    """First of all. `config` is the rank's `WorkerConfig` in JSON, `store` the file where ranks meet."""

    config: bytes
    store: str


class Load(Struct, frozen=True, tag="load", forbid_unknown_fields=True):
    """Answered with the weights' bytes."""


class MeasureActivations(Struct, frozen=True, tag="measure", forbid_unknown_fields=True):
    """Answered with the peak's bytes."""


class AllocatePool(Struct, frozen=True, tag="pool", forbid_unknown_fields=True):
    """Answered with the pool's bytes. The rank caps its allocator at `limit_bytes` first."""

    pages: Annotated[int, Meta(ge=1)]
    limit_bytes: int


class CaptureGraphs(Struct, frozen=True, tag="graphs", forbid_unknown_fields=True):
    """Answered with the graphs' bytes."""


class Grown(Struct, frozen=True, array_like=True):
    """Page table number `table` goes on with `pages` from its page number `start`; at 0 it is a new one."""

    table: Annotated[int, Meta(ge=0)]
    start: Annotated[int, Meta(ge=0)]
    pages: list[int]


class StepRow(Struct, frozen=True, array_like=True):
    """An engine's `Row`, with its page table by number and only the number of its draws: rank 0 draws."""

    tokens: list[int]
    start: int
    table: int
    draws: int
    targets: list[int]
    drawn_by: int


class Step(Struct, frozen=True, tag="step", forbid_unknown_fields=True):
    grown: list[Grown]
    rows: list[StepRow]


class CopyPages(Struct, frozen=True, tag="copy", forbid_unknown_fields=True):
    pairs: list[tuple[int, int]]


class StopRank(Struct, frozen=True, tag="stop", forbid_unknown_fields=True):
    """The rank leaves its loop."""


Order = StartRank | Load | MeasureActivations | AllocatePool | CaptureGraphs | Step | CopyPages | StopRank


class Done(Struct, frozen=True, tag="done", forbid_unknown_fields=True):
    """The answer of an order that has one: a number of bytes."""

    byte_count: int


class RankFailed(Struct, frozen=True, tag="failed", forbid_unknown_fields=True):
    """The rank ends, with this message."""

    message: str


Answer = Done | RankFailed
