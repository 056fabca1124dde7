"""The bodies of `/cluster`, which the page shows, and of `/memory`, as JSON values."""

import os
from collections.abc import Iterable
from typing import Any

import msgspec

from router.config import RouterConfig
from router.routing.dispatcher import Dispatcher
from router.routing.metrics import Metrics
from services.protocol.client import WorkerClient
from services.protocol.worker_status import STATUS_FIELDS, FieldEntry, Ledger, Status


def ledger_values(ledger: Ledger) -> dict[str, Any]:
    """A worker's memory ledger with its sums; `measured` sums are None while a line is not measured."""
    inside = [entry for entry in ledger.entries if entry.inside]
    outside = [entry for entry in ledger.entries if not entry.inside]
    values: dict[str, Any] = msgspec.to_builtins(ledger)
    values["budget_bytes"] = ledger.budget_bytes
    values["sums"] = {
        name: {
            "planned_bytes": sum(entry.planned_bytes for entry in entries),
            "measured_bytes": sum(entry.measured_bytes or 0 for entry in entries)
            if all(entry.measured_bytes is not None for entry in entries)
            else None,
        }
        for name, entries in (("inside", inside), ("outside", outside))
    }
    return values


def _worker_values(client: WorkerClient, dispatcher: Dispatcher, now_s: float) -> dict[str, Any]:
    worker_load = dispatcher.worker_load(client.endpoint)
    values: dict[str, Any] = {
        "endpoint": client.endpoint,
        "leaving": client.endpoint in dispatcher.worker_pool.leaving,
        "connection": client.state.value,
        "message": client.message,
        "hello": None,
        "status": None,
        "status_age_s": None,
        "router_view": {
            "queued_tokens": worker_load.queued_tokens,
            "live_tokens": worker_load.live_tokens,
            "live_requests": worker_load.live_requests,
        },
        "dropped_frames": dict(client.dropped),
    }
    if client.hello is not None:
        hello = client.hello
        values["hello"] = {
            "name": hello.name,
            "role": hello.role,
            "version": hello.version,
            "max_model_len": hello.max_model_len,
            "max_sequence_tokens": hello.max_sequence_tokens,
            "page_size_tokens": hello.page_size_tokens,
            "pages": hello.pages,
        }
    if client.status is not None:
        values["status"] = status_values(client.status)
        values["status_age_s"] = round(now_s - client.status_at_s, 3)
    return values


def status_values(status: Status) -> dict[str, Any]:
    """Every field of the table of status fields, by its name."""
    return {field.name: _value(getattr(status, field.name)) for field in STATUS_FIELDS}


def _value(value: Any) -> Any:
    """A field's value, with names where the wire has arrays."""
    if isinstance(value, Ledger):
        return ledger_values(value)
    if isinstance(value, msgspec.Struct):
        return {name: getattr(value, name) for name in value.__struct_fields__}
    return [_value(one) for one in value] if isinstance(value, list) else value


def table_values(fields: Iterable[FieldEntry]) -> list[dict[str, Any]]:
    """The table of status fields itself; the page shows those that have a label, `{}` being the value."""
    return [
        {
            "name": field.name,
            "help": field.about.help,
            "unit": field.about.unit,
            "label": field.about.page,
            "absent": field.about.absent,
            "metrics": [metric.family.name for metric in field.about.metrics],
            "parts": table_values(field.parts),
        }
        for field in fields
    ]


_TABLE = msgspec.Raw(msgspec.json.encode(table_values(STATUS_FIELDS)))


def cluster_values(
    config: RouterConfig, dispatcher: Dispatcher, metrics: Metrics, now_s: float
) -> dict[str, Any]:
    """The body of `/cluster`."""
    snapshot = dispatcher.snapshot()
    return {
        "model": config.served_model_name,
        "ready": dispatcher.can_take_work,
        "router": {
            "pid": os.getpid(),
            "state": "draining" if dispatcher.draining else "ready",
            "live_requests": dispatcher.live,
            "queued": snapshot.queued,
            "running": snapshot.running,
            "phases": {phase.value: count for phase, count in dispatcher.count_phases().items()},
            "output_tokens_per_s": snapshot.output_tokens_per_s,
            "outcomes": dict(metrics.outcomes),
            "started_s": metrics.started_s,
        },
        "last_request": {name: getattr(metrics.last, name) for name in metrics.last.__slots__}
        if metrics.last is not None
        else None,
        "status_fields": _TABLE,
        "workers": [_worker_values(client, dispatcher, now_s) for client in dispatcher.clients.values()],
    }


def memory_values(dispatcher: Dispatcher) -> dict[str, Any]:
    """The body of `/memory`: the ledger of every worker that has reported one, and of each of its ranks."""
    return {
        "workers": [
            {
                "name": client.status.name if rank == 0 else f"{client.status.name} rank {rank}",
                "role": client.status.role,
                "pid": client.status.pid,
                "transfer_pid": client.status.transfer_pid,
                "ledger": ledger_values(ledger),
            }
            for client in dispatcher.clients.values()
            if client.status is not None
            for rank, ledger in enumerate([client.status.ledger, *client.status.rank_ledgers])
        ]
    }
