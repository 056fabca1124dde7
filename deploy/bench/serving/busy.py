"""How busy the workers behind an endpoint are: which role limits a load. Only Baton's router knows."""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deploy.bench.load.target import Target

_TIMEOUT_S = 5.0
_ROLES = ("prefill", "decode", "unified")


@dataclass(frozen=True, slots=True)
class WorkerTime:
    """A worker's time since it started, in seconds; `pid` tells one incarnation from the next."""

    role: str
    pid: int
    busy_s: float
    uptime_s: float


def worker_times(target: Target) -> dict[str, WorkerTime]:
    """The workers' times by name. Empty where the endpoint has none: it may be any server."""
    request = urllib.request.Request(f"{target.base}/cluster")
    if target.api_key is not None:
        request.add_header("Authorization", f"Bearer {target.api_key}")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            statuses = [worker["status"] for worker in json.load(answer)["workers"]]
        return {status["name"]: _time_of(status) for status in statuses if status is not None}
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return {}


def _time_of(status: Mapping[str, Any]) -> WorkerTime:
    counters = status["counters"]
    return WorkerTime(status["role"], status["pid"], counters["busy_seconds"], counters["uptime_seconds"])


def busy_shares(before: Mapping[str, WorkerTime], after: Mapping[str, WorkerTime]) -> dict[str, float]:
    """For each role the share of time in which a worker had a step to do, the mean of its workers. Those that
    came, went or were restarted in between do not count."""
    shares: dict[str, list[float]] = {}
    for name, late in after.items():
        early = before.get(name)
        if early is not None and early.pid == late.pid and late.uptime_s > early.uptime_s:
            share = (late.busy_s - early.busy_s) / (late.uptime_s - early.uptime_s)
            shares.setdefault(late.role, []).append(share)
    return {role: sum(shares[role]) / len(shares[role]) for role in _ROLES if role in shares}
