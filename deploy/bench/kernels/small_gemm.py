"""Products of a decode step at the shapes of Qwen3-8B in bfloat16: `python -m
deploy.bench.kernels.small_gemm`.

For each batch size and matrix it tries launch configurations against the library's product: in a CUDA graph
that multiplies by the matrices of 36 layers one after the other, so that no weight comes from the cache; and
checks each against a float32 product. Then whole decode steps (deploy/bench/kernels/decode_chain.py) are
timed with the library's products and with the best found. `--save` puts these into the table that
small_products reads.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product as pairs
from pathlib import Path

import msgspec
import torch
import triton
from torch import Tensor

from deploy.bench.kernels.decode_chain import MATRICES, Matrix, Weights, bench_chains
from deploy.bench.kernels.kernel_times import (
    CUDA,
    DTYPE,
    PEAK_BYTES_PER_S,
    Call,
    graph_time_s,
)
from services.engine.ops import tuning
from services.engine.ops.dependent_launch import ordinary_launches
from services.engine.ops.small_gemm import (
    LIBRARY,
    ProductConfig,
    RowProduct,
    TileProduct,
    least_tokens,
    multiply,
)

BATCHES = ((1, 64, 256), (128, 8, 32, 16, 4, 2))
"""First those of which whole steps are measured, then the others, as far as time allows."""
NO_LIMIT = 1 << 16
ROW_GRID = (  # rows (half as many of gate and up each), inner, warps, programs a processor
    (4, 2048, 4, NO_LIMIT), (4, 4096, 8, NO_LIMIT), (2, 4096, 4, NO_LIMIT), (8, 1024, 4, NO_LIMIT),
    (4, 2048, 4, 4), (4, 4096, 8, 2),
)  # fmt: skip
TILE_GRIDS: tuple[tuple[int, tuple[tuple[int, int, int, int, bool], ...]], ...] = (
    # up to so many tokens: rows, inner, warps, stages, descriptors
    (8, (
        (16, 256, 1, 6, False), (16, 512, 4, 4, False), (32, 256, 4, 4, False), (64, 128, 4, 4, True),
        (64, 256, 4, 3, True), (64, 128, 4, 4, False), (128, 128, 8, 3, True),
    )),
    (32, (
        (16, 512, 4, 3, False), (32, 256, 4, 4, False), (64, 128, 4, 4, True), (64, 128, 4, 6, True),
        (64, 256, 4, 3, True), (64, 128, 4, 4, False), (128, 128, 8, 3, True),
    )),
    (64, (
        (64, 64, 4, 4, True), (64, 128, 4, 3, True), (64, 128, 4, 3, False), (128, 128, 8, 3, True),
        (128, 64, 4, 4, True), (128, 64, 8, 4, True),
    )),
    (256, (
        (64, 64, 4, 4, True), (64, 128, 4, 3, True), (128, 64, 8, 3, True), (128, 128, 8, 2, True),
        (128, 64, 8, 4, True), (64, 64, 8, 4, True), (64, 64, 4, 3, False),
    )),
)  # fmt: skip
ATOL, RTOL = 4e-3, 2**-8
"""Of results of about the size 1: one rounding to bfloat16, and float32 sums in another order."""


@dataclass(frozen=True, slots=True)
class GemmResult:
    tokens: int
    matrix: str
    config: ProductConfig
    dependent: bool
    time_s: float
    excess: float
    """Of the largest error over RTOL times the result."""


def describe(config: ProductConfig) -> str:
    match config:
        case RowProduct():
            limit = "" if config.programs_per_processor == NO_LIMIT else f" p{config.programs_per_processor}"
            return f"row {config.block_rows}x{config.block_inner} w{config.num_warps}{limit}"
        case TileProduct():
            tile = f"{config.block_tokens}t {config.block_rows}x{config.block_inner} /{config.splits}"
            loads = f"{'tma' if config.descriptors else 'ptr'} pf{config.prefetch_bytes}"
            return f"tile {tile} w{config.num_warps} s{config.num_stages} {loads}"
        case _:
            return "library"


def rows_for_one(matrix: Matrix) -> Iterator[RowProduct]:
    for rows, inner, warps, programs in ROW_GRID:
        if matrix.inner <= 6 * inner:  # the loop over the inner dimension is unrolled
            yield RowProduct(rows // 2 if matrix.gated else rows, inner, warps, programs)


def tiles_for(tokens: int, matrix: Matrix) -> Iterator[TileProduct]:
    """Tiles that fit, each with one or two numbers of splits."""
    block_tokens = min(256, max(8, triton.next_power_of_2(tokens)))
    grid = next(grid for most, grid in TILE_GRIDS if block_tokens <= most)
    sizes = (128, 256) if block_tokens == 256 else (block_tokens,)
    for size, (rows, inner, warps, stages, descriptors) in pairs(sizes, grid):
        height = rows * (2 if matrix.gated else 1)
        accumulators = height * size // (32 * warps)  # registers of each thread, of 255
        if accumulators > 128 or stages * (height + size) * inner * 2 > 224 * 1024:
            continue
        blocks = -(-matrix.results // rows) * -(-tokens // size)
        for splits in splits_of(blocks, matrix.inner, inner):
            yield TileProduct(
                max(size, least_tokens(rows)), rows, inner, splits, warps, stages, descriptors, 2048
            )


def splits_of(blocks: int, inner: int, block_inner: int) -> list[int]:
    """The powers of two that give at least about one and two programs to each of 132 multiprocessors."""
    found: list[int] = []
    for wanted in (120, 240):
        splits = 1
        while blocks * splits < wanted and inner // splits >= 4 * block_inner and splits < 8:
            splits *= 2
        if splits not in found:
            found.append(splits)
    return found


class Search:
    """Starts no measurement after `budget_s`."""

    def __init__(self, weights: Weights, budget_s: float) -> None:
        self.weights = weights
        self.deadline_s = time.monotonic() + budget_s
        self.results: list[GemmResult] = []
        self.skipped: list[str] = []

    def compile(self, tokens: int) -> None:
        """All first candidates in parallel: a launch compiles, mostly outside the interpreter's lock."""
        jobs = [(matrix, config) for matrix in MATRICES for config in candidates(tokens, matrix)]
        seen: set[tuple[bool, int, ProductConfig]] = set()
        x = {matrix.inner: self.inputs(tokens, matrix) for matrix in MATRICES}
        with ThreadPoolExecutor(max_workers=16) as pool:
            for matrix, config in jobs:
                key = (matrix.gated, matrix.inner if isinstance(config, RowProduct) else 0, config)
                if key not in seen and time.monotonic() < self.deadline_s:
                    seen.add(key)
                    pool.submit(self._try, x[matrix.inner], matrix, config)
        torch.cuda.synchronize()

    def _try(self, x: Tensor, matrix: Matrix, config: ProductConfig) -> None:
        multiply(x, self.weights.of(matrix)[0], None, config, gated=matrix.gated)

    def inputs(self, tokens: int, matrix: Matrix) -> Tensor:
        return torch.randn((tokens, matrix.inner), dtype=DTYPE, device=CUDA)

    def search(self, tokens: int, matrix: Matrix) -> None:
        """The library, all candidates, then the best with other prefetching and with ordinary launches."""
        x = self.inputs(tokens, matrix)
        expected = x.float() @ self.weights.of(matrix)[0].float().T
        if matrix.gated:
            gate, up = expected.chunk(2, dim=-1)
            expected = gate / (1 + torch.exp(-gate)) * up
        self.measure(tokens, matrix, LIBRARY, x, expected, dependent=False)
        for config in candidates(tokens, matrix):
            self.measure(tokens, matrix, config, x, expected)
        if not self._of(tokens, matrix):
            return
        best = self.best(tokens, matrix)
        if isinstance(best.config, TileProduct):
            for prefetch_bytes in (0, 512, 8192):
                other = msgspec.structs.replace(best.config, prefetch_bytes=prefetch_bytes)
                self.measure(tokens, matrix, other, x, expected)
        if best.config != LIBRARY and tokens in BATCHES[0]:
            self.measure(tokens, matrix, best.config, x, expected, dependent=False)

    def measure(
        self,
        tokens: int,
        matrix: Matrix,
        config: ProductConfig,
        x: Tensor,
        expected: Tensor,
        *,
        dependent: bool = True,
    ) -> None:
        name = f"{tokens} {matrix.name} {describe(config)}"
        if time.monotonic() > self.deadline_s:
            self.skipped.append(f"{name}: no time left")
            return
        weights = self.weights.of(matrix)
        calls: list[Call] = [
            partial(multiply, x, weight, None, config, gated=matrix.gated) for weight in weights
        ]
        try:
            found = multiply(x, weights[0], None, config, gated=matrix.gated).float()
            excess = float(((found - expected).abs() - RTOL * expected.abs()).max())
            if dependent:
                time_s = graph_time_s(calls)
            else:
                with ordinary_launches():
                    time_s = graph_time_s(calls)
        except Exception as error:  # a setting this GPU cannot take is a finding, and the others still count
            self.skipped.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:80]}")
            return
        # The library is what the others are measured by; it rounds gate and up before they meet.
        if config != LIBRARY and not excess < ATOL:
            self.skipped.append(f"{name}: WRONG by {excess:.3g}")
            return
        self.results.append(GemmResult(tokens, matrix.name, config, dependent, time_s, excess))

    def best(self, tokens: int, matrix: Matrix) -> GemmResult:
        return min(self._of(tokens, matrix), key=lambda one: one.time_s)

    def _of(self, tokens: int, matrix: Matrix) -> list[GemmResult]:
        return [one for one in self.results if (one.tokens, one.matrix) == (tokens, matrix.name)]

    def measured(self) -> list[int]:
        """Batch sizes with results for every matrix."""
        have = {(one.tokens, one.matrix) for one in self.results}
        batches = sorted(tokens for group in BATCHES for tokens in group)
        return [one for one in batches if all((one, matrix.name) in have for matrix in MATRICES)]

    def table(self) -> tuning.Table:
        table: tuning.Table = {"linear": {}, "gate_up": {}}
        for tokens, matrix in pairs(self.measured(), MATRICES):
            entries = table["gate_up" if matrix.gated else "linear"]
            config = self.best(tokens, matrix).config
            entries[(tokens, matrix.rows, matrix.inner)] = msgspec.to_builtins(config)
        return table

    def report(self) -> None:
        reasons = Counter(line.split(": ", 1)[1] for line in self.skipped)
        for reason, count in reasons.most_common(12):
            first = next(line for line in self.skipped if line.endswith(reason))
            print(f"skipped {count}, the first: {first}")
        print("us and TB/s: library | best of ours, its largest error over rtol | without dependent launches")
        for tokens in self.measured():
            sums = [0.0, 0.0]
            for matrix in MATRICES:
                (library, *_), ours = (
                    [one for one in self._of(tokens, matrix) if (one.config == LIBRARY) is wanted]
                    for wanted in (True, False)
                )
                cells = [f"{tokens:>3} {matrix.name:<8}", rate(matrix, library.time_s)]
                if ours:
                    best = min(ours, key=lambda one: one.time_s)
                    cells.append(f"{rate(matrix, best.time_s)} {best.excess:.0e} {describe(best.config)}")
                    plain = [one.time_s for one in ours if not one.dependent]
                    cells.append(f"{min(plain) * 1e6:.1f}" if plain else "-")
                print(" | ".join(cells))
                sums[0] += library.time_s * matrix.layers
                sums[1] += self.best(tokens, matrix).time_s * matrix.layers
            print(f"{tokens:>3} a step: library {sums[0] * 1e3:.3f} ms, best {sums[1] * 1e3:.3f} ms")


def candidates(tokens: int, matrix: Matrix) -> list[ProductConfig]:
    rows = list(rows_for_one(matrix)) if tokens == 1 else []
    return [*rows, *tiles_for(tokens, matrix)]


def rate(matrix: Matrix, time_s: float) -> str:
    return f"{time_s * 1e6:6.1f} {matrix.rows * matrix.inner * 2 / time_s / 1e12:.2f}"


def run(out: Path | None, budget_s: float, save: Path | None) -> int:
    """1. Make weights; 2. search for the batch sizes of the first group, and time whole steps of these;
    3. search for the others; 4. report, and save."""
    if not torch.cuda.is_available():
        print("the products' benchmark needs an NVIDIA GPU", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    started = time.monotonic()
    weights = Weights()
    search = Search(weights, budget_s)
    chains: list[str] = []
    with torch.inference_mode():
        for group in BATCHES:
            for tokens in group:
                search.compile(tokens)
                print(f"{time.monotonic() - started:5.0f} s: compiled for {tokens}", flush=True)
                for matrix in MATRICES:
                    search.search(tokens, matrix)
                print(f"{time.monotonic() - started:5.0f} s: measured {tokens}", flush=True)
            if not chains:
                best = {
                    tokens: {matrix.name: search.best(tokens, matrix).config for matrix in MATRICES}
                    for tokens in search.measured()
                }
                chains = bench_chains(weights, best)
                print(f"{time.monotonic() - started:5.0f} s: chains", *chains, sep="\n", flush=True)
    search.report()
    print(*chains, sep="\n")
    gpu = torch.cuda.get_device_name()
    if save is not None:
        print(f"saved {tuning.save(search.table(), gpu, save)}")
    if out is not None:
        report = {
            "device": gpu,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "peak_bytes_per_s": PEAK_BYTES_PER_S,
            "results": [{**asdict(one), "config": describe(one.config)} for one in search.results],
            "chains": chains,
            "skipped": search.skipped,
            "table": {
                kernel: {"x".join(map(str, shape)): config for shape, config in entries.items()}
                for kernel, entries in search.table().items()
            },
        }
        out.write_text(json.dumps(report, indent=1))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.bench.kernels.small_gemm", description=__doc__)
    parser.add_argument("--out", type=Path, help="file for all results as JSON")
    parser.add_argument("--budget-s", type=float, default=150.0, help="start no measurement after this")
    parser.add_argument(
        "--save",
        type=Path,
        nargs="?",
        const=tuning.user_directory(),
        help="put the best into the table of this GPU, in the user's cache directory or in the one given",
    )
    options = parser.parse_args()
    return run(options.out, options.budget_s, options.save)


if __name__ == "__main__":
    sys.exit(main())
