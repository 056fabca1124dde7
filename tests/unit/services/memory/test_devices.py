"""Workers that share a GPU: one sum for each GPU, every line of every process in it once."""

from services.memory.devices import shared_devices
from services.memory.render import device_table
from services.protocol.worker_status import Ledger, LedgerEntry

GIB = 1 << 30


def ledger(device_id: str, kv_gib: int, measured: bool = True) -> Ledger:
    entries = [
        LedgerEntry("worker", "weights", True, 2 * GIB, 3 * GIB if measured else None),
        LedgerEntry("worker", "kv pool", True, kv_gib * GIB, kv_gib * GIB if measured else None),
        LedgerEntry("transfer", "staging buffer", False, GIB, GIB if measured else None),
    ]
    return Ledger("NVIDIA H200", 140 * GIB, 0.3, entries, device_id, 21 * GIB if device_id else None)


def test_each_gpus_workers_are_added_up() -> None:
    ledgers = [
        ("prefill-0", ledger("GPU-a", 4)),
        ("decode-0", ledger("GPU-b", 5)),
        ("decode-1", ledger("GPU-a", 6, measured=False)),
    ]
    first, second = shared_devices(ledgers)
    assert [one.name for one in first.workers] == ["prefill-0", "decode-1"]
    assert first.planned_bytes == (2 + 4 + 1 + 2 + 6 + 1) * GIB
    assert first.measured_bytes == (3 + 4 + 1 + 2 + 6 + 1) * GIB, "planned, where nobody measured"
    assert (second.device_id, second.planned_bytes, second.used_bytes) == ("GPU-b", 8 * GIB, 21 * GIB)


def test_host_memory_is_nobodys_gpu() -> None:
    assert shared_devices([("prefill-0", ledger("", 4))]) == []


def test_the_table_has_a_line_for_each_worker_their_sum_and_the_drivers_word() -> None:
    (device,) = shared_devices([("prefill-0", ledger("GPU-a", 4)), ("decode-0", ledger("GPU-a", 5))])
    head, _, *rows = device_table(device).splitlines()
    assert head == "NVIDIA H200 GPU-a: 140.0 GiB"
    assert [row.split() for row in rows] == [
        ["prefill-0", "7.00", "GiB", "8.00", "GiB"],
        ["decode-0", "8.00", "GiB", "9.00", "GiB"],
        ["=", "together", "15.00", "GiB", "17.00", "GiB"],
        ["the", "driver", "21.00", "GiB"],
    ]
