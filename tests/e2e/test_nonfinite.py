"""Weights that make NaN: an error for whoever meets them, on every worker that can, and no other harm."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.e2e.cluster import Cluster, wait_until
from tests.e2e.test_tokens import ask, prompt_of, reference

DEMO = Path(__file__).parents[2] / "deploy" / "demo" / "model"
TOKENS = 8


def spoil(model_dir: Path, name: str, *place: int) -> None:
    path = model_dir / "model.safetensors"
    weights = load_file(path)
    weights[name][place] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})


def counted(cluster: Cluster, worker: str) -> float:
    text = cluster.http.get("/metrics").text
    (line,) = [
        one
        for one in text.splitlines()
        if one.startswith("baton_nonfinite_logits_total") and f'worker="{worker}"' in one
    ]
    return float(line.split()[-1])


def refused(answer: httpx.Response) -> str:
    assert answer.status_code == 500, answer.text
    assert answer.headers["x-should-retry"] == "false"
    error: dict[str, Any] = answer.json()["error"]
    assert error["code"] == "invalid_logits"
    assert "NaN or infinite" in error["message"]
    return str(error["message"])


def test_one_token_that_is_nan(tmp_path: Path, asking: ThreadPoolExecutor) -> None:
    """In prompts it is found where they are computed, as a drawn token where that is decoded."""
    model_dir = make_checkpoint("llama", tmp_path / "model", seed=6, eos=False)
    prompts = [prompt_of(length, 4) for length in (9, 40, 70)]
    wanted = reference(model_dir, prompts, TOKENS)
    bad = min(set(range(VOCAB_SIZE)).difference(*prompts, *wanted))
    spoil(model_dir, "model.embed_tokens.weight", bad)
    forced = {"prompt": prompts[0], "max_tokens": TOKENS, "temperature": 0, "logit_bias": {str(bad): 100}}
    with Cluster(model_dir, tmp_path, "--page-size", "16", "--served-model-name", "tiny") as cluster:

        def post(**body: Any) -> httpx.Response:
            return cluster.http.post("/v1/completions", json={"max_tokens": TOKENS, "temperature": 0} | body)

        spoilt = [[*prompts[2][:20], bad, *prompts[2][21:]], [*prompts[1], bad]]
        bodies: list[dict[str, Any]] = [
            {"prompt": spoilt[0]},
            {"prompt": spoilt[0], "n": 2, "logprobs": 2, "temperature": 0.7},
            {"prompt": spoilt[1]},
            {"prompt": spoilt[1], "echo": True, "logprobs": 1},
            {"prompt": spoilt[0], "stream": True},
        ]
        failing = [asking.submit(post, **body) for body in bodies]
        sound = [asking.submit(ask, cluster, prompt, TOKENS) for prompt in prompts]
        messages = [refused(one.result()) for one in failing]
        assert [message.split()[-1] for message in messages] == ["20", "20", "40", "40", "20"]
        assert [one.result()["choices"][0]["token_ids"] for one in sound] == wanted

        decoding = [asking.submit(post, **forced, n=2), asking.submit(post, **forced, stream=True)]
        refused(decoding[0].result())
        answer = decoding[1].result()
        assert answer.status_code == 200 and "[DONE]" not in answer.text
        *_, last = [json.loads(line[6:]) for line in answer.text.splitlines() if line]
        assert last["error"]["code"] == "invalid_logits"
        assert last["error"]["message"].split()[-1] == str(len(prompts[0]))

        assert [ask(cluster, prompt, TOKENS)["choices"][0]["token_ids"] for prompt in prompts] == wanted
        refused(post(prompt=spoilt[0]))  # no prefix was kept that would hide it
        cluster.assert_at_rest()
        wait_until("every failure is counted", lambda: counted(cluster, "prefill-0") == 6)
        assert counted(cluster, "decode-0") == 2
        metrics = cluster.http.get("/metrics").text
        assert "baton_migrations_total{" not in metrics
        logged = [line for line in cluster.log_lines() if "invalid_logits" in line]
        assert len(logged) == 8 and all("token position" in line for line in logged)


def test_a_weight_that_spoils_everything(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "model")
    spoil(tmp_path / "model", "model.layers.2.mlp.down_proj.weight", 0, 0)
    with Cluster(tmp_path / "model", tmp_path, "--unified", "1", "--served-model-name", "tiny") as cluster:
        for body in ({"temperature": 0}, {"temperature": 1, "top_p": 0.9}, {"logprobs": 2, "n": 2}):
            asked = {"prompt": "Prefill is", "max_tokens": 5} | body
            refused(cluster.http.post("/v1/completions", json=asked))
        cluster.assert_at_rest()
        wait_until("every failure is counted", lambda: counted(cluster, "unified-0") == 3)
        assert cluster.worker("unified")["status"]["pages"]["cached"] == 0
