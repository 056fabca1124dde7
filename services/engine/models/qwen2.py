"""Qwen2 and 2.5: biases on query, key and value, sliding windows in the layers that name one."""

from services.engine.models.layers import Attention, Decoder, DecoderLayer, GatedMlp
from services.engine.models.parameters import Parameters


class Qwen2Decoder(Decoder):
    def make_layer(self, parameters: Parameters, layer: int) -> DecoderLayer:
        attention = Attention(self.model, parameters, layer, qkv_bias=True, window=self.model.windows[layer])
        mlp = GatedMlp(self.model, parameters, layer)
        return DecoderLayer(self.model, parameters, layer, attention, mlp)
