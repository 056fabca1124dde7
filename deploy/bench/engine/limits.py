"""What the hardware would allow, from bytes and operations. Pure.

A row takes at least the larger of

    bytes it must read / read bandwidth      and      floating-point operations / matmul rate

with the bandwidth and the rate that were measured on this device: a bound for any order and overlap of the
work (Williams et al., Roofline, 2009). Weights are read once a step, the KV of a sequence once a step; of a
router's experts only those that so many tokens, choosing at random, can be expected to ask for. A product
does 2 operations a weight and token, attention 4 a query head, element of a head and pair of positions,
counting only pairs that the causal mask and a sliding window leave. Activations, norms, sampling and launches
are taken as free.

On one stream of kernels the products with the weights and attention do not overlap. That closer bound, the
sum over these phases of each one's larger time, stands beside the limit.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from msgspec import Struct

from deploy.bench.engine.workload import Offline, PrefillRow
from services.config import Dtype
from services.engine.models.model_config import ModelConfig, dtype_bytes

FORMULA = (
    "limit = max((weights + KV bytes) / read bandwidth, (products + attention FLOP) / matmul rate)\n"
    "  weights and each sequence's KV are read once a step; products: 2 FLOP a weight and token, of the\n"
    "  output matrix a drawn token; attention: 4 FLOP a query head, head element and pair of positions\n"
    "one stream = the same for products and for attention by itself, added: kernels do not overlap there"
)


class Ceilings(Struct, frozen=True):
    """Rates of this device, measured."""

    read_bytes_per_s: float
    copy_bytes_per_s: float
    matmul_flop_per_s: float
    matmul_size: int
    matmul_dtype: str
    buffer_bytes: int
    fp8_flop_per_s: float | None = None
    """Of products of fp8 numbers, on a GPU that has them."""


class RooflinePhase(Struct, frozen=True):
    """What does the work `name` reads the bytes of `reads`. `fp8_flop` are not among `flop`."""

    name: str
    reads: str
    read_bytes: float
    flop: float
    fp8_flop: float = 0.0


def limit_s(phases: Iterable[RooflinePhase], ceilings: Ceilings) -> float:
    """The larger of all bytes and all operations."""
    each = list(phases)
    read_s = sum(phase.read_bytes for phase in each) / ceilings.read_bytes_per_s
    compute_s = sum(phase.flop for phase in each) / ceilings.matmul_flop_per_s
    fp8_flop_per_s = ceilings.fp8_flop_per_s or ceilings.matmul_flop_per_s
    return max(read_s, compute_s + sum(phase.fp8_flop for phase in each) / fp8_flop_per_s)


def one_stream_s(phases: Iterable[RooflinePhase], ceilings: Ceilings) -> float:
    """The sum of each phase's own limit."""
    return sum(limit_s([phase], ceilings) for phase in phases)


def formula(phases: Sequence[RooflinePhase], ceilings: Ceilings) -> str:
    """The limit with its figures, in milliseconds."""
    read = " + ".join(f"{phase.reads} {_with_unit(phase.read_bytes, 'B')}" for phase in phases)
    done = " + ".join(f"{phase.name} {_with_unit(phase.flop, 'FLOP')}" for phase in phases)
    work = f"({done}) / {_with_unit(ceilings.matmul_flop_per_s, 'FLOP/s')}"
    fp8_flop = sum(phase.fp8_flop for phase in phases)
    if fp8_flop:
        rate = ceilings.fp8_flop_per_s or ceilings.matmul_flop_per_s
        work += f" + fp8 {_with_unit(fp8_flop, 'FLOP')} / {_with_unit(rate, 'FLOP/s')}"
    return (
        f"max(({read}) / {_with_unit(ceilings.read_bytes_per_s, 'B/s')}, {work}) = "
        f"{limit_s(phases, ceilings) * 1e3:.4g} ms"
    )


@dataclass(frozen=True, slots=True)
class ModelCost:
    """`weights_bytes` are those a step reads: of the input embedding it reads next to nothing.

    `layer_weights` multiply a token, `output_weights` those that are drawn from. `expert_bytes` of all bytes
    are of experts, of which a token is multiplied with `expert_share`.
    """

    weights_bytes: int
    layer_weights: float
    output_weights: int
    kv_layer_token_bytes: float
    pair_flop: int
    windows: tuple[int | None, ...]
    fp8_layers: bool = False
    """Whether the layers' products are of fp8 numbers; the output matrix's never are."""
    expert_bytes: int = 0
    expert_share: float = 1.0

    def decode(self, batch: int, context: float) -> list[RooflinePhase]:
        """One step of `batch` sequences that each attend to `context` positions."""
        return [
            self._products(self._read_bytes(batch), batch, batch),
            self._decode_attention("attention", batch, [context]),
        ]

    def prefill(self, row: PrefillRow) -> list[RooflinePhase]:
        """Weights once, however many steps the prompts take: no schedule could do with less."""
        return [
            self._products(
                self._read_bytes(row.requests * row.tokens), row.requests * row.tokens, row.requests
            ),
            self._prompt_attention("attention", row.requests, row.tokens),
        ]

    def offline(self, row: Offline, max_batch: int) -> list[RooflinePhase]:
        """Weights as often as full batches need steps for all tokens but the first ones."""
        samples, decoded = row.requests * row.output_tokens, row.requests * (row.output_tokens - 1)
        steps = max(1, -(-decoded // max_batch))
        tokens = row.requests * row.input_tokens + decoded
        contexts = [row.input_tokens + done for done in range(1, row.output_tokens)]
        return [
            self._products(steps * self._read_bytes(tokens / steps), tokens, samples),
            self._prompt_attention("prompts' attention", row.requests, row.input_tokens),
            self._decode_attention("decode attention", row.requests, contexts),
        ]

    def _read_bytes(self, tokens: float) -> float:
        """Weights that a step of so many tokens reads."""
        unread: float = self.expert_bytes * (1.0 - self.expert_share) ** tokens
        return self.weights_bytes - unread

    def _products(self, read_bytes: float, tokens: int, samples: int) -> RooflinePhase:
        layers, output = 2.0 * tokens * self.layer_weights, 2.0 * samples * self.output_weights
        if self.fp8_layers:
            return RooflinePhase("products", "weights", read_bytes, output, layers)
        return RooflinePhase("products", "weights", read_bytes, layers + output)

    def _decode_attention(self, name: str, sequences: int, contexts: Sequence[float]) -> RooflinePhase:
        pairs = 0.0
        for window in self.windows:
            pairs += sum(context if window is None else min(context, window) for context in contexts)
        pairs *= sequences
        return RooflinePhase(name, "KV", pairs * self.kv_layer_token_bytes, pairs * self.pair_flop)

    def _prompt_attention(self, name: str, sequences: int, tokens: int) -> RooflinePhase:
        pairs = 0
        for window in self.windows:
            seen = tokens if window is None else min(tokens, window)
            pairs += seen * (seen + 1) // 2 + (tokens - seen) * seen
        read_bytes = sequences * tokens * len(self.windows) * self.kv_layer_token_bytes
        return RooflinePhase(name, "KV", read_bytes, float(sequences * pairs * self.pair_flop))


def model_cost(
    model: ModelConfig, dtype: Dtype, weights_bytes: int, kv_token_bytes: float, fp8_layers: bool = False
) -> ModelCost:
    """`weights_bytes` and `kv_token_bytes` as they lie in memory, all layers together."""
    embedding = model.vocab_size * model.hidden_size
    matrices = [spec for spec in model.tensors if spec.layer is not None and len(spec.axes) == 2]
    experts = [spec for spec in matrices if spec.token_share < 1.0]
    return ModelCost(
        weights_bytes=weights_bytes - (0 if model.tied_embeddings else embedding * dtype_bytes(dtype)),
        layer_weights=sum(prod(spec.shape) * spec.token_share for spec in matrices),
        output_weights=embedding,
        kv_layer_token_bytes=kv_token_bytes / model.layers,
        pair_flop=4 * model.heads * model.head_dim,
        windows=model.windows,
        fp8_layers=fp8_layers,
        expert_bytes=sum(spec.rank_bytes(dtype_bytes(dtype), fp8_layers) for spec in experts),
        expert_share=experts[0].token_share if experts else 1.0,
    )


def _with_unit(value: float, unit: str) -> str:
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}"
