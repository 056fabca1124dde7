"""Small int32 tables on their way to a device: written to pinned memory, copied, and never waited for.

Every table that may still be read has memory of its own, on both sides. Used memory comes round again once
the launch that read it is done; while the oldest is not, there is more of it. Launches end in the order in
which they were queued, so the oldest tells for all.

All memory that will do is taken at the start: to ask for pinned memory makes the driver wait for whatever the
device has queued, and a prefill step has some 50 ms.
"""

from array import array
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FIRST_WORDS = 1024
"""4 KiB: what some hundred runs of a page or two take."""


@dataclass(slots=True, eq=False)
class _Entry:
    words: npt.NDArray[np.int32]
    """The pinned memory."""
    host: Tensor
    device: Tensor
    read: torch.cuda.Event | None = None
    """Passes when nobody reads it any more."""


class TableRing:
    """Tables of one device and one stream, which is the current one whenever `send` is called. `tables`: the
    most that are usually in flight; there may be more, and longer ones than `FIRST_WORDS`."""

    def __init__(self, device: torch.device, tables: int) -> None:
        self._device = device
        self._entries: deque[_Entry] = deque()
        """The one that was used the longest ago first."""
        if device.type == "cuda":
            self._entries.extend(self._new(tables, FIRST_WORDS))
        self._sent: _Entry | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def send(self, words: "array[int]") -> Tensor:
        """int32 on the device, the table first; to be followed by `used`. On a CPU the words themselves."""
        if self._device.type != "cuda":
            return torch.frombuffer(words, dtype=torch.int32)
        entry = self._free(len(words))
        entry.words[: len(words)] = words
        entry.device.copy_(entry.host, non_blocking=True)
        self._sent = entry
        return entry.device

    def used(self, read: torch.cuda.Event | None) -> None:
        """What was sent last is read by launches that are done when `read` passes."""
        if self._sent is not None:
            self._sent.read = read
            self._entries.append(self._sent)
            self._sent = None

    def _free(self, count: int) -> _Entry:
        if self._entries:
            read = self._entries[0].read
            if read is None or read.query():
                entry = self._entries.popleft()
                if len(entry.words) >= count:
                    return entry  # else a larger one takes its place
        return self._new(1, max(FIRST_WORDS, 1 << (count - 1).bit_length()))[0]

    def _new(self, tables: int, words: int) -> list[_Entry]:
        hosts = torch.empty(tables, words, dtype=torch.int32, pin_memory=True)
        devices = torch.empty(tables, words, dtype=torch.int32, device=self._device)
        return [_Entry(host.numpy(), host, device) for host, device in zip(hosts, devices, strict=True)]
