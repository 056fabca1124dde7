"""The lowest logit that min-p, top-k and top-p keep, found by bisection instead of a sort.

A float's bits, with those of negative numbers turned round, are integers in the order of the floats. So the
k-th largest logit is the largest number that at least k logits reach, and the border of a nucleus the largest
number whose logits have together the mass wanted: both are found in one bisection over those integers, after
16 questions for bfloat16 and 32 for float32. Questions are cheap because few logits matter: the largest
logit and the mass of every run of 128 tokens are known, and bound the answer from below; the logits above the
bound are gathered once, and bisected in registers. A vocabulary too flat for that is bisected in memory until
what is left fits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

STEP_SHIFT = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
"""Low bits of a float32 that are the same for every number of the dtype, and need no bisection."""


def lowest_kept_reference(
    scores: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """The lowest score each row keeps, float32 `[draws]`, for float32 `scores` `[draws, vocab]`: no NaN or
    +inf among them, and a finite one.

    The parameters are `[draws]` as `draw_tokens` takes them, every temperature above zero. Filters follow
    each other: min-p, top-k (Fan et al., 2018), top-p (Holtzman et al., 2019); tokens that tie with the k-th
    are kept, but only k tokens count in the sums of top-p.
    """
    vocab = scores.shape[-1]
    ranked = scores.sort(dim=-1, descending=True).values
    wide = ranked.double()
    best = wide[:, :1].clamp(min=torch.finfo(torch.float32).min)
    scaled = (wide - best) / temperature.double()[:, None]
    above_min_p = (scaled >= min_p.double()[:, None].log()).sum(dim=-1, keepdim=True)
    lowest = ranked.gather(1, above_min_p.clamp(min=1) - 1)
    counted = torch.where(top_k > 0, top_k.clamp(max=vocab), vocab).long()[:, None]
    lowest = torch.maximum(lowest, ranked.gather(1, counted - 1))

    rank = torch.arange(vocab, device=scores.device)[None, :]
    weights = scaled.exp().masked_fill((ranked < lowest) | (rank >= counted), 0.0)
    cumulative = weights.cumsum(dim=-1)
    nucleus = top_p.double()[:, None]
    reached = ((cumulative - weights) < nucleus * cumulative[:, -1:]) & (weights > 0)
    border = ranked.gather(1, reached.sum(dim=-1, keepdim=True).clamp(min=1) - 1)
    return torch.where(nucleus < 1, torch.maximum(lowest, border), lowest)[:, 0]


@triton.jit
def scores_at(row_ptr, column, mask):
    """Logits in float32; what the mask leaves out is -inf."""
    return tl.load(row_ptr + column, mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def list_runs(is_listed, run, list_ptr):
    """Writes the numbers of the runs listed, in order, and returns how many there are."""
    tl.debug_barrier()  # the list before this one has been read
    tl.store(list_ptr + tl.cumsum(is_listed.to(tl.int32), 0) - 1, run, mask=is_listed)
    tl.debug_barrier()
    return tl.sum(is_listed.to(tl.int32), 0)


@triton.jit
def listed_scores(row_ptr, vocab, list_ptr, first, count, RUN: tl.constexpr, TILE: tl.constexpr):
    """The runs `[TILE]` at `first` of a list (-1 beyond its end), their scores and whether each is a token's,
    both `[TILE, RUN]`."""
    at = first + tl.arange(0, TILE)
    run = tl.load(list_ptr + at, mask=at < count, other=-1)
    column = run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    is_token = (run >= 0)[:, None] & (column < vocab)
    return run, scores_at(row_ptr, column, is_token), is_token


@triton.jit
def _step(value, SHIFT: tl.constexpr):
    """The place of a float32 among all numbers of a dtype, int64; between two of them, the one below it if
    it is positive, and the one above it if not."""
    bits = value.to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT).to(tl.int64)


@triton.jit
def _value(step, SHIFT: tl.constexpr):
    """The float32 at a place."""
    ordered = tl.where(step < 0, (step << SHIFT) | ((1 << SHIFT) - 1), step << SHIFT).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _above(row_ptr, vocab, list_ptr, count, pivot, best, scale, RUN: tl.constexpr, TILE: tl.constexpr):
    """How many tokens of the listed runs reach the pivot (int32), and their mass (float32)."""
    tokens = tl.zeros([TILE], dtype=tl.int32)
    mass = tl.zeros([TILE], dtype=tl.float32)
    for first in range(0, count, TILE):
        _, score, is_token = listed_scores(row_ptr, vocab, list_ptr, first, count, RUN, TILE)
        is_above = (score >= pivot) & is_token
        tokens += tl.sum(is_above.to(tl.int32), 1)
        mass += tl.sum(tl.where(is_above, tl.exp2((score - best) * scale), 0.0), 1)
    return tl.sum(tokens, 0), tl.sum(mass, 0)


@triton.jit
def _gather(
    row_ptr, vocab, list_ptr, count, low, ceiling, found_ptr,
    RUN: tl.constexpr, TILE: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Copies the scores from low to below the ceiling to `found_ptr`, and returns how many there are; if that
    is more than CANDIDATES, only that it is more."""
    tl.debug_barrier()  # those gathered before have been read
    found = tl.zeros([], dtype=tl.int32)
    first = tl.zeros([], dtype=tl.int32)
    while (first < count) & (found <= CANDIDATES):
        _, score, is_token = listed_scores(row_ptr, vocab, list_ptr, first, count, RUN, TILE)
        wanted = ((score >= low) & (score < ceiling) & is_token).to(tl.int32)
        in_run = tl.sum(wanted, 1)
        before = found + tl.cumsum(in_run, 0) - in_run
        place = before[:, None] + tl.cumsum(wanted, 1) - 1
        tl.store(found_ptr + place, score, mask=(wanted > 0) & (place < CANDIDATES))
        found += tl.sum(in_run, 0)
        first += TILE
    tl.debug_barrier()
    return found


@triton.jit
def _search(
    row_ptr, vocab, list_ptr, count, found_ptr, low, high, target, best, scale,
    BY_MASS: tl.constexpr, SHIFT: tl.constexpr,
    RUN: tl.constexpr, TILE: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """The highest step in low..high whose tokens number or weigh (`BY_MASS`) at least `target`; low, if none.
    All tokens that reach low lie in the runs listed, and none lies above high."""
    every = _gather(
        row_ptr, vocab, list_ptr, count, _value(low, SHIFT), _value(high + 1, SHIFT), found_ptr,
        RUN, TILE, CANDIDATES,
    )  # fmt: skip
    within = every
    reach_low = tl.where(every > CANDIDATES, 1 << 30, every)  # tokens that reach low: not counted if too many
    above_high = tl.zeros([], dtype=tl.int32)  # tokens above high
    amount_above = tl.zeros([], dtype=tl.float32)  # their number or mass
    turn = tl.zeros([], dtype=tl.int32)
    while (within > CANDIDATES) & (low < high):
        # halving the numbers is quick for the usual distribution, and halving the steps for every other one
        halfway = 0.5 * _value(low, SHIFT) + 0.5 * _value(high, SHIFT)
        by_value = tl.minimum(tl.maximum(_step(halfway, SHIFT), low + 1), high)
        middle = tl.where(turn % 2 == 0, by_value, low + ((high - low + 1) >> 1))
        tokens, mass = _above(
            row_ptr, vocab, list_ptr, count, _value(middle, SHIFT), best, scale, RUN, 4 * TILE
        )
        amount = mass if BY_MASS else tokens.to(tl.float32)
        reached = amount >= target
        low = tl.where(reached, middle, low)
        reach_low = tl.where(reached, tokens, reach_low)
        high = tl.where(reached, high, middle - 1)
        above_high = tl.where(reached, above_high, tokens)
        amount_above = tl.where(reached, amount_above, amount)
        within = reach_low - above_high
        turn += 1
    if low < high:
        if every > CANDIDATES:
            # below the next number rather than up to this one: zero has two numbers
            within = _gather(
                row_ptr, vocab, list_ptr, count, _value(low, SHIFT), _value(high + 1, SHIFT), found_ptr,
                RUN, TILE, CANDIDATES,
            )  # fmt: skip
        place = tl.arange(0, CANDIDATES)
        score = tl.load(found_ptr + place, mask=place < within, other=float("-inf"))
        weight = tl.exp2((score - best) * scale) if BY_MASS else tl.full([CANDIDATES], 1.0, tl.float32)
        while low < high:
            middle = low + ((high - low + 1) >> 1)
            amount = amount_above + tl.sum(tl.where(score >= _value(middle, SHIFT), weight, 0.0), 0)
            reached = amount >= target
            low = tl.where(reached, middle, low)
            high = tl.where(reached, high, middle - 1)
    return low


@triton.jit
def lowest_kept(
    row_ptr, vocab, maxima_ptr, masses_ptr, list_ptr, found_ptr,
    best, scale, temperature, top_k, top_p, min_p,
    SHIFT: tl.constexpr, RUNS: tl.constexpr,
    RUN: tl.constexpr, TILE: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """The lowest score that one draw keeps, float32; -inf if it keeps all.

    `maxima_ptr` has the largest score of each run of RUN tokens, `masses_ptr` the run's mass where that score
    weighs 1; `best` is the largest of all, and in here a score weighs exp2((score - best) * scale).
    """
    run = tl.arange(0, RUNS)
    runs = tl.cdiv(vocab, RUN)
    is_run = run < runs
    low = tl.full([], -2139095041 >> SHIFT, tl.int64)  # the step of -inf
    high = _step(best, SHIFT)

    if min_p > 0:
        border = best.to(tl.float64) + temperature.to(tl.float64) * tl.log(min_p.to(tl.float64))
        low = tl.maximum(low, _step(border.to(tl.float32), SHIFT))
        low = tl.minimum(tl.where(_value(low, SHIFT).to(tl.float64) < border, low + 1, low), high)

    if (top_k > 0) & (top_k < vocab):
        bound = low
        maximum = tl.load(maxima_ptr + run, mask=is_run, other=float("-inf"))
        if top_k <= runs:  # k runs with a token each that reaches a number: k tokens reach it
            top = high
            while bound < top:
                middle = bound + ((top - bound + 1) >> 1)
                reached = tl.sum((maximum >= _value(middle, SHIFT)).to(tl.int32), 0) >= top_k
                bound = tl.where(reached, middle, bound)
                top = tl.where(reached, top, middle - 1)
        count = list_runs(is_run & (maximum >= _value(bound, SHIFT)), run, list_ptr)
        low = _search(
            row_ptr, vocab, list_ptr, count, found_ptr, bound, high, top_k.to(tl.float32), best, scale,
            False, SHIFT, RUN, TILE, CANDIDATES,
        )  # fmt: skip

    if top_p < 1:
        bound = low
        maximum = tl.load(maxima_ptr + run, mask=is_run, other=float("-inf"))
        relative = tl.exp2((maximum - best) * scale)
        mass = tl.load(masses_ptr + run, mask=is_run, other=0.0) * relative
        total = tl.sum(mass, 0)
        if (top_k > 0) | (min_p > 0):
            count = list_runs(is_run & (maximum >= _value(low, SHIFT)), run, list_ptr)
            lowest = _value(low, SHIFT)
            tokens, total = _above(row_ptr, vocab, list_ptr, count, lowest, best, scale, RUN, 4 * TILE)
            if (top_k > 0) & (tokens > top_k):  # of those that tie with the k-th, not all count
                higher = _value(low + 1, SHIFT)
                tokens, total = _above(row_ptr, vocab, list_ptr, count, higher, best, scale, RUN, 4 * TILE)
                total += (top_k - tokens).to(tl.float32) * tl.exp2((lowest - best) * scale)
        else:
            # the lowest weight, 2**-exponent, below which lies no more than what is cut off, whatever is in
            # a run: all of it if its largest score weighs less, else at most all but that score
            cut = (1 - top_p) * total * 0.999
            rest = tl.maximum(mass - relative, 0.0) + mass * 1e-6
            exponent = 0.0
            stride = 64.0
            for _ in range(12):
                weight = tl.exp2(-(exponent + stride))
                below = tl.where(relative >= weight, tl.minimum(rest, RUN * weight), mass)
                exponent = tl.where(tl.sum(below, 0) > cut, exponent + stride, exponent)
                stride *= 0.5
            exponent += 2 * stride + 0.001
            bound = tl.maximum(bound, _step(best - exponent / scale, SHIFT) - 1)
            count = list_runs(is_run & (maximum >= _value(bound, SHIFT)), run, list_ptr)
        low = _search(
            row_ptr, vocab, list_ptr, count, found_ptr, bound, high, top_p * total, best, scale,
            True, SHIFT, RUN, TILE, CANDIDATES,
        )  # fmt: skip
    return _value(low, SHIFT)
