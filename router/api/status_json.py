"""What the router knows of the whole cluster, as JSON values for `/cluster`, `/memory` and the page."""

import os
from typing import Any

import msgspec

from router.config import RouterConfig
from router.routing.dispatcher import Dispatcher
from router.routing.metrics import Metrics
from services.protocol.client import WorkerClient
from services.protocol.messages import Ledger


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
        status = client.status
        kinds = {name: getattr(status, name) for name in status.__struct_fields__}
        kinds["pages"] = _fields(status.pages)
        kinds["slots"] = _fields(status.slots) if status.slots is not None else None
        kinds["ledger"] = ledger_values(status.ledger)
        kinds["rank_ledgers"] = [ledger_values(ledger) for ledger in status.rank_ledgers]
        kinds.pop("ask_id")
        kinds.pop("worker_epoch")
        values["status"] = kinds
        values["status_age_s"] = round(now_s - client.status_at_s, 3)
    return values


def _fields(struct: msgspec.Struct) -> dict[str, Any]:
    """These structs travel as arrays; a browser wants names."""
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


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
