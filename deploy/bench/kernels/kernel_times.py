"""How the kernels are measured: the shape of Qwen3-8B, a pool over most of the memory, replays of a graph."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from services.engine.ops.tuning import Shape, Table

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 4096, 36, 32, 8, 128, 12288
PEAK_BYTES_PER_S = 4.49e12
PEAK_FLOPS_PER_S = 781e12
TOKEN_LAYER_BYTES = 2 * KV_HEADS * HEAD_DIM * 2
DTYPE = torch.bfloat16
CUDA = torch.device("cuda")
Call = Callable[[], object]
REPLAYS = 7
PAGE_SIZES = (16, 64, 128)


@dataclass(frozen=True, slots=True)
class KernelResult:
    """`amount` bytes or floating-point operations were moved or done in one call of `time_s`."""

    kernel: str
    shape: str
    settings: str
    time_s: float
    amount: float
    unit: str
    share: float


@dataclass(frozen=True, slots=True)
class Entry:
    """What a measurement would be in the table of tuned launches."""

    kernel: str
    shape: Shape
    launch: msgspec.Struct


class Bench:
    """Collects results, and the fastest launches; starts no measurement after `budget_s`."""

    def __init__(self, budget_s: float) -> None:
        self.results: list[KernelResult] = []
        self.skipped: list[str] = []
        self._best: dict[tuple[str, Shape], tuple[float, msgspec.Struct]] = {}
        self.deadline_s = time.monotonic() + budget_s

    def bytes(
        self,
        kernel: str,
        shape: str,
        settings: str,
        calls: list[Call],
        n: float,
        entry: Entry | None = None,
    ) -> None:
        time_s = self._measure(kernel, shape, settings, calls, n, "B", PEAK_BYTES_PER_S)
        if entry is not None and time_s is not None:
            known = self._best.get((entry.kernel, entry.shape))
            if known is None or time_s < known[0]:
                self._best[entry.kernel, entry.shape] = (time_s, entry.launch)

    def table(self) -> Table:
        """The fastest launch of each kernel and shape that had an `Entry`."""
        table: Table = {}
        for (kernel, shape), (_, launch) in self._best.items():
            table.setdefault(kernel, {})[shape] = msgspec.to_builtins(launch)
        return table

    def flops(self, kernel: str, shape: str, settings: str, calls: list[Call], n: float) -> None:
        self._measure(kernel, shape, settings, calls, n, "FLOP", PEAK_FLOPS_PER_S)

    def _measure(
        self,
        kernel: str,
        shape: str,
        settings: str,
        calls: list[Call],
        amount: float,
        unit: str,
        peak: float,
    ) -> float | None:
        name = f"{kernel} | {shape} | {settings}"
        if time.monotonic() > self.deadline_s:
            self.skipped.append(f"{name}: no time left")
            return None
        try:
            time_s = graph_time_s(calls)
        except Exception as error:  # a setting this GPU cannot take is a finding, and the others still count
            self.skipped.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
            return None
        rate = amount / time_s
        self.results.append(KernelResult(kernel, shape, settings, time_s, amount, unit, rate / peak))
        text = f"{rate / 1e12:7.1f} TFLOP/s" if unit == "FLOP" else f"{rate / 1e9:7.0f} GB/s"
        print(f"{name:<86} {time_s * 1e6:9.1f} us {text} {100 * rate / peak:5.1f} %", flush=True)
        return time_s


def graph_time_s(calls: list[Call]) -> float:
    """Median seconds of one call, from replays of a graph of all of them."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        calls[0]()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times_ms: list[float] = []
    for _ in range(REPLAYS):
        started = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        ended = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        started.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times_ms.append(started.elapsed_time(ended))
    return statistics.median(times_ms) / 1000 / len(calls)


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPE, device=CUDA)


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=CUDA)


def pool_of(memory: Tensor, page_size: int) -> Tensor:
    """The whole memory as a pool with pages of that size."""
    page_elements = LAYERS * 2 * KV_HEADS * page_size * HEAD_DIM
    pages = memory.numel() // page_elements
    return memory[: pages * page_elements].view(pages, LAYERS, 2, KV_HEADS, page_size, HEAD_DIM)


def tables_of(pool: Tensor, sequences: int, tokens: int, scattered: bool = True) -> Tensor:
    """Scattered pages, as after a while of serving, or those of a fresh pool in order."""
    pages = -(-tokens // pool.shape[4])
    number = torch.randperm if scattered else torch.arange
    order = number(pool.shape[0], device=CUDA)[: sequences * pages]
    return order.to(torch.int32).view(sequences, pages)
