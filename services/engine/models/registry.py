"""Which decoder runs which architecture."""

from services.engine.checkpoint.model_config import ModelConfig
from services.engine.errors import CheckpointError
from services.engine.models.layers import Decoder
from services.engine.models.llama import LlamaDecoder
from services.engine.models.mistral import MistralDecoder
from services.engine.models.parameters import Parameters
from services.engine.models.qwen2 import Qwen2Decoder
from services.engine.models.qwen3 import Qwen3Decoder

DECODERS: dict[str, type[Decoder]] = {
    "LlamaForCausalLM": LlamaDecoder,
    "MistralForCausalLM": MistralDecoder,
    "Qwen2ForCausalLM": Qwen2Decoder,
    "Qwen3ForCausalLM": Qwen3Decoder,
}


def make_decoder(model: ModelConfig, parameters: Parameters) -> Decoder:
    """Allocate the model's decoder, unfilled. Raises `CheckpointError` for an unknown architecture."""
    decoder = DECODERS.get(model.architecture)
    if decoder is None:
        raise CheckpointError(
            f"architecture {model.architecture!r} is not supported (supported: {', '.join(DECODERS)})"
        )
    return decoder(model, parameters)
