"""Every family against transformers' own implementation, in float32: the same numbers, the same tokens."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from services.engine.batch import Row
from services.engine.engine import Engine
from services.protocol.messages import MAX_TOP_LOGPROBS
from tests.checkpoints import LINEAR_ROPE, LLAMA3_ROPE, YARN_ROPE, Family, make_checkpoint
from tests.engine.harness import Sequence, prompt_of, run_together, scattered_pages, start_engine

OUTPUT_TOKENS = 12
PROMPT_LENGTHS = (37, 5, 16, 1, 90)


@dataclass(frozen=True)
class Case:
    family: Family
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "llama": Case("llama"),
    "llama-llama3-rope": Case("llama", {"rope": LLAMA3_ROPE, "tied": True, "legacy_rope": True}),
    "llama-biases": Case("llama", {"attention_bias": True, "mlp_bias": True, "rope": LINEAR_ROPE}),
    "llama-mha": Case("llama", {"kv_heads": 4, "head_dim": 24, "layers": 3}),
    "mistral": Case("mistral"),
    "mistral-window": Case("mistral", {"sliding_window": 11, "layers": 3}),
    "qwen2": Case("qwen2"),
    "qwen2-windows": Case(
        "qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "layers": 3}
    ),
    "qwen2-window-unused": Case("qwen2", {"use_sliding_window": False, "sliding_window": 9, "tied": True}),
    "qwen2-yarn": Case("qwen2", {"rope": YARN_ROPE, "sharded": True}),
    "qwen3": Case("qwen3", {"tied": True, "layers": 3, "heads": 6, "hidden": 96}),
    "qwen3-yarn-legacy": Case("qwen3", {"rope": YARN_ROPE, "legacy_rope": True, "head_dim": 32}),
    "qwen3-biases-windows": Case(
        "qwen3",
        {
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen3-moe": Case("qwen3_moe", {"sharded": True}),
    "qwen3-moe-normalised": Case(
        "qwen3_moe", {"norm_topk_prob": True, "num_experts_per_tok": 3, "tied": True}
    ),
    "qwen3-moe-some-layers": Case(
        "qwen3_moe", {"layers": 5, "decoder_sparse_step": 2, "mlp_only_layers": [3], "attention_bias": True}
    ),
    "qwen3-moe-window": Case(
        "qwen3_moe", {"use_sliding_window": True, "sliding_window": 9, "rope": YARN_ROPE, "legacy_rope": True}
    ),
}


@dataclass(frozen=True)
class Reference:
    """What transformers says: log probabilities after every position, and the greedy continuation."""

    prompt: list[int]
    logprobs: torch.Tensor
    output: list[int]


@cache
def _references(name: str, model_dir: Path) -> list[Reference]:
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, attn_implementation="eager", dtype=torch.float32
    ).eval()
    found = []
    for seed, length in enumerate(PROMPT_LENGTHS):
        prompt = prompt_of(length, seed)
        with torch.inference_mode():
            ids = torch.tensor([prompt])
            logits = model(ids).logits[0]
            # without the mask, generate would guess one from tokens that happen to equal the padding
            mask = torch.ones_like(ids)
            tokens = model.generate(
                ids, attention_mask=mask, max_new_tokens=OUTPUT_TOKENS, do_sample=False, pad_token_id=0
            )
        found.append(Reference(prompt, logits.log_softmax(-1), tokens[0, length:].tolist()))
    return found


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("checkpoints")

    @cache
    def get(name: str) -> Path:
        case = CASES[name]
        return make_checkpoint(case.family, root / name, seed=3, eos=False, **case.options)

    return get


def _run(engine: Engine, references: list[Reference], chunk: int, page_size: int) -> list[list[int]]:
    pages_each = -(-(max(PROMPT_LENGTHS) + OUTPUT_TOKENS) // page_size)
    tables = scattered_pages(pages_each, len(references), engine.pool.pages)
    sequences = [Sequence(r.prompt, t, chunk=chunk) for r, t in zip(references, tables, strict=True)]
    return run_together(engine, sequences, OUTPUT_TOKENS)


@pytest.mark.parametrize("name", CASES)
def test_the_same_log_probabilities_as_transformers(name: str, checkpoints: Any) -> None:
    model_dir = checkpoints(name)
    engine = start_engine(model_dir)
    reference = _references(name, model_dir)[0]
    targets = [*reference.prompt[1:], 0]
    pages = scattered_pages(10, 1, engine.pool.pages)[0]
    (result,) = engine.execute([Row(reference.prompt, 0, pages, [], targets, MAX_TOP_LOGPROBS)])
    for position, logprob in enumerate(result.prompt_logprobs):
        expected = reference.logprobs[position]
        assert logprob.logprob == pytest.approx(float(expected[targets[position]]), abs=2e-4)
        values, tokens = expected.topk(MAX_TOP_LOGPROBS)
        assert [top.logprob for top in logprob.top] == pytest.approx(values.tolist(), abs=2e-4)
        assert logprob.top[0].token == int(tokens[0])


@pytest.mark.parametrize(("page_size", "chunk"), [(4, 1000), (16, 7)])
@pytest.mark.parametrize("name", CASES)
def test_the_same_greedy_tokens_as_transformers(
    name: str, page_size: int, chunk: int, checkpoints: Any
) -> None:
    """Five prompts of 1 to 90 tokens in one batch, whole or in chunks that run beside other rows' decodes."""
    model_dir = checkpoints(name)
    references = _references(name, model_dir)
    engine = start_engine(model_dir, page_size_tokens=page_size, pages=160)
    assert _run(engine, references, chunk, page_size) == [reference.output for reference in references]


def test_references_disagree_with_each_other(checkpoints: Any) -> None:
    """Tokens that hardly depend on the model would make the comparison worthless."""
    outputs = {
        tuple(_references(name, checkpoints(name))[4].output) for name in ("llama", "llama-llama3-rope")
    }
    outputs |= {
        tuple(_references(name, checkpoints(name))[4].output) for name in ("mistral", "mistral-window")
    }
    outputs |= {tuple(_references(name, checkpoints(name))[4].output) for name in ("qwen2", "qwen2-windows")}
    assert len(outputs) >= 5  # llama and mistral without options are the same model
    assert all(len(set(output)) > 3 for output in outputs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["qwen3", "qwen2"])
def test_half_precision_is_no_worse_than_transformers(name: str, dtype: str, checkpoints: Any) -> None:
    """Both round differently; the yardstick is how far transformers in that dtype is from float32."""
    model_dir = checkpoints(name)
    reference = _references(name, model_dir)[4]
    targets = [*reference.prompt[1:], 0]
    rows = torch.arange(len(targets))
    exact = reference.logprobs[rows, targets]

    engine = start_engine(model_dir, dtype=dtype)
    (result,) = engine.execute([Row(reference.prompt, 0, list(range(30)), [], targets, 0)])
    ours = torch.tensor([found.logprob for found in result.prompt_logprobs])

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype)).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([reference.prompt])).logits[0]
    theirs = logits.float().log_softmax(-1)[rows, targets]
    assert 0 < (ours - exact).abs().mean() < 1.3 * (theirs - exact).abs().mean()
