"""A model family: everything that sets its models apart from other families', in one value.

`registry.py` lists them. A family's file is imported by the plan and the ledger too, which do without torch,
so what its layers need of torch is imported where a layer is made.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from services.engine.checkpoint.published_config import PublishedConfig
from services.engine.models.tensor_specs import TensorSpec

if TYPE_CHECKING:
    from services.engine.models.layers import DecoderLayer
    from services.engine.models.model_config import ModelConfig
    from services.engine.models.parameters import Parameters

Config = TypeVar("Config", bound=PublishedConfig)


def dense_layer(model: "ModelConfig", parameters: "Parameters", layer: int) -> "DecoderLayer":
    """Attention and one gated feed-forward. Biases and norms of heads are there if the tensors are."""
    from services.engine.models.layers import Attention, DecoderLayer, GatedMlp

    attention = Attention(model, parameters, layer)
    return DecoderLayer(
        model, parameters, layer, attention, GatedMlp(parameters, f"model.layers.{layer}.mlp.")
    )


def dense_width(config: PublishedConfig, tp: int) -> int:
    """Gate, up and their product."""
    return 3 * config.intermediate_size // tp


def named_tokenizer(named: Any, has_file: bool) -> str:
    """The class that the files name; without a tokenizer.json Llama's."""
    return str(named).removesuffix("Fast") if has_file else "LlamaTokenizer"


@dataclass(frozen=True, slots=True)
class Family(Generic[Config]):
    """`architecture` and `model_type` are the names in config.json, `config` its keys and their defaults."""

    architecture: str
    model_type: str
    config: type[Config]
    layer_tensors: Callable[[Config, int], Iterator[TensorSpec]]
    """The tensors of one layer of the whole model."""
    make_layer: "Callable[[ModelConfig, Parameters, int], DecoderLayer]" = dense_layer
    """Allocates one layer; the shape is that of this rank's part, as `sharding.rank_shape` has it."""
    feed_forward_width: Callable[[Config, int], int] = dense_width
    """Numbers a token that the widest moment of a feed-forward holds on one of so many ranks, beside the
    residual and its input."""
    tokenizer_class: Callable[[Any, bool], str] = named_tokenizer
    """The class that transformers takes, by the one that the files name and whether there is a
    tokenizer.json; empty where it has no default of its own."""
    harmless_keys: Mapping[str, str] = field(default_factory=dict)
    """Keys of config.json that this family alone has and that change no token, and why."""
    full_attention_only: bool = False
    """Refuses sliding windows."""
    captures_graphs: bool = True
    """Whether a decode step waits for nothing on the host, so that a CUDA graph can hold it."""

    @property
    def name(self) -> str:
        return self.architecture.removesuffix("ForCausalLM")

    @property
    def own_keys(self) -> set[str]:
        """Keys of config.json that this family alone has."""
        return {*self.config.own_keys(), *self.harmless_keys}
