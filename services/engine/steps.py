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

from services.engine.attention.plan import KvLayout, SpanLimits
from services.engine.batch import Draw, Row
from services.engine.decode_graphs import DecodeGraphs
from services.engine.host_copy import indices, to_device, to_host
from services.engine.kv.pool import KvPool
from services.engine.launched import Launched, QueuedNonfinite
from services.engine.models.layers import Decoder
from services.engine.sampling.sampler import QueuedDraws, QueuedLogprobs, sample, token_logprobs
from services.engine.step_inputs import build_step, check_row, order_rows

PROMPT_LOGPROB_ROWS = 64
"""Prompt positions whose logits are held at once: those of a long prompt would be gigabytes."""


@dataclass(slots=True)
class _Drawing:
    """Rows that draw, in the order they have on the device: `owners[i]` is the row of the i-th draw, and
    `logit_rows[i]` the row of the logits it draws from."""

    draws: list[Draw]
    owners: list[int]
    logit_rows: list[int]


class Steps:
    """`launch` for every step. `max_draws` is how many of a step's draws the next one can go on from."""

    def __init__(self, decoder: Decoder, layout: KvLayout, limits: SpanLimits, max_draws: int) -> None:
        self.decoder = decoder
        self.layout = layout
        self.limits = limits
        self.drawn = torch.zeros(max_draws, dtype=torch.int64, device=decoder.embedding.device)
        self._drawn_at: list[int] = []
        """Where in `drawn` the draws of the last launch are, as its rows count them."""

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
            check_row(row, vocab_size, len(self._drawn_at))
        if graphs is not None and graphs.takes(rows):
            return self._launch_graph(rows, graphs)
        order = order_rows(rows)
        ordered = [rows[at] for at in order]
        model, sources = self.decoder.model, self._sources(ordered)
        step = build_step(ordered, self.drawn, sources, model, self.layout, pool.pages, self.limits)
        drawing, last_tokens = _drawing(ordered, order)
        last = to_device({"last": indices(last_tokens)}, self.drawn.device)["last"]
        scored = any(row.targets for row in rows)
        hidden = self.decoder.forward(step, pool, layers, wanted=None if scored else last)
        prompts: list[tuple[int, QueuedLogprobs]] = []
        if scored:
            prompts = self._prompt_logprobs(hidden, ordered, order)
            hidden = hidden.index_select(0, last)
        draws = None
        if last_tokens:
            draws = self._sample(self.decoder.logits(hidden), drawing)
        marks = QueuedNonfinite(to_host(step.nonfinite), ordered, order)
        return self._finish(rows, order, drawing, draws, prompts, marks)

    def _launch_graph(self, rows: list[Row], graphs: DecodeGraphs) -> Launched:
        order = graphs.order(rows)
        ordered = [rows[at] for at in order]
        logits, nonfinite = graphs.run(ordered, self._sources(ordered))
        drawing, _ = _drawing(ordered, order)
        marks = QueuedNonfinite(to_host(nonfinite), ordered, order)
        return self._finish(rows, order, drawing, self._sample(logits, drawing), [], marks)

    def _sample(self, logits: Tensor, drawing: _Drawing) -> QueuedDraws | None:
        """Rank 0 draws for all: no difference between two devices can make two ranks go on differently."""
        if self.decoder.group.rank != 0:
            return None
        return sample(logits, drawing.logit_rows, drawing.draws)

    def _sources(self, rows: list[Row]) -> list[int]:
        return [self._drawn_at[row.drawn_by] if row.drawn_by >= 0 else -1 for row in rows]

    def _finish(
        self,
        rows: list[Row],
        order: list[int],
        drawing: _Drawing,
        draws: QueuedDraws | None,
        prompts: list[tuple[int, QueuedLogprobs]],
        marks: QueuedNonfinite,
    ) -> Launched:
        """Keep the draws for the next step, and mark where the device is done with this one. A step that
        goes on from logits without a token computes something, which nobody will want."""
        self._drawn_at = _positions(rows, order)
        kept = min(len(self._drawn_at), self.drawn.shape[0])
        if draws is not None:
            torch.clamp(draws.tokens[:kept], min=0, out=self.drawn[:kept])
        if kept:
            self.decoder.group.share(self.drawn[:kept])
        done = None
        if self.drawn.is_cuda:
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        return Launched(rows, drawing.owners, draws, prompts, marks, done)

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


def _drawing(rows: list[Row], order: list[int]) -> tuple[_Drawing, list[int]]:
    """The draws of `rows`, which are in their order on the device, and each drawing row's last token."""
    ends = accumulate(len(row.tokens) for row in rows)
    drawing = [(end - 1, at, row.draws) for end, at, row in zip(ends, order, rows, strict=True) if row.draws]
    return (
        _Drawing(
            draws=[draw for _, _, draws in drawing for draw in draws],
            owners=[at for _, at, draws in drawing for _ in draws],
            logit_rows=[number for number, (_, _, draws) in enumerate(drawing) for _ in draws],
        ),
        [last_token for last_token, _, _ in drawing],
    )


def _positions(rows: list[Row], order: list[int]) -> list[int]:
    """For each draw, counted through the rows as they came, its number on the device."""
    begins = [0] * len(rows)
    drawn = 0
    for at in order:
        begins[at] = drawn
        drawn += len(rows[at].draws)
    if drawn == len(rows) and all(row.draws for row in rows):
        return begins
    return [begin + one for begin, row in zip(begins, rows, strict=True) for one in range(len(row.draws))]
