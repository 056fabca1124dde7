"""Places in a device's stream: torch's events, and whoever watches one."""

from typing import Protocol

import torch


class Event(Protocol):
    """Passes when all is done that was queued before it."""

    def query(self) -> bool:
        """Whether it has passed."""

    def synchronize(self) -> None:
        """Wait for it."""

    def wait(self, stream: torch.cuda.Stream) -> None:
        """What is queued on `stream` from now on starts after it. The host does not wait."""
