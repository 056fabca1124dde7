"""Which precision options go together: what is refused at start, by name and with what is supported."""

from services.config import WorkerConfig
from services.engine.models.model_config import ModelConfig

FP8_CAPABILITY = (8, 9)
"""The first NVIDIA generation that converts and multiplies fp8."""
FP8_ALIGNMENT = 16
"""Rows and columns of an fp8 product on a GPU come in multiples of this."""


class PrecisionError(ValueError):
    """Options that cannot be combined, on this device or with this model. Nothing has been allocated."""


def check_flags(config: WorkerConfig) -> None:
    """What does not depend on the model. Raises `PrecisionError`."""
    if config.quantization == "fp8" and config.device == "cuda" and config.dtype != "bfloat16":
        raise PrecisionError(
            f"--quantization fp8 on cuda with --dtype {config.dtype} is not supported "
            "(supported: --dtype bfloat16)"
        )


def check_precision(config: WorkerConfig, model: ModelConfig) -> None:
    """Raises `PrecisionError` if these options cannot run this model, which is divided among `config.tp`
    ranks."""
    check_flags(config)
    if config.quantization == "fp8" and config.device == "cuda":
        matrices = [spec for spec in model.tensors if spec.quantisable]
        for axis in dict.fromkeys(axis for spec in matrices for axis in spec.axes):
            name, size = axis.key, axis.rank_size(config.tp)
            if size % FP8_ALIGNMENT:
                raise PrecisionError(
                    f"--quantization fp8 on cuda: {name} is {size} "
                    f"(supported: multiples of {FP8_ALIGNMENT}); use --quantization none"
                )


def check_capability(config: WorkerConfig, capability: tuple[int, int]) -> None:
    """`capability` is the GPU's compute capability. Raises `PrecisionError`."""
    if capability >= FP8_CAPABILITY:
        return
    for flag, value in (("--kv-dtype", config.kv_dtype), ("--quantization", config.quantization)):
        if value == "fp8":
            raise PrecisionError(
                f"{flag} fp8: this GPU has compute capability {capability[0]}.{capability[1]} "
                f"(supported: {FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]} and later)"
            )
