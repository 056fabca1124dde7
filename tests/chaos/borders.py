"""Which requests have answers that rounding could change: they are left out of a run.

A token that is computed again, in the company of other requests, has logits that differ in their last bits.
That changes a token only where two tokens tie, or where the draw lies on the border between two: once in some
million tokens, and then "every token is the same" is too much to ask. Each draw is looked at in float64, by
transformers and by formulas of its own, which also says whether the reference itself is right.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from services.engine.sampling.counter_rng import uniform
from tests.chaos.requests import Plan

CLOSE = 1e-5
"""Of logits, or of cumulative probabilities. Float32 leaves 1e-6 of both in doubt."""


class WrongReference(Exception):
    """The undisturbed answer itself is not what the model draws."""


class Borders:
    def __init__(self, model_dir: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)

    def is_close(self, plan: Plan, tokens: dict[int, list[int]]) -> bool:
        """Whether a draw of these answers, by choice, is close to another token. Raises WrongReference."""
        return any([self._is_close(plan, choice, sampled) for choice, sampled in tokens.items()])

    def _is_close(self, plan: Plan, choice: int, sampled: list[int]) -> bool:
        if not sampled:
            return False
        prompt: list[int] = plan.body["prompt"]
        with torch.no_grad():
            logits = self._model(torch.tensor([prompt + sampled[:-1]])).logits[0, len(prompt) - 1 :]
        counts = torch.zeros(logits.shape[-1], dtype=torch.float64)
        close = False
        for at, (row, token) in enumerate(zip(logits, sampled, strict=True)):
            chance = uniform(plan.body["seed"], choice, len(prompt) + at)
            right, distance = _draw(row, counts, plan.body, chance)
            close |= distance < CLOSE
            if right != token and distance >= CLOSE:
                what = f"plan {plan.number}: choice {choice}: token {at} is {token}, not {right}"
                raise WrongReference(what)
            counts[token] += 1
        return close


def _draw(row: Tensor, counts: Tensor, body: dict[str, object], chance: float) -> tuple[int, float]:
    """The token, and how far the nearest other one is."""
    presence, frequency = (float(str(body.get(f"{name}_penalty", 0.0))) for name in ("presence", "frequency"))
    scores = row - presence * (counts > 0) - frequency * counts
    ranked = scores.sort(descending=True)
    temperature, top_k = float(str(body["temperature"])), int(str(body.get("top_k", 0)))
    if temperature == 0:
        return int(ranked.indices[0]), float(ranked.values[0] - ranked.values[1])
    distance = 1.0
    if top_k:
        distance = float(ranked.values[top_k - 1] - ranked.values[top_k])
        scores = scores.masked_fill(scores < ranked.values[top_k - 1], -torch.inf)
    borders = (scores / temperature).softmax(-1).cumsum(-1)
    token = int((borders <= chance).sum())
    return token, min(distance, float((borders - chance).abs().min()))
