"""The messages between a worker and its own transfer process.

The worker sends commands (`Command`), the transfer process sends events (`Event`). One frame carries a list
of them, so that a step of the worker costs one message however many slots it touched. Fields are bounded
here where a fixed bound exists. The receiver of a message checks the bounds that depend on the configuration
(slot numbers, token ranges).

Vocabulary: a *transfer* is one request's KV in one attempt; a *segment* is a run of its tokens, over
all layers, that fits one slot; a *slot* is one region of the staging buffer; a *generation* is one use
of one slot; an *epoch* names one incarnation of one process: from its start to its end.
"""

from importlib.metadata import version
from typing import Annotated, Literal

from msgspec import Meta, Struct

VERSION = version("baton")
"""A worker and a transfer process of different versions do not attach: there is one wire format at a time."""
MAX_SEGMENTS_PER_MESSAGE = 4096
MAX_SPANS = 4096
"""Of one transfer in one process."""
WITHDRAWN = "withdrawn"
"""The reason of an abort that is no failure: the request needs no KV any more, and its router notifies both
workers. The abort may overtake the router's message."""

Epoch = Annotated[int, Meta(ge=1, le=2**63 - 1)]
TransferId = Annotated[int, Meta(ge=1, le=2**63 - 1)]
SlotIndex = Annotated[int, Meta(ge=0, lt=2**20)]
Generation = Annotated[int, Meta(ge=1, le=2**63 - 1)]
TokenIndex = Annotated[int, Meta(ge=0, lt=2**31)]
ByteCount = Annotated[int, Meta(ge=0, lt=2**40)]
Checksum = Annotated[int, Meta(ge=0, le=2**63 - 1)]
HeadCount = Annotated[int, Meta(ge=0, le=4096)]
RankIndex = Annotated[int, Meta(ge=0, lt=1024)]
RankCount = Annotated[int, Meta(ge=1, le=1024)]
Address = Annotated[str, Meta(min_length=1, max_length=512)]
Reason = Annotated[str, Meta(max_length=1024)]


class KvGeometry(Struct, frozen=True, forbid_unknown_fields=True):
    """The shape of one token's KV as it is transferred. Two sides must agree on all of it.

    `model_digest` identifies configuration and checkpoint; page size and page layout are deliberately
    absent: each side keeps its own. The scales of fp8 are absent too: both sides derive them from the
    checkpoint that the digest identifies.
    """

    model_digest: Annotated[str, Meta(min_length=1, max_length=128)]
    layers: Annotated[int, Meta(ge=1, le=1024)]
    kv_heads: Annotated[int, Meta(ge=1, le=4096)]
    head_dim: Annotated[int, Meta(ge=1, le=4096)]
    dtype: Literal["float32", "bfloat16", "float16", "float8_e4m3fn"]

    @property
    def itemsize_bytes(self) -> int:
        return {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}[self.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values over all layers."""
        return self.kv_heads * self.layers * 2 * self.head_dim * self.itemsize_bytes


class TransferAddress(Struct, frozen=True, forbid_unknown_fields=True):
    """Where peers reach a transfer process, and which incarnation of it."""

    endpoint: Address
    epoch: Epoch


class SlotUse(Struct, frozen=True, array_like=True):
    """One use of one slot. Only this pair, never the slot number alone, permits a write."""

    slot: SlotIndex
    generation: Generation


class Segment(Struct, frozen=True, array_like=True):
    """Tokens `[start_token, start_token + token_count)` of a transfer, lying in one slot.

    `checksum` is that of the slot's first `byte_count` bytes, or None where checksums are off.
    """

    slot: SlotIndex
    generation: Generation
    start_token: TokenIndex
    token_count: Annotated[int, Meta(ge=1, lt=2**31)]
    byte_count: Annotated[int, Meta(ge=1, lt=2**40)]
    checksum: Checksum | None = None


Stage = Literal["compute", "pack", "send", "arrive", "unpack", "commit"]


class TraceSpan(Struct, frozen=True, array_like=True):
    """One stage of tokens `[start_token, start_token + token_count)` of a transfer, from `start_s` to `end_s`
    of the monotonic clock of the process that did it. The two are equal where a stage is a mere moment."""

    stage: Stage
    start_token: TokenIndex
    token_count: TokenIndex
    start_s: float
    end_s: float


SpanList = Annotated[list[TraceSpan], Meta(max_length=MAX_SPANS)]
Segments = Annotated[list[Segment], Meta(max_length=MAX_SEGMENTS_PER_MESSAGE)]
SlotUses = Annotated[list[SlotUse], Meta(max_length=MAX_SEGMENTS_PER_MESSAGE)]


# ---------------------------------------------------------------- worker -> transfer process


class AttachWorker(Struct, frozen=True, tag="attach", forbid_unknown_fields=True):
    """The first message of a worker. It sends it again whenever the transfer process answers `NotAttached`.

    A new `worker_epoch` ends every transfer of the worker's former incarnation. `geometry` is that of the
    whole model; this process serves rank `rank` of the worker's `tp`, which has its share of the heads.
    """

    worker_epoch: Epoch
    geometry: KvGeometry
    version: Annotated[str, Meta(max_length=64)] = "unknown"
    """The worker's version. A transfer process of another version refuses the worker."""
    rank: RankIndex = 0
    tp: RankCount = 1


class OpenReceive(Struct, frozen=True, tag="open_receive", forbid_unknown_fields=True):
    """The worker has reserved pages for tokens `[start_token, end_token)`: `source` is to push them.

    An empty range is legal (everything was in the prefix cache): it only confirms the reservation.
    `kv_heads` is how many heads of the rank travel; 0: all.
    """

    transfer_id: TransferId
    source: TransferAddress
    start_token: TokenIndex
    end_token: TokenIndex
    deadline_s: Annotated[float, Meta(gt=0, le=86400)]
    kv_heads: HeadCount = 0


class OpenSend(Struct, frozen=True, tag="open_send", forbid_unknown_fields=True):
    """The worker has queued a request whose KV will go out under `transfer_id`, to the worker that the router
    has given the same id."""

    transfer_id: TransferId
    deadline_s: Annotated[float, Meta(gt=0, le=86400)]


class SendReady(Struct, frozen=True, tag="send_ready", forbid_unknown_fields=True):
    """The prompt has its pages: its tokens will be computed whatever becomes of other requests. No slot is
    assigned for it before, since a request that waits for pages may wait for one that waits for that slot."""

    transfer_id: TransferId


class Filled(Struct, frozen=True, tag="filled", forbid_unknown_fields=True):
    """The worker has packed these segments into send slots that `SendSlots` had assigned to it. The transfer
    process writes each into a slot that the destination has granted (`SendGranted`)."""

    transfer_id: TransferId
    segments: Segments


class Freed(Struct, frozen=True, tag="freed", forbid_unknown_fields=True):
    """The worker has unpacked (or, after `Aborted`, dropped) these receive slots, or gives back assigned send
    slots that it has no use for."""

    slots: SlotUses


class Commit(Struct, frozen=True, tag="commit", forbid_unknown_fields=True):
    """Every token of the transfer is in the worker's pages: the source may free its KV."""

    transfer_id: TransferId


class Abort(Struct, frozen=True, tag="abort", forbid_unknown_fields=True):
    """The worker gives the transfer up, on either side. Idempotent; unknown ids are only counted."""

    transfer_id: TransferId
    reason: Reason


class Ping(Struct, frozen=True, tag="ping", forbid_unknown_fields=True):
    """The worker sends it when the link has been quiet. The answer is `Stats` or `NotAttached`."""

    worker_epoch: Epoch


class AskSpans(Struct, frozen=True, tag="ask_spans", forbid_unknown_fields=True):
    """The worker asks for the recorded spans of a transfer. The answer is `TransferSpans`, at once."""

    transfer_id: TransferId


Command = (
    AttachWorker | OpenReceive | OpenSend | SendReady | Filled | Freed | Commit | Abort | Ping | AskSpans
)


# ---------------------------------------------------------------- transfer process -> worker


class Attached(Struct, frozen=True, tag="attached", forbid_unknown_fields=True):
    """The worker is attached: this is the staging buffer that the two now share.

    Host memory comes as a file descriptor over the UNIX socket `staging_socket` (see staging.py);
    device memory as a CUDA IPC handle.
    """

    address: TransferAddress
    mover: Annotated[str, Meta(max_length=32)]
    slots: Annotated[int, Meta(ge=1, lt=2**20)]
    slot_bytes: Annotated[int, Meta(ge=1, lt=2**40)]
    checksum: bool
    staging_socket: Address | None = None
    cuda_ipc_handle: Annotated[bytes, Meta(max_length=256)] | None = None
    cuda_device: Annotated[int, Meta(ge=0, lt=1024)] | None = None


class AttachRefused(Struct, frozen=True, tag="refused", forbid_unknown_fields=True):
    """The worker cannot be attached: another one is, or a token does not fit a slot."""

    reason: Reason


class NotAttached(Struct, frozen=True, tag="not_attached", forbid_unknown_fields=True):
    """This process does not know the worker, since it was restarted. All earlier transfers are gone."""

    epoch: Epoch


class SendConfirmed(Struct, frozen=True, tag="send_confirmed", forbid_unknown_fields=True):
    """The destination, a rank of `tp`, has pages; it lacks tokens `[start_token, end_token)` of `kv_heads`
    heads. A segment of them has at most `segment_tokens`, which fit a slot on both sides."""

    transfer_id: TransferId
    start_token: TokenIndex
    end_token: TokenIndex
    kv_heads: HeadCount
    segment_tokens: Annotated[int, Meta(ge=1, lt=2**31)]
    tp: RankCount


class SendGranted(Struct, frozen=True, tag="send_granted", forbid_unknown_fields=True):
    """The destination has room for so many more segments of the transfer."""

    transfer_id: TransferId
    segments: Annotated[int, Meta(ge=1, le=MAX_SEGMENTS_PER_MESSAGE)]


class SendSlots(Struct, frozen=True, tag="send_slots", forbid_unknown_fields=True):
    """Send slots assigned to the worker: no more than there are grants of prompts that have pages. Each is
    for whatever transfer has grants and computed tokens when the worker packs."""

    slots: SlotUses


class Arrived(Struct, frozen=True, tag="arrived", forbid_unknown_fields=True):
    """Segments that lie in receive slots, checked for epoch, transfer, generation, range and length."""

    transfer_id: TransferId
    segments: Segments


class SendCommitted(Struct, frozen=True, tag="send_committed", forbid_unknown_fields=True):
    """The destination has everything: the worker may free the KV."""

    transfer_id: TransferId


class Aborted(Struct, frozen=True, tag="aborted", forbid_unknown_fields=True):
    """The transfer has ended without a commit, on either side; its slots need no further reply.

    Receive slots already reported by `Arrived` and not yet freed must still be `Freed`.
    """

    transfer_id: TransferId
    reason: Reason


class SlotCounts(Struct, frozen=True, array_like=True):
    """`free + granted + filled + quarantined == slots`, always."""

    free: int
    granted: int
    filled: int
    quarantined: int


class Stats(Struct, frozen=True, tag="stats", forbid_unknown_fields=True):
    """Statistics of the transfer process, sent about once a second and in answer to `Ping`."""

    epoch: Epoch
    pid: Annotated[int, Meta(ge=0, lt=2**31)]
    counts: SlotCounts
    open_sends: int
    open_receives: int
    peers: int
    moved_bytes: int
    moved_segments: int
    move_seconds: float
    oldest_grant_age_s: float
    dropped: dict[str, int]
    resident_bytes: int
    staging_resident_bytes: int
    device_bytes: int | None = None


class TransferSpans(Struct, frozen=True, tag="spans", forbid_unknown_fields=True):
    """What the transfer process did for a transfer, and when. Empty for one that it has forgotten."""

    transfer_id: TransferId
    spans: SpanList


Event = (
    Attached
    | AttachRefused
    | NotAttached
    | SendConfirmed
    | SendGranted
    | SendSlots
    | Arrived
    | SendCommitted
    | Aborted
    | Stats
    | TransferSpans
)
