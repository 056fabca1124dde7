"""Allocates a model's parameters once, in the form the layers multiply with, and remembers which part of
which tensor each name of the checkpoint fills: query, key and value matrices become one, gate and up too."""

from collections.abc import Iterable

import torch
from torch import Tensor

from services.config import Quantization
from services.engine.models.tensor_specs import Part, TensorSpec
from services.engine.ops.fp8 import FP8, quantise_rows
from services.engine.rank_group import RankGroup

FILL_ELEMENTS = 4 << 20
"""Numbers that are quantised at once: what a conversion needs beside the parameters stays a few MiB."""


class Parameters:
    """`specs` are the whole model's tensors by name, of which the layers allocate this rank's part.

    `views` maps a checkpoint's tensor name to the (part of the) allocated tensor that it fills, `scales`
    those of quantised matrices to their rows' scales, float32 `[rows, 1]`.
    """

    def __init__(
        self,
        specs: Iterable[TensorSpec],
        dtype: torch.dtype,
        device: torch.device,
        quantization: Quantization = "none",
        group: RankGroup | None = None,
    ) -> None:
        self.specs = {spec.name: spec for spec in specs}
        self.dtype = dtype
        self.device = device
        self.quantization = quantization
        self.group = group or RankGroup()
        self.views: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}
        self.byte_count = 0

    def has(self, name: str) -> bool:
        """Whether the model has such a tensor."""
        return name in self.specs

    def is_quantised(self, names: Iterable[str]) -> bool:
        """Whether these matrices are to be stored in fp8."""
        return self.quantization == "fp8" and all(self.specs[name].quantisable for name in names)

    def fused(self, *names: str) -> Tensor:
        """One tensor whose rows are filled by the named tensors in order; a vector that memory holds once for
        each head is repeated in as many rows."""
        rows_of, columns = self._extents(names)
        whole = self._allocate(rows_of, columns, self.dtype)
        self.views |= _parts(whole, rows_of)
        return whole

    def quantised(self, *names: str) -> tuple[Tensor, Tensor]:
        """As `fused`, in fp8: the matrix, and the scales of its rows, float32 `[sum of rows, 1]`."""
        rows_of, columns = self._extents(names)
        whole = self._allocate(rows_of, columns, FP8)
        scale = self._allocate(rows_of, (1,), torch.float32)
        self.views |= _parts(whole, rows_of)
        self.scales |= _parts(scale, rows_of)
        return whole, scale

    def part(self, name: str) -> Part | None:
        """What is to be filled in of the checkpoint's tensor `name`; None: zeros."""
        return self.specs[name].part(self.group.rank, self.group.size)

    def fill(self, name: str, values: Tensor) -> None:
        """Put (the rank's part of) a tensor of the checkpoint in its place: converted to the place's dtype,
        and moved to the device as it is stored. A quantised matrix goes in blocks of rows, so that it is
        never there twice."""
        view = self.views[name]
        if name not in self.scales:
            view.copy_(values)
            return
        step = max(1, FILL_ELEMENTS // view.shape[1])
        for first in range(0, view.shape[0], step):
            block = slice(first, first + step)
            quantised, scale = quantise_rows(values[block].to(self.device))
            view[block].copy_(quantised)
            self.scales[name][block].copy_(scale)

    def values(self, name: str) -> Tensor:
        """What the layers multiply with, in float64; of a quantised matrix, its numbers times the scales."""
        view = self.views[name].double()
        return view * self.scales[name] if name in self.scales else view

    def _extents(self, names: Iterable[str]) -> tuple[dict[str, int], tuple[int, ...]]:
        """Rows of each on this rank, and the columns, which are the same for all."""
        rows_of: dict[str, int] = {}
        columns: tuple[int, ...] = ()
        for name in names:
            spec = self.specs[name]
            shape = spec.rank_shape(self.group.size)
            if spec.heads is not None:
                shape = (spec.rank_copies(self.group.size), *shape)
            rows_of[name], columns = shape[0], shape[1:]
        return rows_of, columns

    def _allocate(self, rows_of: dict[str, int], columns: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        whole = torch.empty((sum(rows_of.values()), *columns), dtype=dtype, device=self.device)
        self.byte_count += whole.numel() * whole.element_size()
        return whole


def _parts(whole: Tensor, rows_of: dict[str, int]) -> dict[str, Tensor]:
    return dict(zip(rows_of, torch.split(whole, list(rows_of.values())), strict=True))
