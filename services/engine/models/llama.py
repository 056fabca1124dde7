"""Llama 2 and 3: full attention, biases only where the configuration asks for them."""

from services.engine.models.layers import Attention, Decoder, DecoderLayer, GatedMlp
from services.engine.models.parameters import Parameters


class LlamaDecoder(Decoder):
    def make_layer(self, parameters: Parameters, layer: int) -> DecoderLayer:
        attention = Attention(
            self.model, parameters, layer, qkv_bias=self.model.qkv_bias, output_bias=self.model.output_bias
        )
        mlp = GatedMlp(self.model, parameters, layer, bias=self.model.mlp_bias)
        return DecoderLayer(self.model, parameters, layer, attention, mlp)
