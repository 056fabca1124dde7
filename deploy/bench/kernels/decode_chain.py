"""Whole decode steps from the kernels alone, at the shape of Qwen3-8B: norm, qkv, rotation and KV write,
attention at context 1024, output, norm, gate and up, down, 36 times; then the final norm and the logits."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deploy.bench.kernels.attention_kernels import EPS
from deploy.bench.kernels.kernel_times import (
    CUDA,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KV_HEADS,
    LAYERS,
    TOKEN_LAYER_BYTES,
    graph_time_s,
    integers,
    pool_of,
    rows,
    tables_of,
)
from services.engine.attention.decode_attention import decode_attention_kernel, decode_splits
from services.engine.ops.dependent_launch import ordinary_launches
from services.engine.ops.processors import processors
from services.engine.ops.qkv import qkv_to_pool_kernel
from services.engine.ops.rms_norm import add_rms_norm_kernel
from services.engine.ops.small_gemm import LIBRARY, ProductConfig, multiply

VOCABULARY = 151936
CONTEXT_TOKENS = 1024
PAGE_SIZE_TOKENS = 64
REPEATS = 10


@dataclass(frozen=True, slots=True)
class Matrix:
    """`[rows, inner]`, in `layers` layers."""

    name: str
    rows: int
    inner: int
    layers: int = LAYERS
    gated: bool = False

    @property
    def results(self) -> int:
        return self.rows // 2 if self.gated else self.rows


QKV = Matrix("qkv", (HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN)
OUTPUT = Matrix("o", HIDDEN, HEADS * HEAD_DIM)
GATE_UP = Matrix("gate_up", 2 * INTERMEDIATE, HIDDEN, gated=True)
DOWN = Matrix("down", HIDDEN, INTERMEDIATE)
LOGITS = Matrix("lm_head", VOCABULARY, HIDDEN, layers=1)
MATRICES = (QKV, OUTPUT, GATE_UP, DOWN, LOGITS)


class Weights:
    """Random ones that keep the size of what they are multiplied with. Of the logits' there are two, so that
    none comes from the cache."""

    def __init__(self) -> None:
        self._weights: dict[str, list[Tensor]] = {}
        for matrix in MATRICES:
            copies = [rows(matrix.rows, matrix.inner) for _ in range(max(2, matrix.layers))]
            self._weights[matrix.name] = [copy.mul_(matrix.inner**-0.5) for copy in copies]
        torch.cuda.synchronize()  # weights may be read before the kernel that precedes a product has ended

    def of(self, matrix: Matrix) -> list[Tensor]:
        return self._weights[matrix.name]


class Chain:
    """One decode step of `tokens` sequences, its inputs at fixed addresses."""

    def __init__(self, weights: Weights, tokens: int, configs: Mapping[str, ProductConfig]) -> None:
        self.weights, self.tokens, self.configs = weights, tokens, configs
        self.start, self.norm = rows(tokens, HIDDEN), rows(HIDDEN)
        self.head_norm = rows(HEADS + KV_HEADS, HEAD_DIM)
        self.cos, self.sin = (torch.full((tokens, 1, HEAD_DIM), 0.5**0.5, device=CUDA) for _ in range(2))
        memory = rows(tokens * CONTEXT_TOKENS * LAYERS * TOKEN_LAYER_BYTES // 2)
        self.pool = pool_of(memory, PAGE_SIZE_TOKENS)
        self.tables = tables_of(self.pool, tokens, CONTEXT_TOKENS)
        self.lengths = integers(*[CONTEXT_TOKENS] * tokens)
        place = self.tables[:, -1].long() * (LAYERS * 2 * KV_HEADS * PAGE_SIZE_TOKENS) + PAGE_SIZE_TOKENS - 1
        heads = torch.arange(2 * KV_HEADS, device=CUDA) * PAGE_SIZE_TOKENS
        self.write_index = (place[:, None] + heads).reshape(-1)
        self.nonfinite = torch.zeros(tokens, dtype=torch.int32, device=CUDA)
        pool_rows = self.pool.view(-1, HEAD_DIM)
        layer_rows = 2 * KV_HEADS * PAGE_SIZE_TOKENS
        self.layer_rows = [pool_rows[layer * layer_rows :] for layer in range(LAYERS)]
        self.splits = decode_splits(tokens, KV_HEADS, CONTEXT_TOKENS, processors(CUDA))

    def multiply(self, x: Tensor, matrix: Matrix, layer: int) -> Tensor:
        weight = self.weights.of(matrix)[layer]
        return multiply(x, weight, None, self.configs[matrix.name], gated=matrix.gated)

    def step(self) -> Tensor:
        """Logits `[tokens, vocabulary]`."""
        x, residual = torch.zeros_like(self.start), self.start.clone()
        for layer in range(LAYERS):
            x, residual = add_rms_norm_kernel(x, residual, self.norm, EPS)
            qkv = self.multiply(x, QKV, layer).view(self.tokens, -1, HEAD_DIM)
            queries = qkv_to_pool_kernel(
                qkv,
                self.head_norm,
                EPS,
                self.cos,
                self.sin,
                self.layer_rows[layer],
                self.write_index,
                self.nonfinite,
            )
            mixed = decode_attention_kernel(
                queries,
                self.pool,
                layer,
                self.tables,
                self.lengths,
                HEAD_DIM**-0.5,
                splits=self.splits,
            )
            x = self.multiply(mixed.view(self.tokens, -1), OUTPUT, layer)
            x, residual = add_rms_norm_kernel(x, residual, self.norm, EPS)
            x = self.multiply(self.multiply(x, GATE_UP, layer), DOWN, layer)
        x, _ = add_rms_norm_kernel(x, residual, self.norm, EPS)
        return self.multiply(x, LOGITS, 0)


def bench_chains(weights: Weights, best: Mapping[int, Mapping[str, ProductConfig]]) -> list[str]:
    """Lines with the time of a step, for each batch size: the library's products and the best ones, each
    with ordinary and with dependent launches; and whether the latter give the same logits, bit for bit."""
    lines: list[str] = []
    for tokens, configs in best.items():
        library = Chain(weights, tokens, dict.fromkeys((matrix.name for matrix in MATRICES), LIBRARY))
        with ordinary_launches():
            cells = [f"library {graph_time_s([library.step]) * 1e3:.3f} ms"]
            reference = library.step()
        cells.append(f"dependent {graph_time_s([library.step]) * 1e3:.3f} ms")
        library.configs = configs
        with ordinary_launches():
            cells.append(f"ours {graph_time_s([library.step]) * 1e3:.3f} ms")
            expected = library.step()
        cells.append(f"dependent {graph_time_s([library.step]) * 1e3:.3f} ms")
        difference = float((expected.float() - reference.float()).norm() / reference.float().norm())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = library.step()
        same = 0
        for _ in range(REPEATS):
            graph.replay()
            same += torch.equal(found, expected)
        cells.append(f"logits {difference:.3f} off the library's, {same}/{REPEATS} replays the same")
        lines.append(f"step {tokens:>3}: " + ", ".join(cells))
    return lines
