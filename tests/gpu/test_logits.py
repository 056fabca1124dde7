"""Every family on a GPU against transformers' own implementation with the same weights: what the model says
after each token, in prefill and decode, whole and chunked, alone and in batches up to 256."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from services.engine.batch import Row, RowResult
from services.protocol.messages import MAX_TOP_LOGPROBS, Sampling, TokenLogprob
from tests.checkpoints import make_checkpoint
from tests.engine.harness import Sequence, prompt_of, run_together, start_engine
from tests.engine.models.test_models import CASES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
PAGE_SIZE = 16
OUTPUT_TOKENS = 5
WATCHED = Sampling(max_tokens=1, seed=1, temperature=0.0, logprobs=MAX_TOP_LOGPROBS)


class WatchedSequence(Sequence):
    """Keeps what the model said at every draw."""

    def __init__(self, prompt: list[int], pages: list[int], chunk: int) -> None:
        super().__init__(prompt, pages, WATCHED, chunk=chunk)
        self.said: list[TokenLogprob] = []

    def take(self, result: RowResult) -> None:
        super().take(result)
        self.said += [sampled.logprob for sampled in result.sampled if sampled.logprob is not None]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("checkpoints")

    @cache
    def get(name: str) -> Path:
        case = CASES[name]
        return make_checkpoint(case.family, root / name, seed=3, eos=False, **case.options)

    return get


def transformers_logprobs(model_dir: Path, texts: list[list[int]], dtype: torch.dtype) -> list[torch.Tensor]:
    """Log probabilities after every position, each text by itself, on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager", dtype=dtype).eval()
    with torch.inference_mode():
        return [model(torch.tensor([text])).logits[0].float().log_softmax(-1) for text in texts]


@pytest.mark.parametrize(
    ("name", "batch", "chunk"),
    [(name, 3, 7) for name in CASES]
    + [
        (name, batch, 1000)
        for name in ("llama", "mistral", "qwen2", "qwen3", "qwen3-moe")
        for batch in (1, 64, 256)
    ],
)
def test_what_the_model_says_is_what_transformers_says(
    name: str, batch: int, chunk: int, checkpoints: Any
) -> None:
    model_dir = checkpoints(name)
    prompts = [prompt_of(1 + (37 * at) % 61, seed=at) for at in range(batch)]
    pages = -(-(61 + OUTPUT_TOKENS) // PAGE_SIZE)
    engine = start_engine(
        model_dir, pages=batch * pages, device="cuda", page_size_tokens=PAGE_SIZE, max_batch=batch
    )
    assert (engine.capture_graphs() > 0) == engine.model.family.captures_graphs
    sequences = [
        WatchedSequence(prompt, list(range(at * pages, (at + 1) * pages)), chunk)
        for at, prompt in enumerate(prompts)
    ]
    run_together(engine, sequences, OUTPUT_TOKENS)
    texts = [[*one.prompt, *one.output] for one in sequences]
    for one, expected in zip(sequences, transformers_logprobs(model_dir, texts, torch.float32), strict=True):
        assert len(one.said) == OUTPUT_TOKENS
        for at, said in enumerate(one.said):
            after = expected[len(one.prompt) - 1 + at]
            assert said.logprob == pytest.approx(float(after[one.output[at]]), abs=3e-4)
            found = [top.logprob for top in said.top]
            assert found == pytest.approx(after.topk(MAX_TOP_LOGPROBS).values.tolist(), abs=3e-4)


@pytest.mark.parametrize("name", CASES)
def test_a_whole_prompt_scores_as_in_transformers(name: str, checkpoints: Any) -> None:
    model_dir = checkpoints(name)
    prompt = prompt_of(90)
    targets = [*prompt[1:], 0]
    engine = start_engine(model_dir, device="cuda", page_size_tokens=PAGE_SIZE)
    (result,) = engine.execute([Row(prompt, 0, [3, 1, 4, 0, 5, 9], [], targets, 0)])
    (expected,) = transformers_logprobs(model_dir, [prompt], torch.float32)
    ours = torch.tensor([said.logprob for said in result.prompt_logprobs])
    assert torch.allclose(ours, expected[torch.arange(90), targets], atol=3e-4)


@pytest.mark.parametrize("chunk", [1000, 70])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("family", "head_dim"), [("qwen3", 128), ("llama", 64)])
def test_half_precision_is_no_worse_than_transformers(
    family: Any, head_dim: int, dtype: str, chunk: int, tmp_path: Path
) -> None:
    """Head sizes of real models, so that the tensor cores' own kernels run; the yardstick is how far
    transformers in that dtype is from float32."""
    make_checkpoint(family, tmp_path, seed=5, eos=False, heads=8, kv_heads=2, head_dim=head_dim)
    prompt = prompt_of(300)
    targets = [*prompt[1:], 0]
    engine = start_engine(tmp_path, device="cuda", dtype=dtype, page_size_tokens=64, max_chunk_tokens=1024)
    ours: list[float] = []
    for start in range(0, len(prompt), chunk):
        part = slice(start, start + chunk)
        (result,) = engine.execute([Row(prompt[part], start, [6, 2, 0, 7, 1], [], targets[part], 0)])
        ours += [said.logprob for said in result.prompt_logprobs]
    rows = torch.arange(len(prompt))
    exact, theirs = (
        transformers_logprobs(tmp_path, [prompt], kind)[0][rows, targets]
        for kind in (torch.float32, getattr(torch, dtype))
    )
    error = (torch.tensor(ours) - exact).abs().mean()
    assert 0 < error < 1.3 * (theirs - exact).abs().mean()
