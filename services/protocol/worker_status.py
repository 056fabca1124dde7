"""A worker's status: the one table of its fields, which the wire, `/cluster`, `/metrics` and the page read.

A field of `Status` is one entry of the table: its name and type on the wire, what it says, its unit, the
Prometheus samples that are made of it, and its label on the page. A new field needs its entry, and the line
in the worker that measures it. Fields without a `StatusField` belong to the connection and are not shown.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal, get_args, get_type_hints

from msgspec import Struct

Role = Literal["prefill", "decode", "unified"]
Sample = tuple[tuple[str, ...], float]
"""The values of a family's own labels, and the number."""

# ---------------------------------------------------------------- what an entry consists of


class MetricFamily(Struct, frozen=True):
    """A Prometheus family. Each of its samples has the labels `worker` and `role` before its own."""

    name: str
    kind: Literal["gauge", "counter"]
    help: str
    labels: tuple[str, ...] = ()

    def of(self, *labels: str) -> "Metric":
        """The field's value is one sample, with these labels."""
        return Metric(self, lambda value: [(labels, float(value))])

    def each(self, samples: Callable[[Any], Iterable[Sample]]) -> "Metric":
        """The field's value is as many samples as `samples` makes of it."""
        return Metric(self, samples)


class Metric(Struct, frozen=True):
    """The samples of one family that a field's value is."""

    family: MetricFamily
    samples: Callable[[Any], Iterable[Sample]]


class StatusField(Struct, frozen=True):
    """What is known of a field besides its name and type. `page` is its label, with the value in place of
    `{}`; None keeps it off the page. `absent` stands there instead while the value is None."""

    help: str
    metrics: tuple[Metric, ...] = ()
    unit: str = ""
    page: str | None = None
    absent: str = ""


class FieldEntry(Struct, frozen=True):
    """A row of the table; `parts` are the rows of a field that is a struct of counts."""

    name: str
    about: StatusField
    parts: "tuple[FieldEntry, ...]"


def _field(
    help: str, *metrics: Metric, unit: str = "", page: str | None = None, absent: str = ""
) -> StatusField:
    return StatusField(help, metrics, unit, page, absent)


# ---------------------------------------------------------------- the memory ledger


class LedgerEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """One line of the memory ledger. `inside` says whether it counts against `mem_fraction`."""

    process: str
    name: str
    inside: bool
    planned_bytes: int
    measured_bytes: int | None
    note: str = ""


def share_of(size_bytes: int, fraction: float) -> int:
    """Whole bytes, exactly: a product with a float may round up to one too many."""
    share, of = fraction.as_integer_ratio()
    return size_bytes * share // of


class Ledger(Struct, frozen=True, forbid_unknown_fields=True):
    """The memory ledger of one device. `device_id` tells one GPU from all others; workers whose ledgers have
    the same one share it. Empty for host memory. `device_used_bytes` is what the driver says is taken of it,
    by whomever."""

    device: str
    device_bytes: int
    mem_fraction: float
    entries: list[LedgerEntry]
    device_id: str = ""
    device_used_bytes: int | None = None

    @property
    def budget_bytes(self) -> int:
        return share_of(self.device_bytes, self.mem_fraction)


# ---------------------------------------------------------------- the families

PAGES = MetricFamily("baton_worker_pages", "gauge", "KV pages by state", ("state",))
SLOTS = MetricFamily("baton_worker_slots", "gauge", "Staging slots by state", ("state",))
REQUESTS = MetricFamily("baton_worker_requests", "gauge", "Requests by state", ("state",))
TRANSFERS = MetricFamily("baton_worker_open_transfers", "gauge", "Transfers in progress", ("side",))
TOKEN_RATE = MetricFamily("baton_worker_tokens_per_second", "gauge", "Tokens a second", ("kind",))
MEMORY = MetricFamily(
    "baton_worker_memory_bytes", "gauge", "Memory ledger", ("process", "entry", "inside", "kind")
)
UTILISATION = MetricFamily("baton_worker_kv_utilisation", "gauge", "Share of the KV pages in use")
EVENTS = MetricFamily("baton_worker_events", "counter", "A worker's counters", ("event",))
NONFINITE = MetricFamily("baton_nonfinite_logits", "counter", "Requests ended by NaN or infinite logits")
STEP_SECONDS = MetricFamily(
    "baton_worker_step_seconds", "counter", "Time of the measured steps, and as it was predicted", ("kind",)
)
MEASURED_STEPS = MetricFamily("baton_worker_measured_steps", "counter", "Steps whose time was measured")
STEP_COST = MetricFamily(
    "baton_worker_step_cost",
    "gauge",
    "Coefficients of the prediction, by name and unit",
    ("term",),
)


def _utilisation(pages: "PageUsage") -> list[Sample]:
    return [((), pages.used / max(1, pages.total))]


def _events(counters: dict[str, float]) -> list[Sample]:
    return [((event,), value) for event, value in counters.items()]


def _terms(costs: dict[str, float]) -> list[Sample]:
    return [((term,), value) for term, value in costs.items()]


def _nonfinite(counters: dict[str, float]) -> list[Sample]:
    return [((), counters.get("requests_failed_invalid_logits", 0.0))]


def _memory(ledger: Ledger, suffix: str = "") -> Iterator[Sample]:
    for entry in ledger.entries:
        labels = (f"{entry.process}{suffix}", entry.name, str(entry.inside).lower())
        yield (*labels, "planned"), entry.planned_bytes
        if entry.measured_bytes is not None:
            yield (*labels, "measured"), entry.measured_bytes


def _rank_memory(ledgers: list[Ledger]) -> Iterator[Sample]:
    for rank, ledger in enumerate(ledgers, 1):
        yield from _memory(ledger, f"-{rank}")


# ---------------------------------------------------------------- the table


class PageUsage(Struct, frozen=True, array_like=True):
    """The KV pages of a pool: `free + cached + used == total`."""

    total: Annotated[int, _field("pages of the pool")]
    free: Annotated[int, _field("pages that hold nothing", PAGES.of("free"), page="free")]
    cached: Annotated[
        int, _field("pages of reusable prefixes, and of no request", PAGES.of("cached"), page="cached")
    ]
    used: Annotated[int, _field("pages of requests", PAGES.of("used"), page="used")]


class Slots(Struct, frozen=True, array_like=True):
    """The slots of the staging buffers, by state."""

    total: Annotated[int, _field("slots of the staging buffers")]
    free: Annotated[int, _field("slots of no transfer", SLOTS.of("free"), page="free")]
    granted: Annotated[int, _field("slots a sender may write", SLOTS.of("granted"), page="granted")]
    filled: Annotated[int, _field("slots with KV to be unpacked", SLOTS.of("filled"), page="filled")]
    quarantined: Annotated[
        int,
        _field("slots a late write may still hit", SLOTS.of("quarantined"), page="quarantined"),
    ]


class Status(Struct, frozen=True, array_like=True, tag="status"):
    """A worker's status, sent about once a second and in answer to `StatusRequest`.

    Slots and open transfers are the transfer process's own account, `slots_age_s` old; with several ranks,
    those of all together. `counters` only grow, except `oldest_grant_age_s`.
    """

    ask_id: int | None
    worker_epoch: int
    name: Annotated[str, _field("the worker's name")]
    role: Annotated[Role, _field("what the worker does of a request")]
    state: Annotated[Literal["ready", "draining", "no_transfer"], _field("whether the worker takes work")]
    pid: Annotated[int, _field("the worker process", page="worker pid {}")]
    transfer_pid: Annotated[
        int | None,
        _field("its transfer process", page="transfer pid {}", absent="no transfer process"),
    ]
    queued: Annotated[
        int, _field("waiting for their first step", REQUESTS.of("queued"), unit="requests", page="{} queued")
    ]
    running: Annotated[
        int, _field("in steps of the engine", REQUESTS.of("running"), unit="requests", page="{} running")
    ]
    reserved: Annotated[
        int,
        _field(
            "with pages reserved, waiting for KV",
            REQUESTS.of("reserved"),
            unit="requests",
            page="{} reserved",
        ),
    ]
    holding: Annotated[
        int,
        _field(
            "whose KV is kept for a decode worker", REQUESTS.of("holding"), unit="requests", page="{} holding"
        ),
    ]
    pages: Annotated[
        PageUsage, _field("the KV pages", UTILISATION.each(_utilisation), unit="pages", page="KV pages ({})")
    ]
    slots: Annotated[Slots | None, _field("the staging slots", unit="slots", page="Staging slots ({})")]
    slots_age_s: Annotated[float, _field("age of slots and open transfers", unit="s")]
    open_sends: Annotated[
        int, _field("KV on its way out", TRANSFERS.of("send"), unit="transfers", page="{} sends")
    ]
    open_receives: Annotated[
        int, _field("KV on its way in", TRANSFERS.of("receive"), unit="transfers", page="{} receives")
    ]
    prompt_tokens_per_s: Annotated[
        float,
        _field("prompt tokens", TOKEN_RATE.of("prompt"), unit="tokens/s", page="{} prompt tokens/s"),
    ]
    output_tokens_per_s: Annotated[
        float,
        _field("output tokens", TOKEN_RATE.of("output"), unit="tokens/s", page="{} output tokens/s"),
    ]
    counters: Annotated[
        dict[str, float],
        _field(
            "sums since the start: tokens, requests by outcome, prefix-cache queries and hits, "
            "transfer bytes, dropped messages by reason",
            EVENTS.each(_events),
            NONFINITE.each(_nonfinite),
        ),
    ]
    ledger: Annotated[
        Ledger, _field("memory of rank 0's device", MEMORY.each(_memory), unit="bytes", page="Memory {}")
    ]
    mover: Annotated[
        str | None,
        _field("what moves KV; None while no transfer process is attached", page="mover {}"),
    ] = None
    rank_ledgers: Annotated[
        list[Ledger], _field("memory of the other ranks' devices", MEMORY.each(_rank_memory), unit="bytes")
    ] = []
    measured_steps: Annotated[
        int | None,
        _field(
            "steps whose time was measured, of a worker that decodes",
            MEASURED_STEPS.of(),
            unit="steps",
            page="{} steps measured",
        ),
    ] = None
    measured_steps_s: Annotated[
        float | None,
        _field("time of these steps", STEP_SECONDS.of("measured"), unit="s", page="that took {} s"),
    ] = None
    predicted_steps_s: Annotated[
        float | None,
        _field(
            "their time as it was predicted", STEP_SECONDS.of("predicted"), unit="s", page="{} s predicted"
        ),
    ] = None
    step_costs: Annotated[
        dict[str, float] | None,
        _field("coefficients of the prediction, see docs/decisions.md", STEP_COST.each(_terms)),
    ] = None


def _entries(struct: type[Struct]) -> Iterator[FieldEntry]:
    hints = get_type_hints(struct)
    for name, annotated in get_type_hints(struct, include_extras=True).items():
        for about in getattr(annotated, "__metadata__", ()):
            if isinstance(about, StatusField):
                inner = (one for one in (hints[name], *get_args(hints[name])) if isinstance(one, type))
                parts = (part for one in inner if issubclass(one, Struct) for part in _entries(one))
                yield FieldEntry(name, about, tuple(parts))


def _families(fields: Iterable[FieldEntry]) -> Iterator[MetricFamily]:
    for field in fields:
        yield from (metric.family for metric in field.about.metrics)
        yield from _families(field.parts)


STATUS_FIELDS = tuple(_entries(Status))
"""The table, in the order of the wire."""
METRIC_FAMILIES = tuple(dict.fromkeys(_families(STATUS_FIELDS)))
"""Every family that has samples of a worker's status."""


def status_samples(
    struct: Struct, fields: Iterable[FieldEntry] = STATUS_FIELDS
) -> Iterator[tuple[MetricFamily, Sample]]:
    """The samples of a status, field by field; a field that is None has none."""
    for field in fields:
        value = getattr(struct, field.name)
        if value is None:
            continue
        for metric in field.about.metrics:
            yield from ((metric.family, sample) for sample in metric.samples(value))
        yield from status_samples(value, field.parts)
