"""What a cluster that does not come to rest says of itself, for a reader who has only the run's output."""

import json
from collections.abc import Iterable
from typing import Any

import httpx

from tests.chaos.system import System
from tests.patience import patient

TAIL_LINES = 25
COUNTS = ("queued", "running", "reserved", "holding", "open_sends", "open_receives")


def evidence(cluster: System) -> list[str]:
    """The router's and each restless worker's record, and the ends of their logs. Never raises for a
    cluster that does not answer: then it is about everybody."""
    log = cluster.log_lines()
    try:
        with httpx.Client(base_url=cluster.url, timeout=patient(5)) as http:
            values = http.get("/cluster").json()
    except (httpx.HTTPError, ValueError) as error:
        return [f"/cluster does not answer: {error!r}", *log[-2 * TAIL_LINES :]]
    lines = [f"router: {json.dumps(values['router'])}"]
    names = []
    for worker in values["workers"]:
        if restless(worker):
            lines.append(f"worker: {json.dumps(record(worker))}")
            if worker["hello"] is not None:
                names.append(worker["hello"]["name"])
    for name in [*names, "router"]:
        lines += [f"log of {name}:", *tail(log, name)]
    return lines


def restless(worker: dict[str, Any]) -> bool:
    """Whether a worker's entry in `/cluster` shows something that is not given back, or no worker."""
    status = worker["status"]
    if worker["connection"] != "ready" or status is None or any(worker["router_view"].values()):
        return True
    slots = status["slots"]
    taken = slots is not None and slots["free"] != slots["total"]
    return bool(any(status[name] for name in COUNTS) or status["pages"]["used"] or taken)


def record(worker: dict[str, Any]) -> dict[str, Any]:
    """An entry of `/cluster` without the ledgers, which say nothing about rest."""
    status = worker["status"]
    kept = None if status is None else {name: one for name, one in status.items() if "ledger" not in name}
    return {**worker, "status": kept}


def tail(log: Iterable[str], name: str) -> list[str]:
    """The last lines about a worker and its transfer process: theirs, and the launcher's about them."""
    family = (name, f"{name}-transfer")
    starts = tuple(f"[{one}]" for one in family) + tuple(f"{one} " for one in family)
    return [line for line in log if line.startswith(starts)][-TAIL_LINES:]
