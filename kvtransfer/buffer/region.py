"""Where a staging buffer lies, in the terms that its owner, its mover and its peers share."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Region:
    """A staging buffer: `byte_count` bytes at `address`, in host memory or on device `device_id`."""

    address: int
    byte_count: int
    device_id: int = 0
    on_device: bool = False
