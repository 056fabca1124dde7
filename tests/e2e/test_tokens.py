"""Greedy tokens through router, prefill, transfer and decode equal those of transformers, for every family.

The pages of the two workers are the same here but the staging slots are small, so that most prompts need
several segments, and chunks are smaller than the longer prompts.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from deploy.observe.trace_view import exposed_s, text
from deploy.observe.traces import fetch_trace
from services.protocol.messages import TraceSpan
from tests.checkpoints import FAMILIES, LLAMA3_ROPE, VOCAB_SIZE, YARN_ROPE, make_checkpoint
from tests.e2e.cluster import Cluster

PAGE = 16
CHUNK = 64
PROCESS_OF = {
    "compute": "prefill-0",
    "pack": "prefill-0",
    "send": "prefill-0/transfer",
    "arrive": "decode-0/transfer",
    "unpack": "decode-0",
    "commit": "decode-0",
}
NEW_TOKENS = 12
LENGTHS = (1, PAGE - 1, PAGE, PAGE + 1, CHUNK, 3 * CHUNK + 7, 5 * PAGE, 300)
OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {"rope": LLAMA3_ROPE},
    "mistral": {"sliding_window": 40},
    "qwen2": {"rope": YARN_ROPE, "tied": True},
    "qwen3": {"sharded": True},
    "qwen3_moe": {"norm_topk_prob": True, "layers": 3, "mlp_only_layers": [1]},
}


def prompt_of(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(10, VOCAB_SIZE, (length,), generator=generator).tolist()


def reference(model_dir: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    outputs = []
    for prompt in prompts:
        with torch.inference_mode():
            ids = torch.tensor([prompt])
            out = model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs


def ask(cluster: Cluster, prompt: list[int], count: int = NEW_TOKENS) -> dict[str, Any]:
    answer = cluster.http.post(
        "/v1/completions",
        json={
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": count,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        },
    )
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def tokens_of(body: dict[str, Any]) -> list[int]:
    tokens: list[int] = body["choices"][0]["token_ids"]
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(family: str, tmp_path: Path) -> None:
    check_family(family, tmp_path)


def test_one_unified_worker_gives_the_same_tokens(tmp_path: Path) -> None:
    check_family("qwen3", tmp_path, "--unified", "1")


def check_family(family: str, tmp_path: Path, *more_flags: str, device: str = "cpu") -> None:
    """Serve a tiny checkpoint of `family` and compare prompts of every length, alone and together."""
    model_dir = make_checkpoint(family, tmp_path / "model", seed=3, eos=False, **OPTIONS[family])  # type: ignore[arg-type]
    prompts = [prompt_of(length, seed) for seed in (1, 2) for length in LENGTHS]
    wanted = reference(model_dir, prompts, NEW_TOKENS)
    flags = ("--page-size", str(PAGE), "--max-chunk-tokens", str(CHUNK), "--max-batch", "16")
    staging = ("--staging-slots", "4", "--staging-slot-bytes", "32768", "--served-model-name", "tiny")
    with Cluster(model_dir, tmp_path, *flags, *staging, *more_flags, device=device) as cluster:
        one_by_one = [tokens_of(ask(cluster, prompt)) for prompt in prompts[: len(LENGTHS)]]
        assert one_by_one == wanted[: len(LENGTHS)]
        with ThreadPoolExecutor(8) as pool:  # mixed batches; half of the prompts are prefix hits now
            together = list(pool.map(lambda prompt: ask(cluster, prompt), prompts))
        assert [tokens_of(body) for body in together] == wanted
        full_hit = ask(cluster, prompts[LENGTHS.index(5 * PAGE)])
        assert tokens_of(full_hit) == wanted[LENGTHS.index(5 * PAGE)]
        assert full_hit["usage"]["prompt_tokens_details"]["cached_tokens"] == 4 * PAGE
        cluster.assert_at_rest()
        if "--unified" not in more_flags:
            counters = cluster.worker("prefill")["status"]["counters"]
            assert counters["transfer_segments"] > len(prompts), "long prompts travel in several segments"
            check_trace(cluster, prompt_of(300, seed=9))


def check_trace(cluster: Cluster, prompt: list[int]) -> None:
    """Every token of a new prompt is seen at every stage, in the process that has it, and in their order."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 2, "ignore_eos": True}
    answer = cluster.http.post("/v1/completions", json=body, headers={"x-request-id": "look/here"})
    assert answer.status_code == 200 and answer.headers["x-request-id"] == "look/here"
    trace = fetch_trace(cluster.url, "look/here", None)
    (seen,) = trace.prompts
    assert seen.missing == [] and seen.prompt_tokens == len(prompt)
    stages: dict[str, list[TraceSpan]] = {}
    for process in seen.processes:
        assert process.offset_s == process.error_s == 0, "one host, one clock"
        for span in process.spans:
            assert process.process == PROCESS_OF[span.stage]
            stages.setdefault(span.stage, []).append(span)
    assert sorted(stages) == sorted(PROCESS_OF)
    for stage, spans in stages.items():
        tokens = [at for span in spans for at in range(span.start_token, span.start_token + span.token_count)]
        assert sorted(tokens) == list(range(len(prompt))), stage
        assert all(0 < span.start_s <= span.end_s for span in spans)
    ends = [max(span.end_s for span in stages[stage]) for stage in ("compute", "pack", "unpack", "commit")]
    assert ends == sorted(ends)
    assert seen.first_token_s is not None and seen.ended_s is not None and exposed_s(seen) is not None
    assert "unpack" in text(trace, 100)
    assert cluster.http.get("/trace/nobody").status_code == 404
