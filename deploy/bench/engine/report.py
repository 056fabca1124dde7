"""What a run of the benchmark found: as one JSON document, and as lines that are printed while it runs."""

from typing import Literal

from msgspec import Struct, field

from deploy.bench.engine.limits import Ceilings, RooflinePhase, formula, limit_s, one_stream_s
from deploy.bench.engine.trace import Traced

Unit = Literal["ms", "tok/s", "s"]


class EngineMachine(Struct, frozen=True):
    device: str
    device_bytes: int
    cpu: str
    cpus: int


class ModelFigures(Struct, frozen=True):
    name: str
    architecture: str
    layers: int
    weights_bytes: int
    kv_token_bytes: float
    dtype: str


class ReportRow(Struct, frozen=True):
    """`measured`, `limit` and `one_stream` (see limits.py) in `unit`; `share` is how much of the limit's
    speed was reached, 1 being all.

    A row that failed has an `error` and no figures, one that was left out a `note` and none; a figure that
    has no limit has no share either.
    """

    name: str
    unit: Unit
    measured: float | None = None
    limit: float | None = None
    one_stream: float | None = None
    share: float | None = None
    formula: str = ""
    phases: list[RooflinePhase] = []
    details: dict[str, float] = {}
    note: str = ""
    error: str | None = None


class MemoryLine(Struct, frozen=True):
    """`planned_bytes` before anything ran, as `baton plan` has it; `difference_percent` of the device."""

    name: str
    planned_bytes: int
    measured_bytes: int
    difference_percent: float


class EngineReport(Struct):
    machine: EngineMachine
    versions: dict[str, str]
    settings: dict[str, str | int | float]
    ceilings: Ceilings | None = None
    model: ModelFigures | None = None
    rows: list[ReportRow] = field(default_factory=list)
    traces: list[Traced] = field(default_factory=list)
    memory: list[MemoryLine] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def time_row(
    name: str,
    measured_s: float,
    phases: list[RooflinePhase],
    ceilings: Ceilings | None,
    details: dict[str, float],
) -> ReportRow:
    """A row in milliseconds. Without ceilings, as where measuring them failed, it has no limit."""
    if ceilings is None:
        return ReportRow(name, "ms", measured_s * 1e3, details=details)
    least_s = limit_s(phases, ceilings)
    return ReportRow(
        name,
        "ms",
        measured_s * 1e3,
        limit=least_s * 1e3,
        one_stream=one_stream_s(phases, ceilings) * 1e3,
        share=least_s / measured_s,
        formula=formula(phases, ceilings),
        phases=phases,
        details=details,
    )


def rate_row(
    name: str, tokens: int, measured_s: float, phases: list[RooflinePhase], ceilings: Ceilings | None
) -> ReportRow:
    """A row in tokens a second. Without ceilings it has no limit."""
    details = {"seconds": measured_s, "tokens": float(tokens)}
    if ceilings is None:
        return ReportRow(name, "tok/s", tokens / measured_s, details=details)
    least_s = limit_s(phases, ceilings)
    return ReportRow(
        name,
        "tok/s",
        tokens / measured_s,
        limit=tokens / least_s,
        one_stream=tokens / one_stream_s(phases, ceilings),
        share=least_s / measured_s,
        formula=f"{tokens} tok / {formula(phases, ceilings)}",
        phases=phases,
        details=details,
    )


def head_line() -> str:
    return f"{'work':<36} {'measured':>15} {'limit':>15} {'of limit':>8} {'one stream':>15}"


def row_line(row: ReportRow) -> str:
    """One line of the table, with the limit's formula below."""
    if row.error is not None:
        return f"{row.name:<36} {'failed':>15}  {row.error}"
    line = f"{row.name:<36} {_figure(row.measured, row.unit):>15} {_figure(row.limit, row.unit):>15}"
    line += f" {'-' if row.share is None else f'{row.share:.1%}':>8} {_figure(row.one_stream, row.unit):>15}"
    details = ", ".join(f"{name} {value:,.6g}" for name, value in row.details.items())
    for below in (row.formula, details, row.note):
        line += f"\n    {below}" if below else ""
    return line


def memory_lines(lines: list[MemoryLine]) -> str:
    text = [f"{'memory of the worker':<36} {'planned MiB':>16} {'measured MiB':>16} {'of device':>9}"]
    for line in lines:
        planned, measured = line.planned_bytes / (1 << 20), line.measured_bytes / (1 << 20)
        text.append(f"{line.name:<36} {planned:>16.1f} {measured:>16.1f} {line.difference_percent:>+8.2f}%")
    return "\n".join(text)


def _figure(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.4g} {unit}"
