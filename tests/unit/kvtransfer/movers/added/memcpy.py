"""A mover as somebody would add it, in one file: it copies between the staging buffers of one process."""

import ctypes

from kvtransfer.buffer.region import Region
from kvtransfer.movers.loopback import LoopbackFabric, LoopbackMover
from kvtransfer.movers.spec import HostFacts, MoverSetup, MoverSpec

FABRIC = LoopbackFabric()


class MemcpyMover(LoopbackMover):
    """A `Mover` for buffers in host memory that are all mapped into this process."""

    name = "memcpy"

    def __init__(self, agent_name: str) -> None:
        super().__init__(FABRIC, agent_name, memoryview(b""))

    def register(self, region: Region) -> None:
        memory = (ctypes.c_char * region.byte_count).from_address(region.address)
        self._buffer = memoryview(memory).cast("B")
        super().register(region)


def why_not(facts: HostFacts) -> str | None:
    return None if facts.device == "cpu" else "it copies host memory"


def build(setup: MoverSetup) -> MemcpyMover:
    return MemcpyMover(setup.agent_name)


MOVER = MoverSpec(name=MemcpyMover.name, preference=40, why_not=why_not, context_bytes=3 << 20, build=build)
