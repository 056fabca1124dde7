"""`baton bench pd` and `layouts` as a user starts them: all systems really run, one after the other, and
nothing is left."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint


def run_bench(
    name: str, model_dir: Path, run_root: Path, *flags: str | Path
) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "deploy", "bench", name, str(model_dir), "--device", "cpu"]
    command += ["--rates", "8", "--warm-up", "2", "--output-tokens", "6", "--input-tokens", "uniform:5:40"]
    command += ["--token-ids", "32-255", "--timeout", "60", "--staging-slot-bytes", "16KiB", *map(str, flags)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("BATON_")}
    environment |= {"OMP_NUM_THREADS": "1", "TMPDIR": str(run_root)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
@pytest.mark.timeout(400)  # eight processes, of which four import torch
def test_both_systems_are_launched_measured_and_judged(tmp_path: Path) -> None:
    model_dir = make_checkpoint("llama", tmp_path / "model", seed=3, eos=False)
    out, log = tmp_path / "out.json", tmp_path / "log"
    run_root = tmp_path / "run"
    run_root.mkdir(mode=0o700)
    done = run_bench(
        "pd", model_dir, run_root, "--requests", "8", "--slo-ttft-ms", "60000", "--out", out, "--log", log
    )
    assert done.returncode == 0, done.stdout + done.stderr + log.read_text()
    found = json.loads(out.read_text())
    split, unified = found["systems"]
    assert (split["name"], unified["name"]) == ("1P1D", "2 unified")
    for system in (split, unified):
        assert (system["gpus"], system["unit"]) == (2, "worker")
        (figures,) = system["rates"]
        assert (figures["requests"], figures["completed"], figures["failures"]) == (8, 8, {})
        assert figures["good"] == 8
        assert figures["second_token_ms"]["count"] == 8
    assert split["rates"][0]["input_tokens_per_request"] == unified["rates"][0]["input_tokens_per_request"]
    assert found["verdict"]["answer"] == "do not disaggregate", "all requests of both are good"
    assert f"verdict: {found['verdict']['answer']}" in done.stdout
    started = [line.split()[0] for line in log.read_text().splitlines() if " started (pid " in line]
    split_children = ["prefill-0-transfer", "decode-0-transfer", "prefill-0", "decode-0", "router"]
    assert sorted(started) == sorted([*split_children, "unified-0", "unified-1", "router"])
    assert list(run_root.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_layouts_are_launched_and_compared(tmp_path: Path) -> None:
    model_dir = make_checkpoint("qwen2", tmp_path / "model", seed=3, eos=False)
    out, log = tmp_path / "out.json", tmp_path / "log"
    run_root = tmp_path / "run"
    run_root.mkdir(mode=0o700)
    flags = ("--layouts", "1P1D,1U", "--requests", "24", "--out", out, "--log", log)
    done = run_bench("layouts", model_dir, run_root, *flags)
    assert done.returncode == 0, done.stdout + done.stderr + log.read_text()
    split, unified = json.loads(out.read_text())["systems"]
    assert [(one["name"], one["gpus"]) for one in (split, unified)] == [("1P1D", 2), ("1 unified", 1)]
    for system, roles in ((split, {"prefill", "decode"}), (unified, {"unified"})):
        (figures,) = system["rates"]
        assert (figures["completed"], figures["failures"]) == (24, {})
        assert set(figures["busy"]) == roles and all(0 < share <= 1 for share in figures["busy"].values())
    *_, first, second = done.stdout.splitlines()
    assert first.strip().startswith("1P1D: at best ") and "prefill workers busy" in first
    assert second.strip().startswith("1 unified: at best ")
    assert list(run_root.iterdir()) == []
