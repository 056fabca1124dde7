"""What a router and a worker say to each other.

The router asks (`Request`), the worker reports (`ConnectionReport`, `RequestReport`). A frame carries a list,
so that a step of a worker costs one message for each router, however many tokens it made. Token ids are
bounded by the worker against its vocabulary; everything that has a fixed bound has it here.

A request is named by `request_id`, an integer the router draws at random: what a client calls its
request is a label and stays in the router.
"""

from importlib.metadata import version
from typing import Annotated, Literal

from msgspec import Meta, Struct

from kvtransfer.messages import SpanList
from kvtransfer.messages import TraceSpan as TraceSpan
from kvtransfer.messages import TransferAddress as RankAddress
from services.protocol.worker_status import Role as Role
from services.protocol.worker_status import Status

VERSION = version("baton")
"""Routers and workers of different versions refuse each other: there is one wire format at a time."""
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20

Epoch = Annotated[int, Meta(ge=1, le=2**63 - 1)]
RequestId = Annotated[int, Meta(ge=1, le=2**63 - 1)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Meta(min_length=1, max_length=1 << 24)]
ChoiceIndex = Annotated[int, Meta(ge=0, lt=MAX_CHOICES)]
FinishReason = Literal["stop", "length"]
FailureCode = Literal[
    "invalid", "too_long", "overloaded", "deadline", "transfer", "draining", "internal", "invalid_logits"
]
Probability = Annotated[float, Meta(ge=0, le=1)]


class WorkerTransferAddress(RankAddress, frozen=True, forbid_unknown_fields=True):
    """Where a worker's transfer processes are reached: that of rank 0, then those of its other ranks."""

    others: Annotated[tuple[RankAddress, ...], Meta(max_length=1023)] = ()

    @property
    def ranks(self) -> list[RankAddress]:
        return [RankAddress(self.endpoint, self.epoch), *self.others]


class Sampling(Struct, frozen=True, forbid_unknown_fields=True):
    """How tokens are sampled. The router fills in every field; `seed` is always set.

    `logprobs` is None (off) or how many alternatives come with each token (0: the token's own only).
    `prompt_logprobs` likewise for the prompt's tokens, which then skip the prefix cache.
    """

    max_tokens: Annotated[int, Meta(ge=1, lt=2**31)]
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    temperature: Annotated[float, Meta(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0, lt=2**31)] = 0
    min_p: Probability = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-100, le=100)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-100, le=100)] = 0.0
    logit_bias: Annotated[dict[TokenId, float], Meta(max_length=1024)] = {}
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    ignore_eos: bool = False
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=128)] = []


class SequenceRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """One prompt and its `choices` continuations, whole and alike for every worker that touches it.

    The continuations are numbered from `first_choice` on, in reports as in the key of their draws. The last
    `output_tokens` of `prompt` were generated before, by another worker: they count against `max_tokens`, and
    penalties take them for output. `salt` separates tenants' prefix caches. `deadline_s` is counted from
    receipt.
    """

    request_id: RequestId
    prompt: TokenIds
    sampling: Sampling
    choices: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] = 1
    salt: Annotated[bytes, Meta(max_length=64)] = b""
    deadline_s: Annotated[float, Meta(gt=0, le=86400)] = 600.0
    first_choice: ChoiceIndex = 0
    output_tokens: Annotated[int, Meta(ge=0, lt=1 << 24)] = 0

    @property
    def choice_numbers(self) -> range:
        return range(self.first_choice, self.first_choice + self.choices)


# ---------------------------------------------------------------- router -> worker


class RouterHello(Struct, frozen=True, tag="hello", forbid_unknown_fields=True):
    """First message on a connection; answered with `WorkerHello`, or `Refusal` if versions differ."""

    version: Annotated[str, Meta(max_length=64)]
    router_epoch: Epoch


class Generate(Struct, frozen=True, tag="generate", forbid_unknown_fields=True):
    """Unified worker: run the prompt and decode it."""

    work: SequenceRequest


class Prefill(Struct, frozen=True, tag="prefill", forbid_unknown_fields=True):
    """Prefill worker: run the prompt, sample each choice's first token, push the KV under `transfer_id`
    to the decode worker that is told of it by `ReserveKv`."""

    work: SequenceRequest
    transfer_id: RequestId


class ReserveKv(Struct, frozen=True, tag="reserve", forbid_unknown_fields=True):
    """Decode worker: hold pages for this prompt and have `source` push its KV."""

    work: SequenceRequest
    transfer_id: RequestId
    source: WorkerTransferAddress


class RepushKv(Struct, frozen=True, tag="push_again", forbid_unknown_fields=True):
    """Prefill worker: the KV of this request goes to another decode worker, under a new `transfer_id`; the
    former transfer is given up. Answered with `Failed` if nothing of the request is here any more."""

    request_id: RequestId
    transfer_id: RequestId


class FirstToken(Struct, frozen=True, array_like=True):
    choice: ChoiceIndex
    token: TokenId


class StartDecode(Struct, frozen=True, tag="join", forbid_unknown_fields=True):
    """Decode worker: these choices of a reserved request go on after the token the prefill worker drew.
    Choices not named have already ended."""

    request_id: RequestId
    first_tokens: Annotated[list[FirstToken], Meta(min_length=1, max_length=MAX_CHOICES)]


class Cancel(Struct, frozen=True, tag="cancel", forbid_unknown_fields=True):
    """End a request, or one choice of it. No report follows; unknown ids are ignored."""

    request_id: RequestId
    choice: ChoiceIndex | None = None


class StatusRequest(Struct, frozen=True, tag="status_request", forbid_unknown_fields=True):
    """Answered with `Status` at once. Also the router's heartbeat."""

    ask_id: Annotated[int, Meta(ge=0, le=2**63 - 1)]


class TraceRequest(Struct, frozen=True, tag="trace_request", forbid_unknown_fields=True):
    """What is remembered of a transfer? Answered with one `TraceReply` of the worker at once, and with one of
    its transfer process when that has answered."""

    ask_id: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    request_id: RequestId
    transfer_id: RequestId


Request = (
    RouterHello
    | Generate
    | Prefill
    | RepushKv
    | ReserveKv
    | StartDecode
    | Cancel
    | StatusRequest
    | TraceRequest
)


# ---------------------------------------------------------------- worker -> router


class WorkerHello(Struct, frozen=True, array_like=True, tag="worker_hello"):
    """Who a worker is, for as long as `worker_epoch` lasts.

    `max_sequence_tokens` is what its pool could ever hold for one sequence, and at most `max_model_len`.
    """

    version: str
    name: str
    role: Role
    worker_epoch: Epoch
    model_digest: str
    vocab_size: int
    max_model_len: int
    max_sequence_tokens: int
    page_size_tokens: int
    pages: int
    transfer: WorkerTransferAddress | None


class Refusal(Struct, frozen=True, array_like=True, tag="refusal"):
    """The connection is refused: nothing else will be answered."""

    message: str


class TopLogprob(Struct, frozen=True, array_like=True):
    token: int
    logprob: float


class TokenLogprob(Struct, frozen=True, array_like=True):
    """The token's own log probability and, best first, those of the asked-for alternatives."""

    logprob: float
    top: list[TopLogprob]


class Tokens(Struct, frozen=True, array_like=True, tag="t"):
    """New tokens of one choice. `finish` is set on the last one, exactly once for each choice that the
    worker ends itself (end token, stop token id, length)."""

    request_id: int
    choice: int
    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish: FinishReason | None = None


class PrefillDone(Struct, frozen=True, array_like=True, tag="p"):
    """Comes with a request's first tokens, just before them in the same frame.

    `prompt_logprobs[i]` belongs to prompt token i + 1 (the first token has none).
    """

    request_id: int
    queue_s: float
    prefill_s: float
    cached_tokens: int
    prompt_logprobs: list[TokenLogprob] | None = None


class DecodeStarted(Struct, frozen=True, array_like=True, tag="d"):
    """A decode worker has the whole KV and the first tokens.

    `transfer_s` runs from the first segment's arrival to the last one's unpacking;
    `tail_s` is how long the request waited for it after its first token was known.
    """

    request_id: int
    transfer_s: float
    tail_s: float
    transferred_tokens: int
    cached_tokens: int


class KvTransferFailed(Struct, frozen=True, array_like=True, tag="u"):
    """A prefill worker could not hand over a request's KV. It goes on with the prompt and holds what is
    computed, until `RepushKv`, `Cancel` or the request's deadline."""

    request_id: int
    transfer_id: int
    message: str


class KvLeaseExpiring(Struct, frozen=True, array_like=True, tag="h"):
    """A prefill worker still holds a request's KV, long after its first tokens. The lease is renewed by
    silence; a router that has no use for the KV any more answers `Cancel`."""

    request_id: int


class Failed(Struct, frozen=True, array_like=True, tag="f"):
    """The request has ended here with an error; nothing more will come for it.

    `retryable` says that nothing is wrong with the request itself.
    """

    request_id: int
    code: FailureCode
    message: str
    retryable: bool


class TraceReply(Struct, frozen=True, array_like=True, tag="trace"):
    """What `process` did for a request's transfer. `clock_s` is the worker's clock when it answered; its
    transfer process has the same one."""

    request_id: int
    ask_id: int
    process: str
    clock_s: float
    spans: SpanList


ConnectionReport = WorkerHello | Refusal | Status
"""What concerns the connection: the router's client (client.py) takes it in."""
RequestReport = (
    Tokens | PrefillDone | DecodeStarted | KvTransferFailed | KvLeaseExpiring | Failed | TraceReply
)
"""What concerns one request, whose `request_id` it names: the client hands it on."""
Report = ConnectionReport | RequestReport
"""What a frame from a worker may hold."""
