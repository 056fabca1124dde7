"""Messages between the leading rank of a worker and its other ranks, over a socket pair.

The leader sends a `RankCommand` for each call of its own engine, in the same order; a rank sends an `Answer`
only to a command that has one. Steps have none: the ranks meet in the step's sums.
"""

from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from services.config import WorkerConfig


class StartRank(Struct, frozen=True, tag="start", forbid_unknown_fields=True):
    """First of all. `config` is the rank's `WorkerConfig` in JSON, `store` the file where ranks meet."""

    config: bytes
    store: str


class LoadWeights(Struct, frozen=True, tag="load", forbid_unknown_fields=True):
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
    """An engine's `Row`, with its page table by number and only the number of its samples: rank 0 samples."""

    tokens: list[int]
    start: int
    table: int
    samples: int
    targets: list[int]
    sampled_by: int


class Step(Struct, frozen=True, tag="step", forbid_unknown_fields=True):
    grown: list[Grown]
    rows: list[StepRow]


class CopyPages(Struct, frozen=True, tag="copy", forbid_unknown_fields=True):
    pairs: list[tuple[int, int]]


class MapStaging(Struct, frozen=True, tag="map", forbid_unknown_fields=True):
    """The staging buffer of the rank's transfer process, in its present incarnation: as a UNIX socket that
    hands it out, or as a CUDA IPC handle; with neither there is none. A former one is unmapped."""

    slots: Annotated[int, Meta(ge=0, lt=2**20)]
    slot_bytes: Annotated[int, Meta(ge=0, lt=2**40)]
    staging_socket: str | None
    cuda_ipc_handle: bytes | None


class CopyRun(Struct, frozen=True, array_like=True):
    """Tokens and their slot. `pages` cover the tokens exactly; `first_offset` is the first one's place in
    them. The heads are counted within the rank."""

    pages: list[int]
    first_offset: int
    token_count: int
    slot: int
    first_head: int
    end_head: int


class CopyKv(Struct, frozen=True, tag="move", forbid_unknown_fields=True):
    """Pack runs into their slots, or unpack them, after the steps up to number `after_step`; answered with
    `Copied` once it is done, in the order of commands."""

    is_pack: bool
    after_step: Annotated[int, Meta(ge=0)]
    runs: list[CopyRun]
    with_checksums: bool


class FenceSteps(Struct, frozen=True, tag="hold", forbid_unknown_fields=True):
    """Steps queued from now on wait for the packs and unpacks so far: their pages are given away."""


class ReportMemory(Struct, frozen=True, tag="report", forbid_unknown_fields=True):
    """Answered with `RankMemory`."""


class StopRank(Struct, frozen=True, tag="stop", forbid_unknown_fields=True):
    """The rank leaves its loop."""


RankCommand = (
    StartRank
    | LoadWeights
    | MeasureActivations
    | AllocatePool
    | CaptureGraphs
    | Step
    | CopyPages
    | MapStaging
    | CopyKv
    | FenceSteps
    | ReportMemory
    | StopRank
)


class Done(Struct, frozen=True, tag="done", forbid_unknown_fields=True):
    """The answer to a command that has one: a number of bytes."""

    byte_count: int


class Copied(Struct, frozen=True, tag="moved", forbid_unknown_fields=True):
    """A `CopyKv` is done; with the checksum of each run's bytes if they were asked for."""

    checksums: list[int] | None


class RankMemory(Struct, frozen=True, tag="memory", forbid_unknown_fields=True):
    """What the rank measured of its own lines of the ledger; None where the driver does not know."""

    weights_bytes: int
    kv_pool_bytes: int
    activation_bytes: int
    graphs_bytes: int | None
    context_bytes: int | None


class RankFailed(Struct, frozen=True, tag="failed", forbid_unknown_fields=True):
    """The rank ends, with this message."""

    message: str


Answer = Done | Copied | RankMemory | RankFailed


def encode_config(config: WorkerConfig) -> bytes:
    """A worker's configuration on its way to another rank."""
    return msgspec.json.encode(config, enc_hook=str)


def decode_config(data: bytes) -> WorkerConfig:
    """Raises msgspec.MsgspecError for anything but what `encode_config` made."""
    return msgspec.json.decode(data, type=WorkerConfig, dec_hook=_decode_path)


def _decode_path(kind: type, value: Any) -> Any:
    if kind is Path:
        return Path(value)
    raise ValueError(f"{kind} is no part of a configuration")
