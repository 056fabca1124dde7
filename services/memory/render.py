"""The ledger as text: a table for reading, a bar to look at; for a plan and for a running system alike."""

from io import StringIO

from services.memory.devices import SharedDevice
from services.memory.sizes import format_bytes
from services.protocol.worker_status import Ledger, LedgerEntry

_HEAD = ("process", "line", "planned", "measured", "difference", "note")
_COLOURS = ("blue", "green", "yellow", "magenta", "cyan", "red", "bright_blue", "bright_green")


def table(ledger: Ledger) -> str:
    """One line per entry, the inside ones first with their sum against the budget, then the rest."""
    budget_bytes = ledger.budget_bytes
    inside = [entry for entry in ledger.entries if entry.inside]
    outside = [entry for entry in ledger.entries if not entry.inside]
    rows: list[tuple[str, ...]] = [_HEAD]
    rows += [_row(entry) for entry in inside]
    rows.append(_sum_row("inside", inside, budget_bytes))
    rows += [_row(entry) for entry in outside]
    rows.append(_sum_row("outside", outside, ledger.device_bytes - budget_bytes))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = [
        f"{ledger.device}: {format_bytes(ledger.device_bytes)}, mem_fraction {ledger.mem_fraction:g}"
        f" (budget {format_bytes(budget_bytes)})"
    ]
    for row in rows:
        cells = [
            cell.rjust(width) if 2 <= column <= 4 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def device_table(device: SharedDevice) -> str:
    """One line per worker on the GPU, their sum, and what the driver says."""
    rows: list[tuple[str, ...]] = [("worker", "planned", "measured")]
    rows += [
        (one.name, format_bytes(one.planned_bytes), format_bytes(one.measured_bytes))
        for one in device.workers
    ]
    rows.append(("= together", format_bytes(device.planned_bytes), format_bytes(device.measured_bytes)))
    if device.used_bytes is not None:
        rows.append(("the driver", "", format_bytes(device.used_bytes)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{device.device} {device.device_id}: {format_bytes(device.device_bytes)}"]
    for name, *sizes in rows:
        cells = [size.rjust(width) for size, width in zip(sizes, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def picture(ledger: Ledger, width: int = 80, colour: bool = False) -> str:
    """The device as one bar of `width` cells, the budget's border marked above it, with a legend below.

    Measured bytes are sampled where they are known, planned ones elsewhere. A line that exists gets at
    least one cell, taken from the free space.
    """
    from rich.console import Console
    from rich.text import Text

    ordered = sorted(ledger.entries, key=lambda entry: not entry.inside)
    total = max(ledger.device_bytes, sum(_sampled_bytes(entry) for entry in ordered), 1)
    bar, legend = Text(), Text()
    border = min(width - 1, round(width * ledger.device_bytes * ledger.mem_fraction / total))
    for index, entry in enumerate(ordered):
        size = _sampled_bytes(entry)
        cells = max(1, round(width * size / total)) if size else 0
        mark, style = chr(ord("A") + index), _COLOURS[index % len(_COLOURS)]
        bar.append(mark * cells, style=f"black on {style}" if colour else "")
        legend.append(f" {mark} ", style=f"black on {style}" if colour else "")
        legend.append(f"{entry.name} {format_bytes(size)}   ")
    free_bytes = ledger.device_bytes - sum(_sampled_bytes(entry) for entry in ordered)
    bar.truncate(width)
    bar.append("." * (width - len(bar)))
    legend.append(f" . free {format_bytes(free_bytes)}")
    out = StringIO()
    console = Console(file=out, width=width, force_terminal=colour, highlight=False, legacy_windows=False)
    right_of_border = border + len("| mem_fraction") <= width
    console.print(
        Text(" " * border + "| mem_fraction" if right_of_border else "mem_fraction |".rjust(border + 1))
    )
    console.print(bar)
    console.print(legend)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _sampled_bytes(entry: LedgerEntry) -> int:
    return entry.planned_bytes if entry.measured_bytes is None else entry.measured_bytes


def _row(entry: LedgerEntry) -> tuple[str, ...]:
    measured, difference = "-", "-"
    if entry.measured_bytes is not None:
        measured = format_bytes(entry.measured_bytes)
        difference = format_bytes(entry.measured_bytes - entry.planned_bytes)
    return entry.process, entry.name, format_bytes(entry.planned_bytes), measured, difference, entry.note


def _sum_row(name: str, entries: list[LedgerEntry], limit_bytes: int) -> tuple[str, ...]:
    planned_bytes = sum(entry.planned_bytes for entry in entries)
    measured, difference = "-", "-"
    if entries and all(entry.measured_bytes is not None for entry in entries):
        measured_bytes = sum(entry.measured_bytes or 0 for entry in entries)
        measured, difference = format_bytes(measured_bytes), format_bytes(measured_bytes - planned_bytes)
    verdict = "of" if planned_bytes <= limit_bytes else "DOES NOT FIT in"
    note = f"{verdict} {format_bytes(limit_bytes)}"
    return "", f"= {name}", format_bytes(planned_bytes), measured, difference, note
