"""Draws tokens from logits, one draw independent of every other.

Order, as in vLLM: logit bias, penalties, temperature, then the filters min-p, top-k, top-p. All filters are
thresholds on the logit, so tokens that tie with the last one kept are kept too, and no sort order can leak
from the batch into a draw. A draw then takes its one random number and inverts the distribution's sum.
"""

import torch
from torch import Tensor

from services.engine.batch import Draw, Drawn
from services.engine.uniform import uniform
from services.messages import Sampling, TokenLogprob, TopLogprob

MAX_DRAW_ELEMENTS = 8 << 20
"""Scores that one vectorised draw works on, in float64, about five times over."""


def sample(logits: Tensor, rows: list[int], draws: list[Draw]) -> list[Drawn]:
    """One token for each of `draws`, from row `rows[i]` of `logits` `[rows, vocab]` (any float dtype).

    Log probabilities are those of the logits as the model gave them: before bias, penalties, temperature.
    """
    if not draws:
        return []
    tokens = _choose(logits, rows, draws)
    drawn = [Drawn(token) for token in tokens]
    wanted = [at for at, draw in enumerate(draws) if draw.sampling.logprobs is not None]
    if wanted:
        tops = [draws[at].sampling.logprobs or 0 for at in wanted]
        chosen = logits[[rows[at] for at in wanted]]
        for at, logprob in zip(
            wanted, token_logprobs(chosen, [tokens[at] for at in wanted], tops), strict=True
        ):
            drawn[at].logprob = logprob
    return drawn


def token_logprobs(logits: Tensor, tokens: list[int], tops: list[int]) -> list[TokenLogprob]:
    """Log probability of `tokens[i]` and of the `tops[i]` likeliest tokens under row i of `logits`."""
    logprobs = logits.float().log_softmax(dim=-1)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    most = min(max(tops), logits.shape[-1])
    if most == 0:
        return [TokenLogprob(value, []) for value in own]
    values, indices = logprobs.topk(most, dim=-1)
    return [
        TokenLogprob(
            value, [TopLogprob(token, top) for token, top in zip(row_ids[:top_n], row[:top_n], strict=True)]
        )
        for value, row, row_ids, top_n in zip(own, values.tolist(), indices.tolist(), tops, strict=True)
    ]


def _choose(logits: Tensor, rows: list[int], draws: list[Draw]) -> list[int]:
    adjusted = [at for at, draw in enumerate(draws) if _is_adjusted(draw.sampling)]
    greedy = all(draw.sampling.temperature == 0 for draw in draws)
    if greedy and not adjusted:
        best: list[int] = logits.argmax(dim=-1).tolist()
        return [best[row] for row in rows]

    scores = logits[rows].float()
    for at in adjusted:
        _adjust(scores[at], draws[at])
    if greedy:
        return list(scores.argmax(dim=-1).tolist())
    tokens: list[int] = [0] * len(draws)
    drawing = [at for at, draw in enumerate(draws) if draw.sampling.temperature > 0]
    taking = [at for at, draw in enumerate(draws) if draw.sampling.temperature == 0]
    step = max(1, MAX_DRAW_ELEMENTS // scores.shape[-1])
    for first in range(0, len(drawing), step):
        block = drawing[first : first + step]
        for at, token in zip(block, _draw(scores[block], [draws[at] for at in block]), strict=True):
            tokens[at] = token
    if taking:
        for at, token in zip(taking, scores[taking].argmax(dim=-1).tolist(), strict=True):
            tokens[at] = token
    return tokens


def _is_adjusted(sampling: Sampling) -> bool:
    return bool(
        sampling.logit_bias
        or sampling.repetition_penalty != 1.0
        or sampling.presence_penalty
        or sampling.frequency_penalty
    )


def _adjust(scores: Tensor, draw: Draw) -> None:
    """Bias, then the repetition penalty over prompt and output (Keskar et al., CTRL, 2019), then presence
    and frequency penalties over the output, on one row in place."""
    sampling, device = draw.sampling, scores.device
    if sampling.logit_bias:
        tokens = torch.tensor(list(sampling.logit_bias), dtype=torch.int64, device=device)
        scores[tokens] += torch.tensor(list(sampling.logit_bias.values()), dtype=scores.dtype, device=device)
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(list({*draw.prompt, *draw.output}), dtype=torch.int64, device=device)
        at_seen = scores[seen]
        penalty = sampling.repetition_penalty
        scores[seen] = torch.where(at_seen > 0, at_seen / penalty, at_seen * penalty)
    if draw.output and (sampling.presence_penalty or sampling.frequency_penalty):
        output = torch.tensor(draw.output, dtype=torch.int64, device=device)
        tokens, counts = torch.unique(output, return_counts=True)
        scores[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * counts


def _draw(scores: Tensor, draws: list[Draw]) -> list[int]:
    """Tokens from float32 `scores` `[draws, vocab]`, every temperature above zero."""
    device = scores.device

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)[:, None]

    settings = [draw.sampling for draw in draws]
    # float64, and the best score moved to zero first: a tiny temperature must not overflow
    scores = scores.double()
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / column([s.temperature for s in settings])
    weights = scores.exp()
    filtered = [at for at, s in enumerate(settings) if s.min_p > 0 or s.top_k > 0 or s.top_p < 1]
    if filtered:
        lowest = _lowest_kept(scores[filtered], [settings[at] for at in filtered])
        weights[filtered] = weights[filtered].masked_fill(scores[filtered] < lowest, 0.0)
    cumulative = weights.cumsum(dim=-1)
    chance = column([uniform(draw.sampling.seed, draw.choice, draw.position) for draw in draws])
    target = chance * cumulative[:, -1:]
    # the first token whose sum exceeds the target; rounding must not carry past the last one with a weight
    tokens = torch.searchsorted(cumulative, target, right=True)
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return list(torch.minimum(tokens, last).clamp_(max=scores.shape[-1] - 1)[:, 0].tolist())


def _lowest_kept(scores: Tensor, settings: list[Sampling]) -> Tensor:
    """The lowest score each row keeps, float64 `[rows, 1]`. The best score is 0 in every row.

    top-k (Fan et al., 2018) and top-p (Holtzman et al., 2019) look at what the filters before them left.
    """
    vocab = scores.shape[-1]
    device = scores.device
    top_k = [min(s.top_k, vocab) if s.top_k else vocab for s in settings]
    ranked = (
        scores.topk(max(top_k), dim=-1).values if max(top_k) < vocab else scores.sort(descending=True).values
    )
    min_p = torch.tensor([s.min_p for s in settings], dtype=torch.float64, device=device)[:, None]
    lowest = min_p.log()  # exp(score) >= min_p, since the best token's weight is 1; log(0) keeps everything
    kth = torch.tensor([k - 1 for k in top_k], dtype=torch.int64, device=device)[:, None]
    lowest = torch.maximum(lowest, ranked.gather(1, kth))
    if all(s.top_p >= 1 for s in settings):
        return lowest
    # tokens that tie with the k-th may lie beyond `ranked`; they belong to neither sum, whatever the batch
    rank = torch.arange(ranked.shape[-1], device=device)[None, :]
    weights = ranked.exp().masked_fill((ranked < lowest) | (rank > kth), 0.0)
    cumulative = weights.cumsum(dim=-1)
    top_p = torch.tensor([s.top_p for s in settings], dtype=torch.float64, device=device)[:, None]
    reached = (cumulative - weights) < top_p * cumulative[:, -1:]
    kept = (reached & (weights > 0)).sum(dim=-1, keepdim=True).clamp_(min=1)
    nucleus = ranked.gather(1, kept - 1)
    return torch.where(top_p < 1, torch.maximum(lowest, nucleus), lowest)
