"""Drawing tokens: the reference and, in Triton's interpreter, the kernels, held against the definition.

The checks serve the tests on a GPU too.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from services.engine.sampling.sample_kernels import (
    NO_TOKEN,
    best_tokens,
    best_tokens_kernel,
    sample_tokens,
    sample_tokens_kernel,
)
from services.engine.sampling.top_k_top_p_threshold import lowest_kept_reference
from tests.engine.interpreter import interpreted

CPU = torch.device("cpu")
CLOSE = 1e-5
LARGEST_CHANCE = 1 - 2.0**-53
SETTINGS: tuple[dict[str, float], ...] = (
    {},
    {"temperature": 0.0},
    {"temperature": 0.5},
    {"top_k": 1},
    {"top_k": 7, "temperature": 3.0},
    {"top_k": 50},
    {"top_k": 10**6},
    {"top_p": 0.9},
    {"top_p": 0.3, "temperature": 0.7},
    {"top_p": 0.999, "temperature": 2.0},
    {"top_p": 0.0},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"min_p": 1e-4, "temperature": 1.5},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 300, "top_p": 0.95, "temperature": 5.0},
    {"min_p": 0.02, "top_p": 0.7},
    {"min_p": 0.02, "top_k": 9},
    {"min_p": 0.001, "top_k": 40, "top_p": 0.9, "temperature": 1.3},
    {"temperature": 1e-30, "top_p": 0.5},
    {"temperature": 1e-30},
)


def columns(settings: list[dict[str, float]], device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """The parameters of one draw for each of the settings, which may name their chance."""

    def column(name: str, default: float, dtype: torch.dtype) -> Tensor:
        values = [setting.get(name, default) for setting in settings]
        return torch.tensor(values, dtype=torch.float64).to(dtype).to(device)

    chance = torch.rand(len(settings), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for at, setting in enumerate(settings):
        chance[at] = setting.get("chance", float(chance[at]))
    return {
        "temperature": column("temperature", 1.0, torch.float32),
        "top_k": column("top_k", 0, torch.int32),
        "top_p": column("top_p", 1.0, torch.float32),
        "min_p": column("min_p", 0.0, torch.float32),
        "chance": chance.to(device),
    }


def check_kept(
    row: Tensor, lowest: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """That exactly what reaches `lowest` is what the filters' definitions keep of float64 `row` `[vocab]`."""
    weights = ((row - row.max()) / temperature).exp()
    kept = weights >= min_p
    if min_p == 1.0:
        kept = row == row.max()
    if 0 < top_k < row.numel():
        kept &= row >= row.topk(top_k).values[-1]
    if top_p == 1:
        assert torch.equal(kept, row >= lowest)
        return
    assert not (~kept & (row >= lowest)).any()
    counted = weights[kept].sort(descending=True).values
    if top_k > 0:
        counted = counted[:top_k]
    total = counted.sum()
    assert (row >= lowest).any()
    assert weights[row > row[row >= lowest].min()].sum() <= (top_p + CLOSE) * total
    if not torch.equal(kept, row >= lowest):
        assert weights[row >= lowest].sum() >= (top_p - CLOSE) * total


def check_token(row: Tensor, token: int, lowest: float, temperature: float, chance: float) -> None:
    """That the token is the one in whose part of the distribution the chance falls."""
    weights = ((row - row.max()) / temperature).exp().masked_fill(row < lowest, 0.0)
    assert weights[token] > 0
    upto = weights.cumsum(0) / weights.sum()
    assert upto[token] >= chance - CLOSE
    assert upto[token] - weights[token] / weights.sum() <= chance + CLOSE


def check_samples(
    logits: Tensor, rows: list[int], settings: list[dict[str, float]], seed: int = 0, **tuning: Any
) -> None:
    """The kernels on the logits' device, if `tuning` is given, or else `sample_tokens`."""
    device = logits.device
    which = torch.tensor(rows, dtype=torch.int32, device=device)
    given = columns(settings, device, seed)
    clean = logits.float()[which.long()]
    names = ("temperature", "top_k", "top_p", "min_p")
    if tuning:
        lowest = torch.full((len(rows),), torch.nan, device=device)
        tokens = sample_tokens_kernel(logits, which, **given, lowest=lowest, **tuning)
    else:
        warm = given["temperature"].where(given["temperature"] > 0, 1.0)
        lowest = lowest_kept_reference(clean, warm, *(given[name] for name in names[1:]))
        tokens = sample_tokens(logits, which, **given)
    assert tokens.dtype == torch.int64
    assert tokens.device == device
    for at, (token, border) in enumerate(zip(tokens.tolist(), lowest.tolist(), strict=True)):
        row = clean[at].double()
        temperature, top_k, top_p, min_p = (given[name][at].item() for name in names)
        if temperature == 0:
            assert token == int(clean[at].argmax())
            continue
        check_kept(row, border, temperature, int(top_k), top_p, min_p)
        check_token(row, token, border, temperature, given["chance"][at].item())
    without = [at for at, setting in enumerate(settings) if not setting.keys() & {"top_k", "top_p", "min_p"}]
    if without:
        some = {name: values[without].contiguous() for name, values in given.items()}
        draw = sample_tokens_kernel if tuning else sample_tokens
        assert torch.equal(draw(logits, which[without].contiguous(), **some, filtered=False), tokens[without])


def check_independence(logits: Tensor, repeats: int = 1, **tuning: Any) -> None:
    """A draw is the same alone, in another order, and on a row of another batch."""
    device = logits.device
    settings = SETTINGS * repeats
    rows = torch.arange(len(settings), dtype=torch.int32, device=device) % logits.shape[0]
    given = columns(list(settings), device, seed=5)
    tokens = sample_tokens_kernel(logits, rows, **given, **tuning)
    order = torch.randperm(len(settings), generator=torch.Generator().manual_seed(1)).to(device)
    shuffled = {name: values[order] for name, values in given.items()}
    assert torch.equal(sample_tokens_kernel(logits, rows[order], **shuffled, **tuning), tokens[order])
    first = torch.zeros(1, dtype=torch.int32, device=device)
    for at in range(0, len(settings), 5):
        alone = {name: values[at : at + 1].clone() for name, values in given.items()}
        row = logits[int(rows[at])][None].clone()
        assert sample_tokens_kernel(row, first, **alone, **tuning).item() == tokens[at].item()


def check_best(logits: Tensor) -> None:
    rows = torch.arange(logits.shape[0] - 1, -1, -1, dtype=torch.int32, device=logits.device)
    expected = logits.flip(0).argmax(dim=-1)
    assert torch.equal(best_tokens_kernel(logits, rows), expected)
    assert torch.equal(best_tokens(logits, rows), expected)


def some_logits(
    rows: int, vocab: int, dtype: torch.dtype, device: torch.device = CPU, seed: int = 0
) -> Tensor:
    """Rows by turns flat, peaked, with few likely tokens, coarse (many ties), and partly forbidden."""
    values = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))
    values[1::5] *= 4
    values[2::5] = values[2::5] * 1.5 - 5
    values[2::5, 3 : vocab : vocab // 6] += 18
    values[3::5] = (values[3::5] * 3).round()
    values[4::5] = (values[4::5] * 2).masked_fill(values[4::5] < -0.5, -torch.inf)
    return values.to(dtype).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference(dtype: torch.dtype) -> None:
    logits = some_logits(5, 400, dtype)
    for row in range(5):
        check_samples(logits, [row] * len(SETTINGS), list(SETTINGS), seed=row)
    rows = torch.tensor([3, 0], dtype=torch.int32)
    assert torch.equal(best_tokens(logits, rows), logits[[3, 0]].argmax(dim=-1))


@pytest.mark.parametrize(
    ("setting", "processors"),
    [
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        (
            {"min_p": 0.02, "top_k": 12, "top_p": 0.85},
            [MinPLogitsWarper(0.02), TopKLogitsWarper(12), TopPLogitsWarper(0.85)],
        ),
    ],
)
def test_the_reference_keeps_what_transformers_keeps(
    setting: dict[str, float], processors: list[Any]
) -> None:
    logits = torch.randn(20, 300, generator=torch.Generator().manual_seed(3)) * 2
    given = columns([setting] * 20, CPU)
    del given["chance"]
    kept = logits >= lowest_kept_reference(logits, **given)[:, None]
    ids = torch.zeros((20, 1), dtype=torch.int64)
    assert torch.equal(kept, LogitsProcessorList(processors)(ids, logits.clone()).isfinite())


def check_ties(**tuning: Any) -> None:
    tied = torch.tensor([[1.0, 3.0, 1.0, 1.0, -9.0], [2.0, 2.0, 2.0, 2.0, 2.0], [0.0, -0.0, -3.0, 0.0, -1.0]])
    settings: list[dict[str, float]] = [
        {"top_k": 2, "chance": chance} for chance in (0.0, 0.93, LARGEST_CHANCE)
    ]
    settings += [{"top_k": 2, "top_p": 0.9}, {"top_k": 3, "top_p": 0.5}, {"top_p": 0.6}, {"min_p": 1.0}]
    for row in range(3):
        check_samples(tied.bfloat16(), [row] * len(settings), settings, **tuning)


def check_ends(**tuning: Any) -> None:
    """The smallest and the largest chance, with the kept tokens first and last in the vocabulary."""
    draw = sample_tokens_kernel if tuning else sample_tokens
    low, high = -50.0, 5.0
    logits = torch.tensor([[high, high, low, low], [low, high, high, high], [low, low, high, high]])
    rows = torch.tensor([0, 1, 2], dtype=torch.int32)
    ends: list[dict[str, float]] = [{"top_p": 0.99, "chance": chance} for chance in (LARGEST_CHANCE,) * 2]
    given = columns([*ends, {"top_p": 0.99, "chance": 0.0}], CPU)
    assert draw(logits, rows, **given, **tuning).tolist() == [1, 3, 2]
    given["chance"] = torch.tensor([1 - 2.0**-24, 1 - 2.0**-24, 0.0])  # the largest float32
    assert draw(logits, rows, **given, **tuning).tolist() == [1, 3, 2]

    given = columns([{"top_k": 3, "chance": 0.0}], CPU)
    late = torch.full((1, 300), low)
    late[0, 297:] = high  # nothing is kept in the first two runs
    assert draw(late, rows[:1], **given, **tuning).tolist() == [297]


def check_hostile(
    device: torch.device = CPU,
    settings: Sequence[dict[str, float]] = SETTINGS,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
    **tuning: Any,
) -> None:
    """A NaN, a +inf or no finite logit: no token, whatever the draw wants, and the other rows' tokens as they
    are without those rows. Without them, none that is forbidden."""
    draw = sample_tokens_kernel if tuning else sample_tokens
    best = best_tokens_kernel if tuning else best_tokens
    sound = torch.full((2, 290), -torch.inf)
    sound[0, 140:150] = torch.tensor([1.0, 2.0, -torch.inf, -torch.inf, 1.5] * 2)
    sound[1, 289] = -3e38
    hostile = torch.randn(9, 290, generator=torch.Generator().manual_seed(2))
    hostile[0] = -torch.inf
    hostile[1] = torch.nan
    hostile[2] = torch.inf
    for row, (place, number) in enumerate(
        [(0, torch.nan), (289, torch.nan), (130, torch.inf), (0, torch.inf), (5, -torch.nan)], 3
    ):
        hostile[row, place] = number
    hostile[8] = sound[0]
    hostile[8, 3] = torch.nan
    for dtype in dtypes:
        logits = torch.cat((hostile, sound)).to(dtype).to(device)
        every = torch.arange(11, dtype=torch.int32, device=device)
        assert best(logits, every).tolist() == [NO_TOKEN] * 9 + [141, 289]
        for at, setting in enumerate(settings):
            given = columns([setting] * 11, device, at)
            tokens = draw(logits, every, **given, **tuning)
            assert tokens[:9].tolist() == [NO_TOKEN] * 9
            assert tokens[9].item() in {140, 141, 144, 145, 146, 149} and tokens[10].item() == 289
            alone = {name: values[9:].clone() for name, values in given.items()}
            assert torch.equal(draw(logits[9:].clone(), every[:2], **alone, **tuning), tokens[9:])
        without = columns([{}] * 11, device)
        assert draw(logits, every, **without, **tuning, filtered=False)[:9].tolist() == [NO_TOKEN] * 9


def test_ties_ends_and_hostile_logits_of_the_reference() -> None:
    check_ties()
    check_ends()
    check_hostile()


@interpreted
def test_ties_ends_and_hostile_logits() -> None:
    check_ties(candidates=2, tile_runs=1)
    neighbours = (256 + 2 * torch.arange(40.0)[None]).bfloat16()  # nothing lies between two of them
    check_samples(neighbours, [0], [{"top_k": 5, "temperature": 50.0}], candidates=1)
    check_ends(candidates=64)


@interpreted
def test_no_token_is_drawn_from_what_is_no_distribution() -> None:
    settings: list[dict[str, float]] = [{"temperature": 0.0}, {"top_k": 7, "top_p": 0.9}]
    check_hostile(CPU, settings, [torch.bfloat16], candidates=64, tile_runs=2)


@interpreted
@pytest.mark.parametrize(
    ("dtype", "candidates", "tile_runs", "first"),
    [
        (torch.float32, 1024, 8, 0),
        (torch.float32, 16, 2, 1),
        (torch.bfloat16, 16, 4, 2),
        (torch.float16, 32, 4, 3),
    ],
)
def test_the_kernels(dtype: torch.dtype, candidates: int, tile_runs: int, first: int) -> None:
    """With few candidates most draws begin their bisection in memory."""
    logits = some_logits(5, 1000, dtype)
    rows = [(first + at) % 5 for at in range(len(SETTINGS))]
    check_samples(logits, rows, list(SETTINGS), first, candidates=candidates, tile_runs=tile_runs)
    check_best(logits)


@interpreted
def test_a_draw_depends_on_its_row_alone() -> None:
    check_independence(some_logits(5, 700, torch.bfloat16), candidates=64, tile_runs=4)


@interpreted
def test_a_view_of_logits() -> None:
    wide = some_logits(5, 600, torch.float32)
    check_samples(wide[1:, 7:400], [2, 0, 2], [{"top_k": 3}, {"top_p": 0.5}, {}], candidates=64)
    check_samples(wide.T.contiguous().T, [1, 4], [{"top_k": 3}, {"top_p": 0.5}], candidates=64)


def test_what_cannot_be_drawn_is_refused() -> None:
    logits, rows = torch.zeros((2, 8)), torch.zeros(2, dtype=torch.int32)
    given = columns([{}, {}], CPU)
    for wrong in (
        {"logits": logits.double()},
        {"logits": logits[0]},
        {"rows": rows.long()},
        {"temperature": given["temperature"][:1]},
        {"top_k": given["top_k"].long()},
        {"chance": given["chance"].half()},
    ):
        with pytest.raises(ValueError, match=r"."):
            sample_tokens_kernel(**({"logits": logits, "rows": rows} | given | wrong))
