"""`baton bench pd` as a user starts it: both systems really run, one after the other, and nothing is left."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint


@pytest.mark.slow
@pytest.mark.timeout(400)  # eight processes, of which four import torch
def test_both_systems_are_launched_measured_and_judged(tmp_path: Path) -> None:
    model_dir = make_checkpoint("llama", tmp_path / "model", seed=3, eos=False)
    out, log = tmp_path / "out.json", tmp_path / "log"
    run_root = tmp_path / "run"
    run_root.mkdir(mode=0o700)
    command = [sys.executable, "-m", "deploy", "bench", "pd", str(model_dir), "--device", "cpu"]
    command += ["--rates", "8", "--requests", "8", "--warm-up", "2", "--output-tokens", "6"]
    command += ["--input-tokens", "uniform:5:40", "--token-ids", "32-255", "--slo-ttft-ms", "60000"]
    command += ["--out", str(out), "--log", str(log), "--timeout", "60", "--staging-slot-bytes", "16KiB"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
    environment |= {"OMP_NUM_THREADS": "1", "TMPDIR": str(run_root)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
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
