"""Steps of one decoder: what a list of rows becomes on the device, queued without waiting for it.

The ids that a step draws stay on the device, where the next step finds them: a row names the draw its token
came from, and may be launched before the host knows the token. The host's copy of the ids follows on its own.
Everything is queued on one stream, so what a step reads or writes is never touched by the one after it too
early: a page that the scheduler gives away is written by its next user only after this step.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from services.engine.attention.plan import SpanLimits
from services.engine.batch import Row, SampleSpec
from services.engine.decode_graphs import DecodeGraphs
from services.engine.host_copy import indices, to_device, to_host
from services.engine.kv.layout import KvLayout
from services.engine.kv.pool import KvPool
from services.engine.launched import Launched, QueuedNonfinite
from services.engine.models.layers import Decoder
from services.engine.sampling.sampler import QueuedLogprobs, QueuedSamples, sample, token_logprobs
from services.engine.step_inputs import build_step, check_row, order_rows

PROMPT_LOGPROB_ROWS = 64
"""Prompt positions whose logits are held at once: those of a long prompt would be gigabytes."""


@dataclass(slots=True)
class _SampledRows:
    """Rows that draw, in the order they have on the device: `owners[i]` is the row of the i-th draw, and
    `logit_rows[i]` the row of the logits it draws from."""

    samples: list[SampleSpec]
    owners: list[int]
    logit_rows: list[int]


class Steps:
    """`launch` for every step. `max_samples` is how many of a step's draws the next one can go on from."""

    def __init__(self, decoder: Decoder, layout: KvLayout, limits: SpanLimits, max_samples: int) -> None:
        self.decoder = decoder
        self.layout = layout
        self.limits = limits
        self.sampled = torch.zeros(max_samples, dtype=torch.int64, device=decoder.embedding.device)
        self._sampled_at: list[int] = []
        """Where in `sampled` the draws of the last launch are, as its rows count them."""

    def launch(
        self,
        rows: list[Row],
        pool: KvPool,
        graphs: DecodeGraphs | None = None,
        layers: int | None = None,
    ) -> Launched:
        """See `Engine.launch`. `layers` runs only that many."""
        if not rows:
            return Launched([])
        vocab_size = self.decoder.model.vocab_size
        for row in rows:
            check_row(row, vocab_size, len(self._sampled_at))
        if graphs is not None and graphs.takes(rows):
            return self._launch_graph(rows, graphs)
        order = order_rows(rows)
        ordered = [rows[at] for at in order]
        model, sources = self.decoder.model, self._sources(ordered)
        step = build_step(ordered, self.sampled, sources, model, self.layout, pool.pages, self.limits)
        sampled_rows, last_tokens = _sampled_rows(ordered, order)
        last = to_device({"last": indices(last_tokens)}, self.sampled.device)["last"]
        scored = any(row.targets for row in rows)
        hidden = self.decoder.forward(step, pool, layers, wanted=None if scored else last)
        prompts: list[tuple[int, QueuedLogprobs]] = []
        if scored:
            prompts = self._prompt_logprobs(hidden, ordered, order)
            hidden = hidden.index_select(0, last)
        samples = None
        if last_tokens:
            samples = self._sample(self.decoder.logits(hidden), sampled_rows)
        marks = QueuedNonfinite(to_host(step.nonfinite), ordered, order)
        return self._finish(rows, order, sampled_rows, samples, prompts, marks)

    def _launch_graph(self, rows: list[Row], graphs: DecodeGraphs) -> Launched:
        order = graphs.order(rows)
        ordered = [rows[at] for at in order]
        logits, nonfinite = graphs.run(ordered, self._sources(ordered))
        sampled_rows, _ = _sampled_rows(ordered, order)
        marks = QueuedNonfinite(to_host(nonfinite), ordered, order)
        return self._finish(rows, order, sampled_rows, self._sample(logits, sampled_rows), [], marks)

    def _sample(self, logits: Tensor, sampled_rows: _SampledRows) -> QueuedSamples | None:
        """Rank 0 draws for all: no difference between two devices can make two ranks go on differently."""
        if self.decoder.group.rank != 0:
            return None
        return sample(logits, sampled_rows.logit_rows, sampled_rows.samples)

    def _sources(self, rows: list[Row]) -> list[int]:
        return [self._sampled_at[row.sampled_by] if row.sampled_by >= 0 else -1 for row in rows]

    def _finish(
        self,
        rows: list[Row],
        order: list[int],
        sampled_rows: _SampledRows,
        samples: QueuedSamples | None,
        prompts: list[tuple[int, QueuedLogprobs]],
        marks: QueuedNonfinite,
    ) -> Launched:
        """Keep the draws for the next step, and mark where the device is done with this one. A step that
        goes on from logits without a token computes something, which nobody will want."""
        self._sampled_at = _positions(rows, order)
        kept = min(len(self._sampled_at), self.sampled.shape[0])
        if samples is not None:
            torch.clamp(samples.tokens[:kept], min=0, out=self.sampled[:kept])
        if kept:
            self.decoder.group.share(self.sampled[:kept])
        done = None
        if self.sampled.is_cuda:
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        return Launched(rows, sampled_rows.owners, samples, prompts, marks, done)

    def _prompt_logprobs(
        self, hidden: Tensor, rows: list[Row], order: list[int]
    ) -> list[tuple[int, QueuedLogprobs]]:
        queued: list[tuple[int, QueuedLogprobs]] = []
        first = 0
        for at, row in zip(order, rows, strict=True):
            for start in range(0, len(row.targets), PROMPT_LOGPROB_ROWS):
                targets = row.targets[start : start + PROMPT_LOGPROB_ROWS]
                count = len(targets)
                logits = self.decoder.logits(hidden[first + start : first + start + count])
                if self.decoder.group.rank != 0:
                    continue
                sent = to_device({"targets": indices(targets)}, hidden.device)
                queued.append((at, token_logprobs(logits, sent["targets"], [row.prompt_logprobs] * count)))
            first += len(row.tokens)
        return queued


def _sampled_rows(rows: list[Row], order: list[int]) -> tuple[_SampledRows, list[int]]:
    """The draws of `rows`, which are in their order on the device, and each drawing row's last token."""
    ends = accumulate(len(row.tokens) for row in rows)
    sampled_rows = [
        (end - 1, at, row.samples) for end, at, row in zip(ends, order, rows, strict=True) if row.samples
    ]
    return (
        _SampledRows(
            samples=[draw for _, _, samples in sampled_rows for draw in samples],
            owners=[at for _, at, samples in sampled_rows for _ in samples],
            logit_rows=[number for number, (_, _, samples) in enumerate(sampled_rows) for _ in samples],
        ),
        [last_token for last_token, _, _ in sampled_rows],
    )


def _positions(rows: list[Row], order: list[int]) -> list[int]:
    """For each draw, counted through the rows as they came, its number on the device."""
    begins = [0] * len(rows)
    sampled = 0
    for at in order:
        begins[at] = sampled
        sampled += len(rows[at].samples)
    if sampled == len(rows) and all(row.samples for row in rows):
        return begins
    return [begin + one for begin, row in zip(begins, rows, strict=True) for one in range(len(row.samples))]
