"""The timeline of a request's transfer: as a table, as bars for a terminal, as a Chrome trace. Pure.

All times are seconds after the prompt was sent off, on the router's clock.
"""

from collections.abc import Iterable
from typing import Any

from msgspec import Struct

from router.routing.traces import PromptTrace, RequestTrace
from services.protocol.messages import TraceSpan

STAGES = ("compute", "pack", "send", "arrive", "unpack", "commit")
_NAME_CHARACTERS = 28
_LEAST_BARS = 10


class TraceRow(Struct, frozen=True):
    process: str
    span: TraceSpan


def rows_of(prompt: PromptTrace) -> list[TraceRow]:
    """Every span, by its start; of spans that start together, in the pipeline's order."""
    rows = [TraceRow(one.process, span) for one in prompt.processes for span in one.spans]
    return sorted(rows, key=lambda row: (row.span.start_s, _order(row.span.stage), row.span.start_token))


def exposed_s(prompt: PromptTrace) -> float | None:
    """From the first token to the last unpacked byte: what no computation hid. None while it is not known."""
    ends_s = [row.span.end_s for row in rows_of(prompt) if row.span.stage == "unpack"]
    if prompt.first_token_s is None or not ends_s:
        return None
    return max(0.0, max(ends_s) - prompt.first_token_s)


def text(request: RequestTrace, width: int) -> str:
    """What `baton trace` prints, at most `width` characters wide."""
    parts = []
    for number, prompt in enumerate(request.prompts):
        parts.append(f"{request.id}: prompt {number + 1} of {len(request.prompts)}, {_headline(prompt)}")
        parts += _notes(prompt)
        rows = rows_of(prompt)
        if rows:
            parts += _stages(rows)
            parts += _bars(rows, prompt, width)
        parts.append("")
    return "\n".join(parts).rstrip()


def chrome_trace(request: RequestTrace) -> dict[str, Any]:
    """For chrome://tracing and Perfetto: a process for each of Baton's, a row for each stage."""
    events: list[dict[str, Any]] = []
    processes: dict[str, int] = {"router": 1}
    for number, prompt in enumerate(request.prompts, 1):
        moments = {
            "first token": prompt.first_token_s,
            "decode started": prompt.decode_started_s,
            "ended": prompt.ended_s,
        }
        for name, at_s in moments.items():
            if at_s is not None:
                events.append(
                    {"ph": "i", "s": "g", "name": f"{name} of prompt {number}", "ts": at_s * 1e6}
                    | {"pid": 1, "tid": 0}
                )
        for row in rows_of(prompt):
            span, pid = row.span, processes.setdefault(row.process, len(processes) + 1)
            end_token = span.start_token + span.token_count
            events.append(
                {
                    "ph": "X",
                    "name": f"{span.stage} [{span.start_token}, {end_token})",
                    "cat": span.stage,
                    "ts": span.start_s * 1e6,
                    "dur": (span.end_s - span.start_s) * 1e6,
                    "pid": pid,
                    "tid": _order(span.stage),
                    "args": {"prompt": number, "start_token": span.start_token, "tokens": span.token_count},
                }
            )
    names = [
        {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}
        for name, pid in processes.items()
    ]
    return {"traceEvents": names + events, "displayTimeUnit": "ms", "otherData": {"request": request.id}}


def _order(stage: str) -> int:
    return STAGES.index(stage) if stage in STAGES else len(STAGES)


def _headline(prompt: PromptTrace) -> str:
    where = f"on {prompt.decode}" if prompt.prefill is None else f"{prompt.prefill} → {prompt.decode}"
    known = {
        "first token": prompt.first_token_s,
        "exposed": exposed_s(prompt),
        "decode": prompt.decode_started_s,
        "end": prompt.ended_s,
    }
    times = [f"{name} {at_s * 1e3:.2f} ms" for name, at_s in known.items() if at_s is not None]
    return ", ".join([f"{prompt.prompt_tokens} tokens", where, *times])


def _notes(prompt: PromptTrace) -> Iterable[str]:
    for name in prompt.missing:
        yield f"  {name} did not answer"
    for one in prompt.processes:
        if one.error_s:
            yield f"  {one.process} has another clock: its times may be off by {one.error_s * 1e3:.2f} ms"
    if prompt.prefill is None:
        yield "  one worker did both: nothing was moved"


def _stages(rows: list[TraceRow]) -> list[str]:
    """One line a stage: how many, over how many tokens, from when to when, and how long in all."""
    lines = [f"  {'stage':<8}{'count':>7}{'tokens':>9}{'from ms':>11}{'to ms':>11}{'sum ms':>11}"]
    for stage in sorted({row.span.stage for row in rows}, key=_order):
        spans = [row.span for row in rows if row.span.stage == stage]
        first_s, last_s = min(one.start_s for one in spans), max(one.end_s for one in spans)
        took_s = sum(one.end_s - one.start_s for one in spans)
        tokens = sum(one.token_count for one in spans)
        lines.append(
            f"  {stage:<8}{len(spans):>7}{tokens:>9}{first_s * 1e3:>11.2f}{last_s * 1e3:>11.2f}"
            f"{took_s * 1e3:>11.2f}"
        )
    return lines


def _bars(rows: list[TraceRow], prompt: PromptTrace, width: int) -> list[str]:
    """One line a span, all on one scale; `│` is the first token."""
    zero_s, last_s = min(row.span.start_s for row in rows), max(row.span.end_s for row in rows)
    first_s = prompt.first_token_s
    if first_s is not None:
        zero_s, last_s = min(zero_s, first_s), max(last_s, first_s)
    cells = max(_LEAST_BARS, width - _NAME_CHARACTERS - 3)
    scale = (cells - 1) / (last_s - zero_s) if last_s > zero_s else 0.0

    def cell_of(at_s: float) -> int:
        return int((at_s - zero_s) * scale + 1e-6)

    legend = "" if first_s is None else ", │ first token"
    lines = [f"  {zero_s * 1e3:.2f} ms to {last_s * 1e3:.2f} ms{legend}"]
    for row in rows:
        span = row.span
        begin, end = cell_of(span.start_s), cell_of(span.end_s)
        cell = [" "] * cells
        if first_s is not None:
            cell[cell_of(first_s)] = "│"
        cell[begin : end + 1] = ["█" if end > begin else "▌"] * (end + 1 - begin)
        tokens = f"[{span.start_token}, {span.start_token + span.token_count})"
        lines.append(f"  {span.stage + ' ' + tokens:<{_NAME_CHARACTERS}} {''.join(cell).rstrip()}")
    return lines
