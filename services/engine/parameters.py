"""Allocates a model's parameters once, in the form the layers multiply with, and remembers which part of
which tensor each name of the checkpoint fills: query, key and value matrices become one, gate and up too."""

import torch
from torch import Tensor


class Parameters:
    """`views` maps a checkpoint's tensor name to the (part of the) allocated tensor it is copied into."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self.views: dict[str, Tensor] = {}
        self.byte_count = 0

    def tensor(self, name: str, *shape: int) -> Tensor:
        return self.fused({name: shape[0]}, *shape[1:])

    def fused(self, rows_of: dict[str, int], *columns: int) -> Tensor:
        """One tensor `[sum of rows, *columns]`, its rows filled by the named tensors in order."""
        whole = torch.empty((sum(rows_of.values()), *columns), dtype=self.dtype, device=self.device)
        self.byte_count += whole.numel() * whole.element_size()
        for (name, _), part in zip(rows_of.items(), torch.split(whole, list(rows_of.values())), strict=True):
            self.views[name] = part
        return whole

    def repeated(self, copies_of: dict[str, int], size: int) -> Tensor:
        """`[sum of copies, size]` whose rows repeat the named vectors; filled through expanded views."""
        whole = torch.empty((sum(copies_of.values()), size), dtype=self.dtype, device=self.device)
        self.byte_count += whole.numel() * whole.element_size()
        for (name, _), part in zip(
            copies_of.items(), torch.split(whole, list(copies_of.values())), strict=True
        ):
            self.views[name] = part
        return whole
