"""Llama 2 and 3: full attention, biases only where the configuration asks for them."""

from torch import Tensor

from services.engine.kv_pool import KvPool
from services.engine.layers import Attention, Decoder, DecoderLayer, GatedMlp
from services.engine.model_config import ModelConfig
from services.engine.ops.rms_norm import add_rms_norm
from services.engine.parameters import Parameters
from services.engine.step_inputs import StepInputs


class LlamaLayer(DecoderLayer):
    def __init__(self, model: ModelConfig, parameters: Parameters, layer: int) -> None:
        name = f"model.layers.{layer}."
        self.eps = model.rms_norm_eps
        self.attention_norm = parameters.tensor(name + "input_layernorm.weight", model.hidden_size)
        self.attention = Attention(
            model, parameters, layer, qkv_bias=model.qkv_bias, output_bias=model.output_bias
        )
        self.mlp_norm = parameters.tensor(name + "post_attention_layernorm.weight", model.hidden_size)
        self.mlp = GatedMlp(model, parameters, layer, bias=model.mlp_bias)

    def forward(
        self, x: Tensor, residual: Tensor, step: StepInputs, cos: Tensor, sin: Tensor, pool: KvPool
    ) -> tuple[Tensor, Tensor]:
        x, residual = add_rms_norm(x, residual, self.attention_norm, self.eps)
        x = self.attention.forward(x, step, cos, sin, pool)
        x, residual = add_rms_norm(x, residual, self.mlp_norm, self.eps)
        return self.mlp.forward(x), residual


class LlamaDecoder(Decoder):
    def make_layer(self, parameters: Parameters, layer: int) -> DecoderLayer:
        return LlamaLayer(self.model, parameters, layer)
