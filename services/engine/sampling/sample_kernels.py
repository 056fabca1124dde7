"""Samples tokens from logits on the device: no sort, nothing read back by the host.

A first launch splits the vocabulary into runs of 128 tokens and finds each run's largest logit and its mass.
A second one, of one program a draw, finds the lowest logit that the filters keep (top_k_top_p_threshold.py),
measures again the runs in which something is kept, and inverts the distribution twice: over the runs, then
over the tokens of one run. Masses are added as integers, so their order cannot matter, and a draw depends on
nothing but its row and its parameters. CUDA tensors go to the kernels, others to the reference.

A NaN or +inf shows in the first launch, which reads every logit anyway: its run's largest logit is then
+inf, and the second launch draws no token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.launch_cache import cached_kernel, cdiv, next_power_of_2
from services.engine.sampling.top_k_top_p_threshold import (
    STEP_SHIFT,
    list_runs,
    listed_scores,
    lowest_kept,
    lowest_kept_reference,
    scores_at,
)

RUN = 128
MAX_VOCAB = 1 << 22
"""The largest vocabulary whose masses, in units of 2**-40 of the likeliest token's, add up in 63 bits."""
NO_TOKEN = -1
"""What is sampled from logits that are no distribution."""


def sample_tokens(
    logits: Tensor,
    rows: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    chance: Tensor,
    *,
    filtered: bool = True,
) -> Tensor:
    """One token for each draw: int64 `[draws]` on the logits' device, without waiting for it.

    `logits` are `[n, vocab]`, of any float dtype; -inf is a probability of zero. The rest is `[draws]` on
    their device: `rows` int32, the row each draw uses; `temperature` float32, 0 for the first of the largest
    logits; `top_k` int32, 0 for off; `top_p` float32 in [0, 1], 1 for off; `min_p` float32 in [0, 1], 0 for
    off; `chance` float32 or float64 in [0, 1). `filtered` false says that no draw has a filter on: top_k,
    top_p and min_p are then not read.

    Logits are divided by the temperature, then filtered by min-p, top-k and top-p in this order; tokens that
    tie with the last one kept are kept too. The token is the first, in the order of ids, whose cumulative
    probability exceeds the chance; one of weight zero is never sampled. A row with a NaN or +inf, or without
    a finite logit, gives NO_TOKEN.

    The kernels weigh tokens in float32, the reference in float64: where a chance lies within 1e-5 of the
    border of two tokens, or a nucleus' mass as close to top_p, they may differ by that token. On one device
    a draw is always the same, whatever the other draws are.
    """
    draw = sample_tokens_kernel if logits.is_cuda else sample_tokens_reference
    return draw(logits, rows, temperature, top_k, top_p, min_p, chance, filtered=filtered)


def best_tokens(logits: Tensor, rows: Tensor) -> Tensor:
    """`sample_tokens` at temperature 0: the first of the largest logits of `logits[rows]`, int64
    `[draws]`."""
    if logits.is_cuda:
        return best_tokens_kernel(logits, rows)
    scores = logits[rows.long()]
    best = scores.max(dim=-1)
    return best.indices.masked_fill(~best.values.isfinite(), NO_TOKEN)


def sample_tokens_reference(
    logits: Tensor,
    rows: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    chance: Tensor,
    *,
    filtered: bool = True,
) -> Tensor:
    """`sample_tokens` in float64, with a sort where there are filters."""
    scores = logits[rows.long()].float()
    finite = scores.amax(dim=-1).isfinite()  # the largest is NaN if any is
    scores = scores.masked_fill(~finite[:, None], 0.0)
    greedy = temperature == 0
    warm = torch.where(greedy, 1.0, temperature)
    # the best score moved to zero first: a tiny temperature must not overflow
    best = scores.double().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = ((scores.double() - best) / warm.double()[:, None]).exp()
    if filtered:
        lowest = lowest_kept_reference(scores, warm, top_k, top_p, min_p)
        weights = weights.masked_fill(scores < lowest[:, None], 0.0)
    cumulative = weights.cumsum(dim=-1)
    target = chance.double()[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True)
    # rounding must not carry past the last token with a weight
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    sampled = torch.where(greedy, scores.argmax(dim=-1), torch.minimum(tokens, last)[:, 0])
    return sampled.masked_fill(~finite, NO_TOKEN)


def sample_tokens_kernel(
    logits: Tensor,
    rows: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    chance: Tensor,
    *,
    filtered: bool = True,
    lowest: Tensor | None = None,
    candidates: int = 4096,
    tile_runs: int = 32,
    num_warps: int = 16,
) -> Tensor:
    """`sample_tokens` in two launches. Raises ValueError on what it cannot take.

    `lowest`, if given, is float32 `[draws]` and receives a number that exactly the kept logits reach (-inf:
    all are kept). `candidates` is how many logits a program bisects in registers, `tile_runs` how many runs
    it reads at once, both powers of two, and `num_warps` its size: they matter only with filters.
    """
    logits, runs = _checked(logits, rows)
    samples = rows.shape[0]
    parameters = (temperature, top_k, top_p, min_p) if filtered else (temperature,)
    for values, dtype in zip(parameters, (torch.float32, torch.int32, *[torch.float32] * 2), strict=False):
        if values.dtype != dtype or values.shape != (samples,) or not values.is_contiguous():
            raise ValueError(f"a parameter of {samples} samples is {tuple(values.shape)} {values.dtype}")
    if chance.dtype not in (torch.float32, torch.float64) or chance.shape != (samples,):
        raise ValueError(f"the chances of {samples} samples are {tuple(chance.shape)} {chance.dtype}")
    device = logits.device
    tokens = torch.empty(samples, dtype=torch.int64, device=device)
    if lowest is None:
        lowest = torch.empty(samples, dtype=torch.float32, device=device)
    if samples == 0:
        return tokens
    measures = _measured(logits, rows, temperature, runs)
    listed, found = tokens, tokens  # not touched without filters
    if filtered:
        listed = torch.empty((samples, runs), dtype=torch.int32, device=device)
        found = torch.empty((samples, candidates), dtype=torch.float32, device=device)
    _draw[(samples,)](
        logits, rows, temperature, top_k, top_p, min_p, chance, *measures, listed, found, lowest, tokens,
        logits.stride(0),
        logits.shape[1],
        FILTERED=filtered,
        SHIFT=STEP_SHIFT[logits.dtype],
        RUNS=next_power_of_2(runs),
        RUN=RUN,
        TILE=tile_runs,
        CANDIDATES=candidates,
        num_warps=num_warps if filtered else 8,
    )  # fmt: skip
    return tokens


def best_tokens_kernel(logits: Tensor, rows: Tensor) -> Tensor:
    """`best_tokens` in two launches. Raises ValueError on what it cannot take."""
    logits, runs = _checked(logits, rows)
    tokens = torch.empty(rows.shape[0], dtype=torch.int64, device=logits.device)
    if rows.shape[0] == 0:
        return tokens
    maxima, _ = _measured(logits, rows, None, runs)
    _best[(rows.shape[0],)](
        logits,
        rows,
        maxima,
        tokens,
        logits.stride(0),
        logits.shape[1],
        RUNS=next_power_of_2(runs),
        RUN=RUN,
        num_warps=4,
    )
    return tokens


def _checked(logits: Tensor, rows: Tensor) -> tuple[Tensor, int]:
    """The logits, dense along a row, and how many runs one has."""
    if logits.dtype not in STEP_SHIFT or logits.dim() != 2 or not 0 < logits.shape[1] <= MAX_VOCAB:
        raise ValueError(f"no tokens can be drawn from logits {tuple(logits.shape)} {logits.dtype}")
    if rows.dtype != torch.int32 or rows.dim() != 1 or not rows.is_contiguous():
        raise ValueError(f"rows must be int32, one a draw, and are {tuple(rows.shape)} {rows.dtype}")
    return logits if logits.stride(1) == 1 else logits.contiguous(), -(-logits.shape[1] // RUN)


def _measured(
    logits: Tensor, rows: Tensor, temperature: Tensor | None, runs: int, block_runs: int = 32
) -> tuple[Tensor, Tensor]:
    """Each run's largest logit, float32 `[draws, runs]`, +inf if there is a NaN; and with temperatures its
    mass, likewise."""
    samples = rows.shape[0]
    maxima = torch.empty((samples, runs), dtype=torch.float32, device=logits.device)
    masses = maxima if temperature is None else torch.empty_like(maxima)
    _measure[(samples, cdiv(runs, block_runs))](
        logits,
        rows,
        maxima if temperature is None else temperature,
        maxima,
        masses,
        logits.stride(0),
        logits.shape[1],
        WEIGH=temperature is not None,
        RUN=RUN,
        BLOCK_RUNS=block_runs,
        num_warps=4,
    )
    return maxima, masses


@triton.jit
def _scale(temperature):
    """What turns a difference of scores into the exponent of 2; a temperature above zero stays one."""
    return 1.4426950408889634 / tl.maximum(temperature, 1.0e-30)


@cached_kernel
@triton.jit
def _measure(
    logits_ptr, rows_ptr, temperature_ptr, maxima_ptr, masses_ptr, row_stride, vocab,
    WEIGH: tl.constexpr, RUN: tl.constexpr, BLOCK_RUNS: tl.constexpr,
):  # fmt: skip
    """A run's largest score, and the sum of its weights where that score weighs 1."""
    draw = tl.program_id(0).to(tl.int64)
    run = tl.program_id(1) * BLOCK_RUNS + tl.arange(0, BLOCK_RUNS)
    runs = tl.cdiv(vocab, RUN)
    row_ptr = logits_ptr + tl.load(rows_ptr + draw).to(tl.int64) * row_stride
    column = run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    score = scores_at(row_ptr, column, column < vocab)
    score = tl.where(score == score, score, float("inf"))
    maximum = tl.max(score, 1)
    tl.store(maxima_ptr + draw * runs + run, maximum, mask=run < runs)
    if WEIGH:
        scale = _scale(tl.load(temperature_ptr + draw))
        anchor = tl.maximum(maximum, -3.4e38)  # finite: the difference of two infinities is NaN
        mass = tl.sum(tl.exp2((score - anchor[:, None]) * scale), 1)
        tl.store(masses_ptr + draw * runs + run, mass, mask=run < runs)


@cached_kernel
@triton.jit
def _best(
    logits_ptr, rows_ptr, maxima_ptr, tokens_ptr, row_stride, vocab, RUNS: tl.constexpr, RUN: tl.constexpr
):  # fmt: skip
    draw = tl.program_id(0).to(tl.int64)
    run = tl.arange(0, RUNS)
    runs = tl.cdiv(vocab, RUN)
    row_ptr = logits_ptr + tl.load(rows_ptr + draw).to(tl.int64) * row_stride
    maximum = tl.load(maxima_ptr + draw * runs + run, mask=run < runs, other=float("-inf"))
    best = tl.max(maximum, 0)
    token = _first_best(row_ptr, vocab, run, maximum, best, RUNS, RUN)
    tl.store(tokens_ptr + draw, tl.where(tl.abs(best) < float("inf"), token, -1))


@triton.jit
def _first_best(row_ptr, vocab, run, maximum, best, RUNS: tl.constexpr, RUN: tl.constexpr):
    chosen = tl.min(tl.where(maximum == best, run, RUNS - 1), 0)
    column = chosen * RUN + tl.arange(0, RUN)
    score = scores_at(row_ptr, column, column < vocab)
    return tl.min(tl.where(score == best, column, chosen * RUN + RUN - 1), 0).to(tl.int64)


@triton.jit
def _units(weight):
    """A weight of at most 2**22 in units of 2**-40, int64: sums of these are exact, in whatever order."""
    return (weight.to(tl.float64) * 1099511627776.0).to(tl.int64)


@triton.jit
def _share(total, chance):
    """The unit, of `total` many, that a number in [0, 1) falls on."""
    return tl.minimum((total.to(tl.float64) * chance).to(tl.int64), total - 1)


@cached_kernel
@triton.jit
def _draw(
    logits_ptr, rows_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, chance_ptr,
    maxima_ptr, masses_ptr, list_ptr, found_ptr, lowest_ptr, tokens_ptr, row_stride, vocab,
    FILTERED: tl.constexpr, SHIFT: tl.constexpr, RUNS: tl.constexpr,
    RUN: tl.constexpr, TILE: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    draw = tl.program_id(0).to(tl.int64)
    run = tl.arange(0, RUNS)
    runs = tl.cdiv(vocab, RUN)
    is_run = run < runs
    row_ptr = logits_ptr + tl.load(rows_ptr + draw).to(tl.int64) * row_stride
    maxima_ptr += draw * runs
    masses_ptr += draw * runs
    temperature = tl.load(temperature_ptr + draw)
    maximum = tl.load(maxima_ptr + run, mask=is_run, other=float("-inf"))
    best = tl.max(maximum, 0)
    if tl.abs(best) == float("inf"):
        tl.store(tokens_ptr + draw, -1)
        tl.store(lowest_ptr + draw, best)
    elif temperature == 0:
        tl.store(tokens_ptr + draw, _first_best(row_ptr, vocab, run, maximum, best, RUNS, RUN))
        tl.store(lowest_ptr + draw, best)
    else:
        scale = _scale(temperature)
        best = tl.maximum(best, -3.4e38)
        lowest = tl.full([], float("-inf"), tl.float32)
        if FILTERED:
            list_ptr += draw * runs
            lowest = lowest_kept(
                row_ptr, vocab, maxima_ptr, masses_ptr, list_ptr, found_ptr + draw * CANDIDATES, best, scale,
                temperature, tl.load(top_k_ptr + draw), tl.load(top_p_ptr + draw), tl.load(min_p_ptr + draw),
                SHIFT, RUNS, RUN, TILE, CANDIDATES,
            )  # fmt: skip
            if lowest > float("-inf"):
                maximum = tl.load(maxima_ptr + run, mask=is_run, other=float("-inf"))
                count = list_runs(is_run & (maximum >= lowest), run, list_ptr)
                for first in range(0, count, TILE):
                    at, score, _ = listed_scores(row_ptr, vocab, list_ptr, first, count, RUN, TILE)
                    anchor = tl.load(maxima_ptr + at, mask=at >= 0, other=0.0)
                    weight = tl.exp2((score - anchor[:, None]) * scale)
                    kept = tl.sum(tl.where(score >= lowest, weight, 0.0), 1)
                    tl.store(masses_ptr + at, kept, mask=at >= 0)
                tl.debug_barrier()
        tl.store(lowest_ptr + draw, lowest)

        maximum = tl.load(maxima_ptr + run, mask=is_run, other=float("-inf"))
        mass = tl.load(masses_ptr + run, mask=is_run, other=0.0) * tl.exp2((maximum - best) * scale)
        units = _units(tl.where(maximum >= lowest, mass, 0.0))
        upto = tl.cumsum(units, 0)
        target = _share(tl.sum(units, 0), tl.load(chance_ptr + draw).to(tl.float64))
        chosen = tl.min(tl.where(upto > target, run, RUNS - 1), 0)
        own = tl.sum(tl.where(run == chosen, units, 0), 0)
        beyond = target - tl.sum(tl.where(run < chosen, units, 0), 0)

        column = chosen * RUN + tl.arange(0, RUN)
        score = scores_at(row_ptr, column, column < vocab)
        anchor = tl.maximum(tl.max(score, 0), -3.4e38)
        units = _units(tl.where(score >= lowest, tl.exp2((score - anchor) * scale), 0.0))
        upto = tl.cumsum(units, 0)
        target = _share(tl.sum(units, 0), beyond.to(tl.float64) / tl.maximum(own, 1).to(tl.float64))
        token = tl.min(tl.where(upto > target, column, chosen * RUN + RUN - 1), 0)
        tl.store(tokens_ptr + draw, token.to(tl.int64))
