"""Samples tokens from logits, one draw independent of every other. Nothing here waits for the device.

Order, as in vLLM: logit bias, penalties, temperature, then the filters min-p, top-k, top-p. All filters are
thresholds on the logit, so tokens that tie with the last one kept are kept too, and no sort order can leak
from the batch into a draw. A draw then takes its one random number and inverts the distribution's sum.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from services.engine.batch import SampledToken, SampleSpec
from services.engine.host_copy import Column, indices, to_device, to_host
from services.engine.sampling.counter_rng import uniform
from services.engine.sampling.sample_kernels import best_tokens, sample_tokens
from services.protocol.messages import Sampling, TokenLogprob, TopLogprob

MAX_SAMPLE_ELEMENTS = 8 << 20
"""Scores that one draw on a CPU works on, in float64, about five times over."""


@dataclass(frozen=True, slots=True)
class QueuedLogprobs:
    """float32 `[n]` and, if alternatives are wanted, `[n, most]` with their ids, on their way to the host."""

    own: Tensor
    values: Tensor | None
    tokens: Tensor | None
    tops: list[int]

    def collect(self) -> list[TokenLogprob]:
        own: list[float] = self.own.tolist()
        if self.values is None or self.tokens is None:
            return [TokenLogprob(value, []) for value in own]
        return [
            TokenLogprob(value, [TopLogprob(*pair) for pair in zip(ids[:top], values[:top], strict=True)])
            for value, values, ids, top in zip(
                own, self.values.tolist(), self.tokens.tolist(), self.tops, strict=True
            )
        ]


@dataclass(frozen=True, slots=True)
class QueuedSamples:
    """`tokens` int64 `[draws]` on the device, for the step that goes on from them, and the same on its way to
    the host. `collect` once an event recorded after `sample` has passed; on a CPU at once."""

    tokens: Tensor
    on_host: Tensor
    wanted: list[int]
    logprobs: QueuedLogprobs | None

    def collect(self) -> list[SampledToken]:
        sampled = [SampledToken(token) for token in self.on_host.tolist()]
        if self.logprobs is not None:
            for at, logprob in zip(self.wanted, self.logprobs.collect(), strict=True):
                sampled[at].logprob = logprob
        return sampled


def sample(logits: Tensor, rows: list[int], samples: list[SampleSpec]) -> QueuedSamples:
    """One token for each of `samples`, at least one, from row `rows[i]` of `logits` `[rows, vocab]` (any
    float dtype). All that the device needs to know of them goes there in one copy.

    Log probabilities are those of the logits as the model gave them: before bias, penalties, temperature.
    Logits that are no distribution give NO_TOKEN, also with these: no finite bias makes a number of a NaN.
    """
    vocab = logits.shape[-1]
    random = [at for at, draw in enumerate(samples) if draw.sampling.temperature > 0]
    wanted = [at for at, draw in enumerate(samples) if draw.sampling.logprobs is not None]
    changes = _score_changes(samples, vocab)
    columns: dict[str, Column] = {**changes}
    if random:
        columns |= _distributions([samples[at] for at in random], vocab)
    if random and len(random) < len(samples):
        columns["random"] = indices(random)
    if wanted:
        columns |= {"wanted": indices(wanted), "wanted_rows": indices([rows[at] for at in wanted])}
    one_each = rows == list(range(logits.shape[0]))
    if random or changes or not one_each:
        columns["rows"] = indices(rows)
    sent = to_device(columns, logits.device) if columns else {}

    scores, score_rows = logits, sent.get("rows")
    if changes and score_rows is not None:
        scores, score_rows = _changed_scores(logits.index_select(0, score_rows).float(), sent), None
    filtered = any(s.min_p > 0 or s.top_k > 0 or s.top_p < 1 for s in (samples[at].sampling for at in random))
    tokens = _choose(scores, score_rows, len(random), filtered, sent)
    logprobs = None
    if wanted:
        tops = [samples[at].sampling.logprobs or 0 for at in wanted]
        chosen = logits.index_select(0, sent["wanted_rows"])
        own = tokens.index_select(0, sent["wanted"]).clamp_(min=0)  # NO_TOKEN has no column
        logprobs = token_logprobs(chosen, own, tops)
    return QueuedSamples(tokens, to_host(tokens), wanted, logprobs)


def token_logprobs(logits: Tensor, tokens: Tensor, tops: list[int]) -> QueuedLogprobs:
    """Log probability of `tokens[i]` (int64, on the logits' device) and of the `tops[i]` likeliest tokens
    under row i of `logits`."""
    logprobs = logits.float().log_softmax(dim=-1)
    own = to_host(logprobs.gather(1, tokens[:, None])[:, 0])
    most = min(max(tops), logits.shape[-1])
    if most == 0:
        return QueuedLogprobs(own, None, None, tops)
    top = logprobs.topk(most, dim=-1)
    return QueuedLogprobs(own, to_host(top.values), to_host(top.indices), tops)


def _choose(
    scores: Tensor, rows: Tensor | None, random: int, filtered: bool, sent: dict[str, Tensor]
) -> Tensor:
    """int64 `[draws]`: the best score's token, but for the `random` draws that have a distribution.
    Without `rows`, each row of the scores has one draw."""
    if rows is None:
        rows = torch.arange(scores.shape[0], device=scores.device)
    rows = rows.int()
    if not random:
        return best_tokens(scores, rows)
    picked = sent.get("random")
    settings = [sent[name] for name in ("temperature", "top_k", "top_p", "min_p", "chance")]
    random_rows = rows if picked is None else rows.index_select(0, picked)
    block = random if scores.is_cuda else max(1, MAX_SAMPLE_ELEMENTS // scores.shape[-1])
    parts = [
        sample_tokens(
            scores,
            random_rows[first : first + block],
            *(setting[first : first + block] for setting in settings),
            filtered=filtered,
        )
        for first in range(0, random, block)
    ]
    sampled = parts[0] if len(parts) == 1 else torch.cat(parts)
    return sampled if picked is None else best_tokens(scores, rows).index_copy_(0, picked, sampled)


# ---------------------------------------------------------------- scores


def _score_changes(samples: list[SampleSpec], vocab: int) -> dict[str, Column]:
    """Bias, repetition penalty over prompt and output (Keskar et al., CTRL, 2019), presence and frequency
    penalties over the output: for each that any draw has, the cells of the scores `[draws, vocab]` it
    touches, each at most once, and by how much."""
    bias: dict[int, float] = {}
    repetition: dict[int, float] = {}
    presence: dict[int, float] = {}
    for at, draw in enumerate(samples):
        sampling, first = draw.sampling, at * vocab
        for token, amount in sampling.logit_bias.items():
            bias[first + token] = amount
        if sampling.repetition_penalty != 1.0:
            for token in {*draw.prompt, *draw.output}:
                repetition[first + token] = sampling.repetition_penalty
        if sampling.presence_penalty or sampling.frequency_penalty:
            for token, count in Counter(draw.output).items():
                presence[first + token] = sampling.presence_penalty + sampling.frequency_penalty * count
    columns: dict[str, Column] = {}
    for name, change in (("bias", bias), ("repetition", repetition), ("presence", presence)):
        if change:
            columns[f"{name}_cells"] = indices(list(change))
            columns[name] = np.array(list(change.values()), dtype=np.float32)
    return columns


def _changed_scores(scores: Tensor, sent: dict[str, Tensor]) -> Tensor:
    """float32 `[draws, vocab]`, in place: bias, then repetition, then presence and frequency."""
    cells = scores.view(-1)
    if "bias" in sent:
        cells.index_add_(0, sent["bias_cells"], sent["bias"])
    if "repetition" in sent:
        seen, penalty = cells.index_select(0, sent["repetition_cells"]), sent["repetition"]
        cells.index_copy_(0, sent["repetition_cells"], torch.where(seen > 0, seen / penalty, seen * penalty))
    if "presence" in sent:
        cells.index_add_(0, sent["presence_cells"], sent["presence"], alpha=-1)
    return scores


# ---------------------------------------------------------------- distributions


def _distributions(samples: list[SampleSpec], vocab: int) -> dict[str, Column]:
    settings: list[Sampling] = [draw.sampling for draw in samples]
    return {
        "temperature": np.array([s.temperature for s in settings], dtype=np.float32),
        "top_k": np.array([min(s.top_k, vocab) for s in settings], dtype=np.int32),
        "top_p": np.array([s.top_p for s in settings], dtype=np.float32),
        "min_p": np.array([s.min_p for s in settings], dtype=np.float32),
        "chance": np.array(
            [uniform(d.sampling.seed, d.choice, d.position) for d in samples], dtype=np.float64
        ),
    }
