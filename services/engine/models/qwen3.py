"""Qwen3, dense: query and key heads are normalised before the rotation; windows as in Qwen2."""

from services.engine.models.layers import Attention, Decoder, DecoderLayer, GatedMlp
from services.engine.models.parameters import Parameters


class Qwen3Decoder(Decoder):
    def make_layer(self, parameters: Parameters, layer: int) -> DecoderLayer:
        attention = Attention(
            self.model,
            parameters,
            layer,
            qkv_bias=self.model.qkv_bias,
            output_bias=self.model.output_bias,
            head_norm=True,
            window=self.model.windows[layer],
        )
        mlp = GatedMlp(self.model, parameters, layer)
        return DecoderLayer(self.model, parameters, layer, attention, mlp)
