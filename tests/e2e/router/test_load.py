"""`baton bench serve` against a real router beside fake workers: what is sent, and what is counted."""

import json
from pathlib import Path
from typing import Any

import pytest

from deploy.cli import run
from services.protocol.messages import Failed, Prefill
from tests.e2e.router.harness import Cluster
from tests.fake_worker import Script

FLAGS = ("--rates", "20,40", "--requests", "8", "--warm-up", "2", "--output-tokens", "6")


def bench(cluster: Cluster, out: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    url = ["--url", cluster.router.url, "--out", str(out), "--token-ids", "32-255"]
    code = run(["bench", "serve", *url, *FLAGS, *flags])
    return code, json.loads(out.read_text())


def prompts_seen(cluster: Cluster) -> list[list[int]]:
    return [message.work.prompt for message in cluster.prefill.of(Prefill)]


def test_a_load_arrives_as_planned_and_is_counted(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.use(Script(answers=[[65, 66, 67, 68, 69, 70]]))
    code, found = bench(cluster, tmp_path / "out.json", "--input-tokens", "uniform:5:50")
    assert code == 0
    (system,) = found["systems"]
    for one, rate in zip(system["rates"], (20.0, 40.0), strict=True):
        assert (one["rate"], one["requests"], one["completed"], one["failures"]) == (rate, 8, 8, {})
        assert one["ttft_ms"]["count"] == one["e2e_ms"]["count"] == one["tpot_ms"]["count"] == 8
        assert one["ttft_ms"]["p50"] <= one["second_token_ms"]["p50"] <= one["e2e_ms"]["p50"]
        assert one["tokens_per_chunk"] == 1.0
        assert one["good"] == 8
    seen = prompts_seen(cluster)
    assert len(seen) == 20, "two rates of 8, and 2 that warm up at each"
    assert len({tuple(prompt) for prompt in seen}) == 20
    assert all(5 <= len(prompt) <= 50 and min(prompt) >= 32 for prompt in seen)
    works = [message.work for message in cluster.prefill.of(Prefill)]
    assert {work.sampling.max_tokens for work in works} == {6}
    assert found["settings"]["input-tokens"] == "uniform:5:50"
    assert found["model"] == "tiny"
    assert "TTFT ms" in capsys.readouterr().out


def test_the_blocks_of_a_trace_repeat_on_the_wire(cluster: Cluster, tmp_path: Path) -> None:
    cluster.use(Script(answers=[[65] * 6]))
    lines = [
        {"timestamp": 10 * at, "input_length": 1024, "output_length": 48, "hash_ids": [1, 2 + at % 3]}
        for at in range(10)
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ("--trace", str(trace), "--arrivals", "trace", "--shrink", "8")
    code, found = bench(cluster, tmp_path / "out.json", *flags)
    assert code == 0
    assert [one["completed"] for one in found["systems"][0]["rates"]] == [8, 8]
    seen = prompts_seen(cluster)
    assert {len(prompt) for prompt in seen} == {128}
    for start in (0, 10):
        rate = sorted(seen[start : start + 10])
        assert len({tuple(prompt[:64]) for prompt in rate}) == 1
        assert len({tuple(prompt[64:]) for prompt in rate}) == 3
    assert seen[0][:64] != seen[10][:64], "another rate has another text"


def test_failures_are_counted_by_kind(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.use(Script(answers=[[65, 66]]))
    code, found = bench(cluster, tmp_path / "out.json", "--input-tokens", "8")
    assert code == 1, "not one request got what it asked for"
    for one in found["systems"][0]["rates"]:
        assert (one["completed"], one["failures"], one["good"]) == (0, {"too few tokens": 8}, 0)
        assert one["ttft_ms"] is None
    cluster.use(Script(fail_prefill=Failed(0, "overloaded", "full", False)))
    code, found = bench(cluster, tmp_path / "out.json", "--input-tokens", "8")
    assert code == 1
    (kind,) = found["systems"][0]["rates"][0]["failures"]
    assert kind.startswith("http ")
    assert f"failed: 8 x {kind}" in capsys.readouterr().out


def test_a_request_that_takes_too_long_has_failed(cluster: Cluster, tmp_path: Path) -> None:
    cluster.use(Script(hold_prefill=True))
    code, found = bench(cluster, tmp_path / "out.json", "--input-tokens", "8", "--timeout", "1")
    assert code == 1
    assert found["systems"][0]["rates"][0]["failures"] == {"timeout": 8}


def test_an_endpoint_that_does_not_fit(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    url = ["bench", "serve", "--url", cluster.router.url]
    for flags, says in (
        (["--model", "other"], "--model: "),
        (["--input-tokens", "2000"], "--input-tokens: every request is longer than the model's 1024 tokens"),
    ):
        assert run([*url, *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"baton: error: {says}")
