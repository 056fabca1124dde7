"""The sampler against transformers' logits processors, and against what a distribution must be."""

import math
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from services.engine.batch import SampledToken, SampleSpec
from services.engine.sampling.counter_rng import uniform
from services.engine.sampling.sampler import sample as queue_samples
from services.protocol.messages import Sampling

VOCAB = 50
PINNED = (0.9916666521754735, 0.9038570129467763)
"""uniform(0, 0, 0) and uniform(2**63 - 1, 127, 2**31)."""


def _logits(rows: int = 1, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def _draw(
    position: int = 9, choice: int = 0, prompt: Any = (1, 2, 3), output: Any = (), **settings: Any
) -> SampleSpec:
    values = {"max_tokens": 1, "seed": 1} | settings
    return SampleSpec(choice, position, Sampling(**values), list(prompt), list(output))


def sample(logits: torch.Tensor, rows: list[int], samples: list[SampleSpec]) -> list[SampledToken]:
    return queue_samples(logits, rows, samples).collect()


def _tokens(logits: torch.Tensor, samples: list[SampleSpec]) -> list[int]:
    rows = list(range(len(samples))) if logits.shape[0] > 1 else [0] * len(samples)
    return [sampled.token for sampled in sample(logits, rows, samples)]


def _frequencies(logits: torch.Tensor, count: int = 8000, **settings: Any) -> torch.Tensor:
    tokens = _tokens(logits, [_draw(position, **settings) for position in range(count)])
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1]).double()


def _assert_distributed(counts: torch.Tensor, expected: torch.Tensor) -> None:
    """Nothing outside the support, and chi-square within five standard deviations of its mean inside."""
    assert counts[expected == 0].sum() == 0
    expected = expected / expected.sum() * counts.sum()
    inside = expected > 5
    chi_square = float(((counts - expected)[inside] ** 2 / expected[inside]).sum())
    freedom = max(1, int(inside.sum()) - 1)
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("settings", "processors"),
    [
        ({}, []),
        ({"temperature": 0.6}, [TemperatureLogitsWarper(0.6)]),
        ({"temperature": 1.7}, [TemperatureLogitsWarper(1.7)]),
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"top_k": 500}, []),
        ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        ({"top_p": 0.05}, [TopPLogitsWarper(0.05)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        ({"top_k": 12, "top_p": 0.7}, [TopKLogitsWarper(12), TopPLogitsWarper(0.7)]),
        (
            {"temperature": 1.3, "min_p": 0.05, "top_k": 12, "top_p": 0.85},
            [
                TemperatureLogitsWarper(1.3),
                MinPLogitsWarper(0.05),
                TopKLogitsWarper(12),
                TopPLogitsWarper(0.85),
            ],
        ),
        ({"repetition_penalty": 1.5}, [RepetitionPenaltyLogitsProcessor(1.5)]),
        ({"repetition_penalty": 0.7}, [RepetitionPenaltyLogitsProcessor(0.7)]),
    ],
)
def test_distribution_equals_transformers(settings: dict[str, Any], processors: list[Any]) -> None:
    logits = _logits()
    seen = list(range(0, VOCAB, 3))
    processed = LogitsProcessorList(processors)(torch.tensor([seen]), logits.clone())[0]
    counts = _frequencies(logits, prompt=seen[:8], output=seen[8:], **settings)
    _assert_distributed(counts, processed.double().softmax(-1))


def test_repetition_penalty_matches_transformers_exactly() -> None:
    """Which token wins among the close ones depends on every penalised score."""
    for seed in range(60):
        logits = _logits(seed=seed)
        seen = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed))[:25].tolist()
        expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([seen]), logits.clone()).argmax()
        draw = _draw(temperature=0.0, repetition_penalty=1.3, prompt=seen[:10], output=seen[10:])
        assert _tokens(logits, [draw]) == [int(expected)]


def test_presence_and_frequency_look_at_the_output_only() -> None:
    logits = torch.zeros(1, 4)
    logits[0] = torch.tensor([4.0, 3.0, 2.0, 1.0])

    def best(output: list[int], **settings: Any) -> int:
        return _tokens(logits, [_draw(temperature=0.0, prompt=[0, 0, 0], output=output, **settings)])[0]

    assert best([], presence_penalty=2.0, frequency_penalty=2.0) == 0
    assert best([0], presence_penalty=1.5) == 1
    assert best([0, 0, 0], presence_penalty=0.9) == 0  # presence counts once, however often
    assert best([0, 0, 0], frequency_penalty=0.9) == 1  # frequency counts each time
    assert best([0, 1, 1], frequency_penalty=1.1, presence_penalty=0.5) == 0
    assert best([3], presence_penalty=-9.0) == 3


def test_logit_bias() -> None:
    logits = _logits()
    least = int(logits.argmin())
    assert _tokens(logits, [_draw(temperature=0.0, logit_bias={least: 100.0})]) == [least]
    likeliest = int(logits.argmax())
    banned = _frequencies(logits, count=2000, logit_bias={likeliest: -100.0})
    assert banned[likeliest] == 0
    assert banned.sum() == 2000


def test_a_draw_does_not_depend_on_its_batch() -> None:
    logits = _logits(rows=6, vocab=500)
    logits[:, 100:110] = logits[:, :10]  # ties, which a sort might order differently
    samples = [
        _draw(temperature=0.0),
        _draw(position=3, top_k=10),
        _draw(position=4, top_p=0.9, top_k=40, seed=5),
        _draw(position=4, min_p=0.2, choice=2),
        _draw(position=8, temperature=0.4, repetition_penalty=1.2),
        _draw(position=8, top_p=0.3, logprobs=3),
    ]
    together = sample(logits, list(range(6)), samples)
    for at, draw in enumerate(samples):
        (alone,) = sample(logits[at : at + 1], [0], [draw])
        assert alone.token == together[at].token
        assert (alone.logprob is None) == (draw.sampling.logprobs is None)
    reverse = sample(logits, list(range(5, -1, -1)), samples[::-1])
    assert [sampled.token for sampled in reverse[::-1]] == [sampled.token for sampled in together]


def test_seed_choice_and_position_each_change_the_draw() -> None:
    logits = torch.zeros(1, 5000)
    base = {"seed": 7, "choice": 1, "position": 20}
    sampled = {_tokens(logits, [_draw(**(base | change))])[0] for change in ({}, {"seed": 8}, {"choice": 2})}
    sampled.add(_tokens(logits, [_draw(**(base | {"position": 21}))])[0])
    assert len(sampled) == 4
    assert _tokens(logits, [_draw(**base)]) == _tokens(logits, [_draw(**base)])


def test_uniform_is_uniform_and_pinned() -> None:
    """Pinned: workers of different builds must draw the same numbers."""
    values = torch.tensor([uniform(3, 0, position) for position in range(20_000)], dtype=torch.float64)
    assert values.min() >= 0
    assert values.max() < 1
    counts = torch.histc(values, bins=20, min=0, max=1)
    _assert_distributed(counts, torch.ones(20, dtype=torch.float64))
    assert uniform(0, 0, 0) == pytest.approx(PINNED[0], abs=1e-15)
    assert uniform(2**63 - 1, 127, 2**31) == pytest.approx(PINNED[1], abs=1e-15)


def test_edge_settings() -> None:
    logits = _logits()
    best = int(logits.argmax())
    for settings in (
        {"top_k": 1},
        {"top_p": 1e-9},
        {"min_p": 1.0},
        {"temperature": 1e-30},
        {"temperature": 1e-300},
        {"top_k": 1, "top_p": 0.5, "min_p": 0.5, "temperature": 100.0},
    ):
        assert set(_tokens(logits, [_draw(position, **settings) for position in range(50)])) == {best}, (
            settings
        )


def test_tokens_that_tie_with_the_last_kept_one_are_kept() -> None:
    logits = torch.tensor([[1.0, 3.0, 1.0, 1.0, -9.0]])
    counts = _frequencies(logits, count=3000, top_k=2)
    assert (counts[:4] > 0).all()
    assert counts[4] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_those_of_the_raw_logits(dtype: torch.dtype) -> None:
    logits = _logits(rows=2).to(dtype)
    expected = logits.float().log_softmax(-1)
    samples = [
        _draw(temperature=0.3, repetition_penalty=1.9, top_k=3, logit_bias={4: 50.0}, logprobs=5),
        _draw(temperature=0.0, logprobs=0),
    ]
    first, second = sample(logits, [0, 1], samples)
    assert first.token == 4
    assert first.logprob is not None
    assert first.logprob.logprob == pytest.approx(float(expected[0, 4]), abs=1e-6)
    values, tokens = expected[0].topk(5)
    assert [top.logprob for top in first.logprob.top] == pytest.approx(values.tolist(), abs=1e-6)
    if dtype == torch.float32:
        assert [top.token for top in first.logprob.top] == tokens.tolist()
    assert second.logprob is not None
    assert second.logprob.top == []
    assert second.logprob.logprob == pytest.approx(float(expected[1].max()), abs=1e-6)


def test_several_choices_share_a_row() -> None:
    logits = _logits(vocab=5000) * 0
    tokens = _tokens(logits, [_draw(choice=choice) for choice in range(8)])
    assert len(set(tokens)) > 6


def test_rounding_cannot_leave_the_support(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest possible random number, with the kept tokens first and last in the vocabulary."""
    monkeypatch.setattr("services.engine.sampling.sampler.uniform", lambda *key: 1 - 2.0**-53)
    for row, expected in (
        (torch.tensor([[5.0, 5.0, -50.0, -50.0]]), 1),
        (torch.tensor([[-50.0, 5.0, 5.0, 5.0]]), 3),
    ):
        assert _tokens(row, [_draw(top_p=0.99)]) == [expected]
    monkeypatch.setattr("services.engine.sampling.sampler.uniform", lambda *key: 0.0)
    assert _tokens(torch.tensor([[-50.0, -50.0, 5.0, 5.0]]), [_draw(top_p=0.99)]) == [2]
