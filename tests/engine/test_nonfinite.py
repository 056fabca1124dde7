"""NaN and infinity from the model: the row that has them says where they begin, and no other row changes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from services.engine.batch import Row, SampleSpec
from services.engine.engine import Engine
from services.engine.sampling.sample_kernels import NO_TOKEN
from services.protocol.messages import Sampling
from tests.checkpoints import make_checkpoint
from tests.engine.harness import GREEDY, Sequence, prompt_of, run_ahead, run_together, start_engine
from tests.engine.test_ranks import two_ranks

BAD = 7
"""The token whose embedding is NaN."""
SAMPLED = Sampling(max_tokens=1, seed=11, temperature=0.9, top_p=0.95)
PENALISED = Sampling(max_tokens=1, seed=12, temperature=1.1, repetition_penalty=1.2, logit_bias={3: -100.0})
LOGPROBS = Sampling(max_tokens=1, seed=1, temperature=0.0, logprobs=3)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("nonfinite") / "tiny", seed=3, eos=False)


@pytest.fixture
def engine(model_dir: Path) -> Engine:
    return start_engine(model_dir)


def clean(length: int, seed: int = 0) -> list[int]:
    return [token if token != BAD else BAD + 1 for token in prompt_of(length, seed)]


def draw(sampling: Sampling, position: int, prompt: list[int]) -> SampleSpec:
    return SampleSpec(0, position, sampling, prompt, [])


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, PENALISED, LOGPROBS])
@pytest.mark.parametrize("place", [0, 5, 11])
def test_a_token_of_the_prompt(engine: Engine, sampling: Sampling, place: int) -> None:
    """Also where only later tokens are asked for: their numbers show nothing, since the pool keeps no NaN."""
    with torch.inference_mode():
        engine.decoder.embedding[BAD] = torch.nan
    prompt = clean(12)
    prompt[place] = BAD
    first = Row(prompt[:8], 0, [0, 1, 2])
    rest = Row(prompt[8:], 8, [0, 1, 2], [draw(sampling, 12, prompt)])
    neighbour = Sequence(clean(9, 1), [10, 11, 12], sampling)
    found = [engine.execute([first])[0], engine.execute([rest, neighbour.next_row()])]
    marked = [found[0].nonfinite_at, found[1][0].nonfinite_at]  # type: ignore[attr-defined,index]
    assert marked == ([place, None] if place < 8 else [None, place])
    if place == 11:
        assert found[1][0].sampled[0].token == NO_TOKEN  # type: ignore[index]
    neighbour.take(found[1][1])  # type: ignore[index]
    alone = Sequence(clean(9, 1), [20, 21, 22], sampling)
    assert run_together(engine, [neighbour], 3) == run_together(engine, [alone], 3)
    assert bool(engine.pool.data.isfinite().all())


def neighbours() -> list[Sequence]:
    return [Sequence(clean(length, 1), list(range(length, length + 9))) for length in (9, 20)]


def test_a_decoded_token(engine: Engine) -> None:
    """The step queued behind it goes on from no token, in range; neighbours get what they got before."""
    check_a_decoded_token(engine)


def check_a_decoded_token(engine: Engine) -> None:
    wanted = run_ahead(engine, neighbours(), 6)
    forced = Sampling(max_tokens=1, seed=1, temperature=0.0, logit_bias={BAD: 1e6})
    with torch.inference_mode():
        engine.decoder.embedding[BAD] = torch.nan
    first, second = neighbours()
    bad = Sequence(clean(5), [40, 41, 42], forced)
    assert run_ahead(engine, [first, bad, second], 6)[::2] == wanted
    assert bad.output[:2] == [BAD, NO_TOKEN]
    assert bool(engine.pool.data.isfinite().all())


def check_overflowing_values(engine: Engine) -> None:
    """Values alone that are infinite, of one decoded token: its own logits are finite."""
    sequence = Sequence(clean(5), [40, 41, 42])
    sequence.take(engine.execute([sequence.next_row()])[0])
    with torch.inference_mode():
        weight: Any = engine.decoder.layers[-1].attention.qkv
        weight.weight[-1, 0] = torch.inf
    (first, result) = engine.execute([neighbours()[0].next_row(), sequence.next_row()])
    assert (first.nonfinite_at, result.nonfinite_at) == (0, 5)


def test_overflowing_values(engine: Engine) -> None:
    check_overflowing_values(engine)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "name", ["qkv", "value", "output", "gate_up", "down", "norm", "last_norm", "last_down", "head"]
)
def test_any_weight(engine: Engine, name: str, number: float) -> None:
    """Every place where such a number can come from, in the first layer or after the last: no token is
    sampled of it. `value`: the numbers of one head's values alone, which later tokens would read as large
    ones."""
    first, last = engine.decoder.layers[0], engine.decoder.layers[-1]
    part: Any = {
        "qkv": first.attention.qkv,
        "value": first.attention.qkv,
        "output": first.attention.output,
        "gate_up": first.mlp.gate_up,
        "down": first.mlp.down,
        "norm": first.mlp_norm,
        "last_down": last.mlp.down,
        "last_norm": engine.decoder.final_norm,
        "head": engine.decoder.output,
    }[name]
    weight = part if isinstance(part, torch.Tensor) else part.weight
    prompt = clean(12)
    with torch.inference_mode():
        if name == "head":
            weight[0] = number  # one number alone may make a -inf, which only says that a token is impossible
        else:
            weight.view(-1)[-1 if name == "value" else 0] = number
    (result,) = engine.execute([Row(prompt, 0, [0, 1, 2], [draw(GREEDY, 12, prompt)])])
    assert result.nonfinite_at is not None


def test_log_probabilities_of_the_prompt(engine: Engine) -> None:
    """Of the last layer's feed-forward no later token sees anything, so only these positions' logits do."""
    prompt = clean(12)
    prompt[4] = BAD
    with torch.inference_mode():
        engine.decoder.embedding[BAD] = 3e30  # its square is infinite where the norm is taken
        engine.decoder.output[BAD] = torch.nan
    row = Row(prompt, 0, [0, 1, 2], [draw(LOGPROBS, 12, prompt)], prompt[1:], 2)
    (result,) = engine.execute([row])
    assert result.nonfinite_at == 0
    assert result.sampled[0].token == NO_TOKEN


def test_a_rank_that_only_reads_of_it(tmp_path: Path) -> None:
    """Values of a head that the other rank has, in the last layer: rank 0 sees nothing of them itself."""
    from safetensors.torch import load_file, save_file

    made = make_checkpoint("qwen3", tmp_path / "tiny", seed=3, eos=False, kv_heads=4)
    path = made / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.self_attn.v_proj.weight"][-1, 0] = torch.inf
    save_file(weights, path, metadata={"format": "pt"})
    prompt = clean(12)
    with two_ranks(made, tmp_path) as engine:
        (result,) = engine.execute([Row(prompt, 0, [0, 1, 2])])
        assert result.nonfinite_at == 0
