"""The ledgers of a running system, from the router's `GET /memory`."""

import urllib.error
import urllib.request
from dataclasses import dataclass

import msgspec

from services.protocol.worker_status import Ledger, LedgerEntry

_TIMEOUT_S = 10.0
_MAX_BYTES = 16 << 20


class LedgersUnavailable(Exception):
    """One line: who could not be asked, or did not answer with ledgers."""


@dataclass(frozen=True, slots=True)
class WorkerLedger:
    name: str
    ledger: Ledger


class _LedgerBody(msgspec.Struct, frozen=True):
    """As the router answers: a ledger, and sums that are ours to make."""

    device: str
    device_bytes: int
    mem_fraction: float
    entries: list[LedgerEntry]
    device_id: str = ""
    device_used_bytes: int | None = None


class _WorkerBody(msgspec.Struct, frozen=True):
    name: str
    ledger: _LedgerBody


class _MemoryPage(msgspec.Struct, frozen=True):
    workers: list[_WorkerBody]


def fetch_ledgers(url: str, api_key: str | None) -> list[WorkerLedger]:
    """One ledger for each worker that the router knows. Raises LedgersUnavailable."""
    if not url.startswith(("http://", "https://")):
        raise LedgersUnavailable(f"{url!r} is not an http:// or https:// address")
    address = f"{url.rstrip('/')}/memory"
    request = urllib.request.Request(address)
    if api_key is not None:
        request.add_header("Authorization", f"Bearer {api_key}")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            body = answer.read(_MAX_BYTES)
    except urllib.error.HTTPError as error:
        hint = "; give --api-key" if error.code in (401, 403) else ""
        raise LedgersUnavailable(f"{address} answered {error.code}{hint}") from None
    except (OSError, ValueError) as error:
        raise LedgersUnavailable(f"{address} cannot be reached: {getattr(error, 'reason', error)}") from None
    try:
        workers = msgspec.json.decode(body, type=_MemoryPage).workers
    except msgspec.MsgspecError as error:
        raise LedgersUnavailable(f"{address} did not answer with ledgers: {error}") from None
    return [
        WorkerLedger(
            worker.name,
            Ledger(
                worker.ledger.device,
                worker.ledger.device_bytes,
                worker.ledger.mem_fraction,
                worker.ledger.entries,
                worker.ledger.device_id,
                worker.ledger.device_used_bytes,
            ),
        )
        for worker in workers
    ]
