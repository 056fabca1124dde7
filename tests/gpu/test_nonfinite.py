"""NaN and infinity from the model on a GPU, found by the kernels: in graphs, and in steps without."""

from pathlib import Path

import pytest
import torch

from services.engine.batch import Row, SampleSpec
from services.engine.sampling.sample_kernels import NO_TOKEN
from services.protocol.messages import Sampling
from tests.checkpoints import make_checkpoint
from tests.engine import test_nonfinite as nonfinite
from tests.engine.harness import start_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("check", [nonfinite.check_a_decoded_token, nonfinite.check_overflowing_values])
def test_in_a_decode_step(check: object, dtype: str, graphs: bool, tmp_path: Path) -> None:
    make_checkpoint("qwen3", tmp_path, seed=3, eos=False)
    engine = start_engine(tmp_path, device="cuda", dtype=dtype)
    if graphs:
        engine.capture_graphs()
    check(engine)  # type: ignore[operator]


@pytest.mark.parametrize("quantization", ["none", "fp8"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("place", [0, 30, 69])
def test_in_a_prompt(place: int, temperature: float, quantization: str, tmp_path: Path) -> None:
    """Wherever it is, long before the last token too; fp8 makes its numbers from each token's largest."""
    make_checkpoint("qwen3", tmp_path, seed=3, eos=False)
    engine = start_engine(tmp_path, device="cuda", dtype="bfloat16", quantization=quantization)
    prompt = nonfinite.clean(70)
    sampling = Sampling(max_tokens=1, seed=1, temperature=temperature, logprobs=2)
    row = Row(prompt, 0, list(range(20)), [SampleSpec(0, 70, sampling, prompt, [])])
    (sound,) = engine.execute([row])
    assert sound.nonfinite_at is None
    prompt[place] = nonfinite.BAD
    beside = Row(nonfinite.clean(9), 0, [40, 41, 42], [SampleSpec(0, 9, sampling, [], [])])
    with torch.inference_mode():
        engine.decoder.embedding[nonfinite.BAD] = torch.nan
    result, neighbour = engine.execute([row, beside])
    assert (result.nonfinite_at, neighbour.nonfinite_at) == (place, None)
    assert (result.sampled[0].token == NO_TOKEN) == (place == 69)
    assert neighbour.sampled[0].token >= 0
    assert bool(engine.pool.data.isfinite().all())
