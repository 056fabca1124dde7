"""`baton bench engine` as a whole, on a CPU and a model of two layers."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy.bench.engine.loop import EngineLoop
from deploy.cli import run

TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
LAYER_WEIGHTS = 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 96)
OUTPUT_WEIGHTS = 320 * 64
PAIR_FLOP = 2 * 4 * 4 * 16
FLAGS = ("--device", "cpu", "--quick", "--mem-fraction", "0.1", "--device-memory", "1GiB")


def shape(directory: Path, **changes: Any) -> str:
    path = directory / "shape.json"
    path.write_text(json.dumps(TINY | changes))
    return str(path)


@pytest.mark.slow
@pytest.mark.timeout(400)  # three processes that import torch, one after the other
def test_every_row_with_its_limit_a_trace_and_the_ledger(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "deploy.cli", "bench", "engine", *FLAGS]
    command += ["--model-config", shape(tmp_path), "--out", str(out), "--trace", str(tmp_path / "t.json")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["failures"] == []
    assert found["machine"]["device"] == "cpu"
    assert found["machine"]["device_bytes"] == 1 << 30
    assert {"python", "torch", "triton", "baton"} <= found["versions"].keys()
    rows = {row["name"]: row for row in found["rows"]}
    assert {"start to ready", "decode step, batch 4 at 16", "prefill 128", "prefill 64"} <= rows.keys()
    for name, row in rows.items():
        assert name in done.stdout
        assert row["measured"] > 0
        assert row["formula"] in done.stdout
    check_limits(rows, found["ceilings"])

    for kind in ("decode", "prefill"):
        file = tmp_path / f"t-{kind}.json.gz"
        assert file.stat().st_size < 1_000_000
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        assert any(event.get("name") == "measured" for event in events)
        assert any(event.get("cat") == "cpu_op" for event in events)
    for traced in found["traces"]:
        assert 0 < traced["busy_share"] <= 1
        assert traced["busy_share"] == pytest.approx(
            traced["summary"]["busy_us"] / traced["summary"]["span_us"], rel=1e-9
        )
    lines = {line["name"]: line for line in found["memory"]}
    assert {"weights", "kv pool", "activations", "worker context"} <= lines.keys()
    for line in lines.values():
        difference = line["measured_bytes"] - line["planned_bytes"]
        assert line["difference_percent"] == pytest.approx(100 * difference / (1 << 30))


def check_limits(rows: dict[str, Any], ceilings: dict[str, Any]) -> None:
    """Every limit again, from the ceilings and the shape alone."""
    read, rate = ceilings["read_bytes_per_s"], ceilings["matmul_flop_per_s"]
    assert read > 0 < ceilings["copy_bytes_per_s"]
    norms = 2 * (2 * 64 + (4 + 2) * 16) + 64
    weights_bytes = 4 * (LAYER_WEIGHTS + OUTPUT_WEIGHTS + norms)
    kv_token_bytes = 2 * 2 * 2 * 16 * 4
    decode = rows["decode step, batch 4 at 16"]
    context = decode["details"]["mean_context"]
    assert context == pytest.approx(16, abs=2)
    weights_s, kv_s = weights_bytes / read, 4 * context * kv_token_bytes / read
    products_s = 2 * 4 * (LAYER_WEIGHTS + OUTPUT_WEIGHTS) / rate
    attention_s = 4 * context * PAIR_FLOP / rate
    assert decode["unit"] == "ms"
    least_s, one_stream_s = max(weights_s + kv_s, products_s + attention_s), max(weights_s, products_s)
    assert decode["limit"] == pytest.approx(1e3 * least_s, rel=1e-6)
    assert decode["one_stream"] == pytest.approx(1e3 * (one_stream_s + max(kv_s, attention_s)), rel=1e-6)
    assert decode["share"] == pytest.approx(decode["limit"] / decode["measured"])

    prefill = rows["prefill 128"]
    read_s = (weights_bytes + 128 * kv_token_bytes) / read
    done_s = (2 * (128 * LAYER_WEIGHTS + OUTPUT_WEIGHTS) + 128 * 129 / 2 * PAIR_FLOP) / rate
    assert prefill["limit"] == pytest.approx(1e3 * max(read_s, done_s), rel=1e-6)

    offline = rows["offline 3 x (16 in, 4 out)"]
    assert offline["unit"] == "tok/s"
    assert offline["measured"] == pytest.approx(12 / offline["details"]["seconds"])
    assert offline["share"] == pytest.approx(offline["measured"] / offline["limit"])
    assert 0 < offline["share"] < 1


def test_a_row_that_fails_or_has_no_room_does_not_cost_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(loop: EngineLoop, row: object) -> float:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(EngineLoop, "offline_s", broken)
    out = tmp_path / "out.json"
    config = shape(tmp_path, max_position_embeddings=200)
    only = [part for group in ("prefill", "offline") for part in ("--only", group)]
    assert run(["bench", "engine", *FLAGS, *only, "--model-config", config, "--out", str(out)]) == 1
    found = json.loads(out.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["prefill 16"]["measured"] > 0
    assert rows["prefill 256"]["measured"] is None
    assert rows["prefill 256"]["note"].startswith("left out: a sequence has at most 200 tokens")
    assert rows["prefill 256"]["error"] is None
    (failure,) = found["failures"]
    assert failure == "offline 3 x (16 in, 4 out): RuntimeError: out of luck"
    assert "failed: offline 3 x" in capsys.readouterr().out
