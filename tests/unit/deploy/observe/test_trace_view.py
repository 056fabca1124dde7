"""The table, the bars and the Chrome trace of a small transfer whose times are known."""

import http.server
import json
from pathlib import Path

import msgspec
import pytest

from deploy.cli import run
from deploy.observe.trace_view import chrome_trace, exposed_s, text
from router.routing.traces import ProcessTrace, PromptTrace, RequestTrace
from services.protocol.messages import TraceSpan
from tests.unit.deploy.observe.test_ledgers import serving

PREFILL = ProcessTrace(
    "prefill-0", 0.0, 0.0, [TraceSpan("compute", 0, 6, 0.001, 0.011), TraceSpan("pack", 0, 6, 0.002, 0.012)]
)
SENDING = ProcessTrace("prefill-0/transfer", 0.0, 0.0, [TraceSpan("send", 0, 6, 0.012, 0.014)])
RECEIVING = ProcessTrace("decode-0/transfer", 60.0, 0.0005, [TraceSpan("arrive", 0, 6, 0.0145, 0.0145)])
DECODE = ProcessTrace(
    "decode-0",
    60.0,
    0.0005,
    [TraceSpan("commit", 0, 6, 0.016, 0.016), TraceSpan("unpack", 0, 6, 0.015, 0.016)],
)
PROMPT = PromptTrace(
    6, "prefill-0", "decode-0", 0.0135, 0.017, 0.021, [DECODE, RECEIVING, PREFILL, SENDING], ["gone-0"]
)
REQUEST = RequestTrace("mine", [PROMPT])


def test_the_exposed_tail_runs_from_the_first_token_to_the_last_unpack() -> None:
    assert exposed_s(PROMPT) == pytest.approx(0.0025)
    hidden = PromptTrace(6, "p", "d", 0.5, None, None, [DECODE], [])
    assert exposed_s(hidden) == 0
    assert exposed_s(PromptTrace(6, "p", "d", None, None, None, [DECODE], [])) is None
    assert exposed_s(PromptTrace(6, "p", "d", 0.5, None, None, [PREFILL], [])) is None


def test_bars_lie_where_their_times_are() -> None:
    lines = text(REQUEST, 28 + 3 + 16).splitlines()
    assert lines[0] == (
        "mine: prompt 1 of 1, 6 tokens, prefill-0 → decode-0, first token 13.50 ms, exposed 2.50 ms, "
        "decode 17.00 ms, end 21.00 ms"
    )
    assert "  gone-0 did not answer" in lines
    assert "  decode-0 has another clock: its times may be off by 0.50 ms" in lines
    stages = [line.split() for line in lines if line.split()[:1] in (["pack"], ["unpack"])]
    assert stages[0] == ["pack", "1", "6", "2.00", "12.00", "10.00"]
    bars = {line[:30].split()[0]: line[31:] for line in lines if "[0, 6)" in line}
    assert list(bars) == ["compute", "pack", "send", "arrive", "unpack", "commit"], "by their start"
    # 1 ms to 16 ms over 16 cells; the first token at 13.5 ms is in the thirteenth
    assert bars["compute"] == "█" * 11 + " │"
    assert bars["pack"] == " " + "█" * 11 + "│"
    assert bars["send"] == " " * 11 + "███"
    assert bars["arrive"] == " " * 12 + "│▌"
    assert bars["unpack"] == " " * 12 + "│ ██"
    assert bars["commit"] == " " * 12 + "│  ▌"


def test_requests_without_a_transfer_and_without_a_time_are_shown() -> None:
    alone = text(RequestTrace("mine", [PromptTrace(6, None, "unified-0", None, None, None, [], [])]), 80)
    assert alone.splitlines() == [
        "mine: prompt 1 of 1, 6 tokens, on unified-0",
        "  one worker did both: nothing was moved",
    ]
    moment = ProcessTrace("d", 0.0, 0.0, [TraceSpan("arrive", 0, 6, 0.5, 0.5)])
    assert "arrive [0, 6)" in text(
        RequestTrace("mine", [PromptTrace(6, "p", "d", None, None, None, [moment], [])]), 20
    )


def test_the_chrome_trace_has_a_process_for_each_and_microseconds() -> None:
    trace = json.loads(json.dumps(chrome_trace(REQUEST)))
    names = {one["pid"]: one["args"]["name"] for one in trace["traceEvents"] if one["ph"] == "M"}
    assert sorted(names.values()) == [
        "decode-0",
        "decode-0/transfer",
        "prefill-0",
        "prefill-0/transfer",
        "router",
    ]
    spans = {one["cat"]: one for one in trace["traceEvents"] if one["ph"] == "X"}
    assert names[spans["send"]["pid"]] == "prefill-0/transfer"
    assert (spans["send"]["ts"], spans["send"]["dur"]) == (pytest.approx(12000), pytest.approx(2000))
    assert spans["send"]["name"] == "send [0, 6)" and spans["send"]["args"]["tokens"] == 6
    moments = {one["name"]: one["ts"] for one in trace["traceEvents"] if one["ph"] == "i"}
    assert moments["first token of prompt 1"] == pytest.approx(13500)


class Router(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        known = self.path == "/trace/a%2Fb" and self.headers.get("Authorization") == "Bearer secret"
        self.send_response(200 if known else 404)
        self.end_headers()
        if known:
            empty = PromptTrace(6, None, "unified-0", 0.5, None, 0.75, [], [])
            self.wfile.write(msgspec.json.encode(RequestTrace("a/b", [empty])))

    def log_message(self, format: str, *values: object) -> None:
        pass


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "trace.json"
    with serving(Router) as port:
        url = ["--url", f"http://127.0.0.1:{port}"]
        assert run(["trace", "a/b", *url, "--api-key", "secret", "--out", str(out)]) == 0
        assert "6 tokens, on unified-0, first token 500.00 ms, end 750.00 ms" in capsys.readouterr().out
        assert json.loads(out.read_text())["otherData"] == {"request": "a/b"}
        assert run(["trace", "other", *url]) == 2
        assert "REQUEST_ID" in capsys.readouterr().err
        missing = tmp_path / "nowhere" / "trace.json"
        assert run(["trace", "a/b", *url, "--api-key", "secret", "--out", str(missing)]) == 2
        assert "cannot be written" in capsys.readouterr().err
