"""A host with GPUs, as the driver's rules say: streams run in order and when told, mappings keep memory."""

from dataclasses import dataclass, field

from kvtransfer.buffer.cuda import CudaError, GpuName


@dataclass(slots=True)
class Allocation:
    data: bytearray
    base: int
    owner_gpu: int
    mappings: int = 0


@dataclass(slots=True)
class Host:
    """All memory, by address and by IPC handle; `links` are the pairs of GPUs that can copy directly."""

    gpus: int = 2
    links: set[tuple[int, int]] = field(default_factory=lambda: {(0, 1), (1, 0)})
    allocations: dict[bytes, Allocation] = field(default_factory=dict)
    next_base: int = 0x10000

    def allocate(self, gpu: int, byte_count: int) -> bytes:
        handle = len(self.allocations).to_bytes(64, "little")
        self.allocations[handle] = Allocation(bytearray(byte_count), self.next_base, gpu)
        self.next_base += byte_count + 0x10000
        return handle

    def at(self, address: int, byte_count: int) -> tuple[bytearray, int]:
        for allocation in self.allocations.values():
            offset = address - allocation.base
            if offset >= 0 and offset + byte_count <= len(allocation.data):
                return allocation.data, offset
        raise AssertionError(f"{byte_count} bytes at {address:#x} are nobody's")


@dataclass(eq=False, slots=True)
class Stream:
    queued: list[object] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Event:
    reached: bool = False


class FakeDevice:
    """A process' view of one GPU of a host. `run(stream, n)` lets the GPU do the next n things."""

    def __init__(self, host: Host, index: int, visible: tuple[int, ...] = (0, 1)) -> None:
        self.host, self.index, self._visible = host, index, visible
        self.uuid = f"gpu-{index}"
        self.streams: list[Stream] = []
        self.events = 0
        self.queries = 0
        self.failed = False

    def visible(self) -> list[GpuName]:
        return [GpuName(i, f"gpu-{i}") for i in self._visible]

    def can_access(self, other_index: int) -> bool:
        return other_index == self.index or (self.index, other_index) in self.host.links

    def import_memory(self, handle: bytes) -> int:
        allocation = self.host.allocations.get(handle)
        if allocation is None:
            raise CudaError("cuIpcOpenMemHandle", "CUDA_ERROR_INVALID_VALUE")
        allocation.mappings += 1
        return allocation.base

    def unmap(self, address: int) -> None:
        next(a for a in self.host.allocations.values() if a.base == address).mappings -= 1

    def mapped_bytes(self, address: int) -> int | None:
        return len(next(a for a in self.host.allocations.values() if a.base == address).data)

    def new_stream(self) -> Stream:
        self.streams.append(Stream())
        return self.streams[-1]

    def drop_stream(self, stream: Stream) -> None:
        self.streams.remove(stream)

    def copy(self, target: int, source: int, byte_count: int, stream: Stream) -> None:
        if self.failed:
            raise CudaError("copy", "CUDA_ERROR_ECC_UNCORRECTABLE")
        stream.queued.append((target, source, byte_count))

    def new_event(self) -> Event:
        self.events += 1
        return Event()

    def drop_event(self, event: Event) -> None:
        self.events -= 1

    def record(self, event: Event, stream: Stream) -> None:
        event.reached = False
        stream.queued.append(event)

    def reached(self, event: Event) -> bool:
        self.queries += 1
        if self.failed:
            raise CudaError("work queued earlier", "CUDA_ERROR_ECC_UNCORRECTABLE")
        return event.reached

    def run(self, stream: Stream, count: int = 1 << 30) -> None:
        for _ in range(min(count, len(stream.queued))):
            work = stream.queued.pop(0)
            if isinstance(work, Event):
                work.reached = True
            elif isinstance(work, tuple):
                target, source, byte_count = work
                from_data, from_offset = self.host.at(source, byte_count)
                to_data, to_offset = self.host.at(target, byte_count)
                moved = from_data[from_offset : from_offset + byte_count]
                to_data[to_offset : to_offset + byte_count] = moved

    def run_all(self) -> None:
        for stream in self.streams:
            self.run(stream)
