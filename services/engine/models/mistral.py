"""Mistral: no biases, and (in its first version) one sliding window in every layer."""

from services.engine.models.layers import Attention, Decoder, DecoderLayer, GatedMlp
from services.engine.models.parameters import Parameters


class MistralDecoder(Decoder):
    def make_layer(self, parameters: Parameters, layer: int) -> DecoderLayer:
        attention = Attention(self.model, parameters, layer, window=self.model.windows[layer])
        mlp = GatedMlp(self.model, parameters, layer)
        return DecoderLayer(self.model, parameters, layer, attention, mlp)
