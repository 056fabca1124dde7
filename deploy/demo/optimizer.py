"""The optimizer of the demo model: Muon for the matrices of the layers, AdamW for the rest.

Two cores allow only about a thousand steps, and Muon usually gets further in so few than AdamW does. It is
written out here, and in float32, because processors without bfloat16 units are slow at the one in PyTorch.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch

MATRIX_RATE = 0.02
OTHER_RATE = 3e-3
MOMENTUM = 0.95
WARM_UP_STEPS = 40
LAST_SHARE = 0.01
# Coefficients of a quintic that pulls all singular values towards one in a few rounds.
QUINTIC = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


def orthogonal(updates: torch.Tensor) -> torch.Tensor:
    """The nearest orthogonal matrices, about, of a stack of wide matrices."""
    a, b, c = QUINTIC
    x = updates / (updates.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


def rate_at(step: int, steps: int) -> float:
    """Share of the peak rate: a short warm-up, then a cosine."""
    if step < WARM_UP_STEPS:
        return (step + 1) / WARM_UP_STEPS
    done = (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS)
    return LAST_SHARE + (1 - LAST_SHARE) * 0.5 * (1 + math.cos(math.pi * done))


class Optimizer:
    """Steps a model through a run of known length."""

    def __init__(self, model: torch.nn.Module, steps: int) -> None:
        self.steps = steps
        self.done = 0
        matrices = {n: p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n}
        others = [p for n, p in model.named_parameters() if n not in matrices]
        self.parameters = list(model.parameters())
        self.adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.momenta = {p: torch.zeros_like(p) for p in matrices.values()}
        # Matrices of one shape are worked on as one stack, tall ones turned on their side.
        self.stacks: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
        for p in matrices.values():
            self.stacks[torch.Size(sorted(p.shape))].append(p)

    @torch.no_grad()
    def step(self) -> None:
        share = rate_at(self.done, self.steps)
        self.done += 1
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = OTHER_RATE * share
        self.adam.step()
        for stack in self.stacks.values():
            wide = torch.stack([self._momentum(p) for p in stack])
            for p, update in zip(stack, orthogonal(wide), strict=True):
                turned = update.mT if p.shape[0] > p.shape[1] else update
                scale = math.sqrt(max(1.0, p.shape[0] / p.shape[1]))
                p.add_(turned, alpha=-MATRIX_RATE * share * scale)
        for p in self.parameters:
            p.grad = None

    def _momentum(self, p: torch.nn.Parameter) -> torch.Tensor:
        assert p.grad is not None
        momentum = self.momenta[p]
        momentum.lerp_(p.grad, 1 - MOMENTUM)
        ahead = p.grad.lerp(momentum, MOMENTUM)
        return ahead.mT if p.shape[0] > p.shape[1] else ahead
