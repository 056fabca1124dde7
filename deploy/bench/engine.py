"""The engine by itself on one GPU, Qwen3-8B's shape with dummy weights: `python -m deploy.bench.engine`.

Decode steps (median of many, as `execute` is called by a worker, so with scheduling inputs, sampling and the
copy of the tokens to the host) and prefill of one prompt in chunks. Limits are those of an H200: 4.49 TB/s,
781 TFLOP/s.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from services.config import WorkerConfig
from services.engine.batch import Draw, Row
from services.engine.engine import Engine
from services.engine.model_config import read_model_config
from services.messages import Sampling

QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "eos_token_id": 151645,
}
PAGE_SIZE_TOKENS = 64
GREEDY = Sampling(max_tokens=1 << 20, seed=0, temperature=0.0)
DECODES = ((1, 1024), (1, 16384), (64, 1024), (128, 1024), (256, 1024))
PREFILLS = (1024, 8192, 16384)


def decode_ms(engine: Engine, batch: int, context: int, steps: int) -> float:
    pages = -(-(context + steps + 8) // PAGE_SIZE_TOKENS)
    tables = [list(range(at * pages, (at + 1) * pages)) for at in range(batch)]
    times: list[float] = []
    for step in range(steps + 5):
        rows = [
            Row([7], context + step, table, [Draw(0, context + step + 1, GREEDY, [], [])]) for table in tables
        ]
        started = time.perf_counter()
        engine.execute(rows)
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[5:])


def prefill_ms(engine: Engine, tokens: int, chunk: int) -> float:
    table = list(range(-(-tokens // PAGE_SIZE_TOKENS)))
    prompt = [(7919 * at) % 150_000 for at in range(tokens)]
    times: list[float] = []
    for _ in range(4):
        started = time.perf_counter()
        for start in range(0, tokens, chunk):
            part = prompt[start : start + chunk]
            draws = [Draw(0, tokens, GREEDY, [], [])] if start + len(part) == tokens else []
            engine.execute([Row(part, start, table, draws)])
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1e3)
    return min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description="Decode steps and prefill of the engine alone")
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "config.json").write_text(json.dumps(QWEN3_8B))
        started = time.perf_counter()
        config = WorkerConfig(
            name="bench",
            role="unified",
            model_dir=directory,
            listen="ipc:///unused",
            device="cuda",
            dtype="bfloat16",
            load_format="dummy",
            max_model_len=20480,
            page_size_tokens=PAGE_SIZE_TOKENS,
            max_batch=256,
            max_chunk_tokens=given.chunk,
        )
        engine = Engine(config, read_model_config(directory))
        weights_bytes = engine.load(lambda done, total: None)
        activation_bytes = engine.measure_activations()
        engine.allocate_pool(256 * (1024 + 128) // PAGE_SIZE_TOKENS + 256)
        graphs_bytes = engine.capture_graphs()
        ready_s = time.perf_counter() - started

    results: dict[str, float] = {}
    table = Table(title=f"Qwen3-8B shape, bf16, {torch.cuda.get_device_name()}, chunks of {given.chunk}")
    for column in ("work", "ms"):
        table.add_column(column, justify="right" if column == "ms" else "left")
    for batch, context in DECODES:
        results[f"decode step, batch {batch}, context {context}"] = decode_ms(
            engine, batch, context, given.steps
        )
    for tokens in PREFILLS:
        results[f"prefill {tokens}"] = prefill_ms(engine, tokens, given.chunk)
    for work, value in results.items():
        table.add_row(work, f"{value:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"ready in {ready_s:.1f} s; weights {weights_bytes >> 20} MiB, "
        f"activations {activation_bytes >> 20} MiB, graphs {graphs_bytes >> 20} MiB"
    )
    if given.out is not None:
        given.out.write_text(json.dumps({"ready_s": ready_s, **results}, indent=1))


if __name__ == "__main__":
    main()
