"""The table and the bar."""

from services.memory.render import picture, table
from services.protocol.worker_status import Ledger, LedgerEntry

GIB = 1 << 30
LEDGER = Ledger(
    "cpu",
    10 * GIB,
    0.5,
    [
        LedgerEntry("worker", "weights", True, 2 * GIB, 3 * GIB),
        LedgerEntry("worker", "kv pool", True, 3 * GIB, None, "12 pages"),
        LedgerEntry("transfer", "staging buffer", False, 1 * GIB, 1 * GIB),
    ],
)


def rows() -> dict[str, list[str]]:
    return {" ".join(line.split()[:2]): line.split() for line in table(LEDGER).splitlines()[2:]}


def test_table_has_planned_measured_and_difference() -> None:
    text = table(LEDGER)
    assert text.splitlines()[0] == "cpu: 10.00 GiB, mem_fraction 0.5 (budget 5.00 GiB)"
    assert text.splitlines()[1].split() == ["process", "line", "planned", "measured", "difference", "note"]
    assert rows()["worker weights"][2:] == ["2.00", "GiB", "3.00", "GiB", "1.00", "GiB"]
    assert rows()["worker kv"][3:] == ["3.00", "GiB", "-", "-", "12", "pages"]


def test_sums_stand_against_their_limits() -> None:
    assert rows()["= inside"][2:] == ["5.00", "GiB", "-", "-", "of", "5.00", "GiB"]
    outside = ["1.00", "GiB", "1.00", "GiB", "0", "B", "of", "5.00", "GiB"]
    assert rows()["= outside"][2:] == outside


def test_a_sum_over_its_limit_is_called_out() -> None:
    full = Ledger("cpu", GIB, 0.5, LEDGER.entries)
    assert "DOES NOT FIT in 512.0 MiB" in table(full)


def test_bar_is_to_scale() -> None:
    border, bar, *legend = picture(LEDGER, width=50).splitlines()
    assert bar == "A" * 15 + "B" * 15 + "C" * 5 + "." * 15
    assert border.index("|") == 25
    text = " ".join(legend)
    assert "A weights 3.00 GiB" in text
    assert "B kv pool 3.00 GiB" in text
    assert ". free 3.00 GiB" in text


def test_a_bar_in_colour_says_the_same() -> None:
    assert "\x1b[" in picture(LEDGER, width=50, colour=True)
    assert "\x1b[" not in picture(LEDGER, width=50)
