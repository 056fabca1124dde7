"""How long streams waited for KV after their first token: from the histogram that Baton's router keeps."""

import http.client
import urllib.error
import urllib.request
from dataclasses import dataclass

from msgspec import Struct
from prometheus_client.parser import text_string_to_metric_families

from deploy.bench.load.target import Target

METRIC = "baton_request_exposed_transfer_time_seconds"
_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Buckets:
    """`counts[i]` hand-overs took at most `bounds_s[i]`, those of the smaller bounds included; the last bound
    is infinite."""

    bounds_s: list[float]
    counts: list[float]

    def since(self, before: "Buckets") -> "Buckets":
        """The counts that came after `before`, of the same router; all, if it is of another one."""
        if before.bounds_s != self.bounds_s or before.counts[-1] > self.counts[-1]:
            return self
        counts = [late - early for late, early in zip(self.counts, before.counts, strict=True)]
        return Buckets(self.bounds_s, counts)

    def quantile_s(self, share: float) -> float:
        """Interpolated within its bucket, as Prometheus does; of the last, open one its lower bound."""
        wanted = share * self.counts[-1]
        lower_s = below = 0.0
        for bound_s, count in zip(self.bounds_s[:-1], self.counts[:-1], strict=True):
            if count >= wanted:
                return lower_s + (bound_s - lower_s) * (wanted - below) / max(count - below, 1e-9)
            lower_s, below = bound_s, count
        return lower_s


class Exposed(Struct, frozen=True):
    """Times of every request that was handed over while a rate was measured, warm-up included."""

    count: int
    p50: float
    p99: float


def exposed_buckets(target: Target) -> Buckets | None:
    """The histogram as it is now. None where the endpoint has none: it may be any server."""
    request = urllib.request.Request(f"{target.base}/metrics")
    if target.api_key is not None:
        request.add_header("Authorization", f"Bearer {target.api_key}")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
    except (OSError, http.client.HTTPException, ValueError):
        return None
    found = [
        (float(sample.labels["le"]), sample.value)
        for family in families
        for sample in family.samples
        if sample.name == f"{METRIC}_bucket"
    ]
    return Buckets([bound for bound, _ in found], [count for _, count in found]) if found else None


def exposed_ms(before: Buckets | None, after: Buckets | None) -> Exposed | None:
    """Quantiles between two looks. None if nothing was handed over, or a look found no histogram."""
    if after is None:
        return None
    found = after if before is None else after.since(before)
    count = int(found.counts[-1])
    if not count:
        return None
    return Exposed(count, found.quantile_s(0.5) * 1e3, found.quantile_s(0.99) * 1e3)
