"""The figures of a run as one JSON document, and as the lines that are printed while it runs."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from deploy.bench.load.options import LoadSettings
from deploy.bench.machine import cpu_name, versions
from deploy.bench.serving.exposed import Exposed
from deploy.bench.serving.statistics import RateFigures, SloLimits, Spread, System
from deploy.bench.serving.verdict import Verdict
from deploy.errors import UserError
from deploy.settings.schema import settings_of

LATENCIES = ("ttft_ms", "second_token_ms", "itl_ms", "tpot_ms", "e2e_ms")
LAG_MS, LAG_SHARE = 5.0, 0.1
BUSY_SHARE = 0.7


class ClientMachine(Struct, frozen=True):
    """Where the client ran, which is where the system ran too if the comparison launched it."""

    cpu: str
    cpus: int
    platform: str


class LoadResult(Struct, frozen=True):
    machine: ClientMachine
    versions: dict[str, str]
    settings: dict[str, Any]
    model: str
    limits: SloLimits
    systems: list[System]
    verdict: Verdict | None = None


def machine() -> ClientMachine:
    return ClientMachine(cpu_name(), os.cpu_count() or 1, platform.platform())


def settings_values(settings: LoadSettings) -> dict[str, Any]:
    """Every setting that makes the load or the system, by its flag's name. Never a key."""
    shown = {name: getattr(settings, name) for name in settings_of(type(settings)) if name != "api_key"}
    return {
        name.replace("_", "-"): value if isinstance(value, int | float | None) else str(value)
        for name, value in shown.items()
    }


def result(
    settings: LoadSettings,
    model: str,
    limits: SloLimits,
    systems: list[System],
    verdict: Verdict | None = None,
) -> LoadResult:
    return LoadResult(machine(), versions(), settings_values(settings), model, limits, systems, verdict)


def write_json(path: Path, found: LoadResult) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")


def check_writable(**files: Path | None) -> None:
    """Raises UserError, naming the flag, before anything is measured and not after."""
    for name, file in files.items():
        if file is not None and not (file.parent.is_dir() and os.access(file.parent, os.W_OK)):
            raise UserError(f"--{name}: {file.parent} is not a directory that can be written to")


def head_lines() -> str:
    first = f"{'':>8} {'':>6} {'TTFT ms':^22} {'2nd tok':>7} {'ITL ms':^22} {'TPOT ms':^14} {'e2e s':>6}"
    second = f"{'req/s':>8} {'done':>6} " + " ".join(f"{name:>6}" for name in ("p50", "p90", "p99"))
    second += f"  {'p50':>7} " + " ".join(f"{name:>6}" for name in ("p50", "p90", "p99"))
    second += f"  {'p50':>6} {'p99':>6}  {'p50':>6} {'tok/s':>7} {'good':>5} {'good/s each':>11}"
    return f"{first}\n{second}"


def row_lines(one: RateFigures, limits: SloLimits) -> str:
    """The line of one rate, and below it whatever should not be overlooked."""
    ttft, gap = one.ttft_ms, one.itl_ms
    line = f"{one.rate:>8.3g} {one.completed:>6} {_cells(ttft)}  {_cell(one.second_token_ms, 'p50'):>7}"
    line += f" {_cells(gap)}  {_cell(one.tpot_ms, 'p50'):>6} {_cell(one.tpot_ms, 'p99'):>6}"
    e2e_s = "-" if one.e2e_ms is None else f"{one.e2e_ms.p50 / 1e3:.2f}"
    line += f"  {e2e_s:>6} {one.output_tokens_per_s:>7.0f}"
    line += f" {one.good / one.requests:>5.0%} {one.goodput_per_gpu:>11.3g}" if limits.given else ""
    first_gap = []
    if one.second_gap_ms is not None:
        first_gap.append(f"second token after the first: {_ends(one.second_gap_ms)} ms")
    if one.exposed_kv_ms is not None:
        first_gap.append(f"KV exposed after the first token: {_ends(one.exposed_kv_ms)} ms")
    busy = (
        [f"busy: {', '.join(f'{role} {share:.0%}' for role, share in one.busy.items())}"] if one.busy else []
    )
    lines = [line, "; ".join(first_gap)] if first_gap else [line]
    return "\n    ".join([*lines, *busy, *warnings(one)])


def best_lines(systems: Sequence[System], limits: SloLimits) -> str:
    """Each system at its best rate: by good requests with limits, by output tokens without."""
    lines = []
    for system in systems:
        if limits.given:
            best = max(system.rates, key=lambda one: one.goodput)
            what = f"{best.goodput_per_gpu:.3g} good requests/s per {system.unit}"
        else:
            best = max(system.rates, key=lambda one: one.output_tokens_per_s)
            what = f"{best.output_tokens_per_s / system.gpus:.0f} output tokens/s per {system.unit}"
        busy = "".join(f", {role} workers busy {share:.0%}" for role, share in best.busy.items())
        lines.append(f"{system.name:>10}: at best {what}, at {best.rate:g} req/s{busy}")
    return "\n".join(lines)


def warnings(one: RateFigures) -> list[str]:
    found = []
    if one.failures:
        failed = ", ".join(f"{count} x {kind}" for kind, count in one.failures.items())
        found.append(f"failed: {failed}")
    if one.left_out:
        found.append(f"left out: {one.left_out} requests longer than the model allows")
    if one.tokens_per_chunk > 1.02 or one.chunks_per_arrival > 1.02:
        found.append(
            f"{one.tokens_per_chunk:.2f} tokens a chunk, {one.chunks_per_arrival:.2f} chunks a read: "
            "tokens that came together are one gap"
        )
    lag, ttft = one.client.lag_ms, one.ttft_ms
    if lag is not None and ttft is not None and lag.p99 > max(LAG_MS, LAG_SHARE * ttft.p50):
        found.append(
            f"this client was late (p50 {lag.p50:.1f} ms, p99 {lag.p99:.1f}), which is in all latencies"
        )
    if one.client.cpu_share > BUSY_SHARE:
        found.append(f"this client used {one.client.cpu_share:.0%} of a core, and may be what is slow")
    return found


def _cells(one: Spread | None) -> str:
    return " ".join(f"{_cell(one, name):>6}" for name in ("p50", "p90", "p99"))


def _ends(one: Spread | Exposed) -> str:
    return f"p50 {_cell(one, 'p50')}, p99 {_cell(one, 'p99')}"


def _cell(one: Spread | Exposed | None, name: str) -> str:
    if one is None:
        return "-"
    value = float(getattr(one, name))
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
