"""An engine with a KV cache or linear layers of fp8: scales, sizes, what travels, how far results move."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.config import WorkerConfig
from services.engine.checkpoint.safetensors_files import SINGLE_NAME
from services.engine.engine import Engine
from services.engine.errors import CheckpointError
from services.engine.models.kv_scales import kv_scales
from services.engine.models.layers import Decoder
from services.engine.models.model_config import read_model_config
from services.engine.models.parameters import Parameters
from services.engine.models.stored_tensors import model_digest
from services.engine.models.weights import fill_dummy, load_safetensors
from services.engine.ops.fp8 import FP8, FP8_MAX, quantise_rows
from services.engine.precision import PrecisionError, check_capability, check_precision
from services.protocol.messages import Sampling
from tests.checkpoints import FAMILIES, YARN_ROPE, Family, make_checkpoint
from tests.engine.harness import (
    Sequence,
    packed,
    prompt_of,
    run_together,
    scattered_pages,
    start_engine,
    unpacked,
)

CPU = torch.device("cpu")
SAMPLED = Sampling(max_tokens=1, seed=11, temperature=0.9, top_p=0.95)


def _ignore(done_bytes: int, total_bytes: int) -> None:
    pass


def _load(model_dir: Path, quantization: Any = "fp8", dtype: torch.dtype = torch.float32) -> Parameters:
    model = read_model_config(model_dir)
    parameters = Parameters(model.tensors, dtype, CPU, quantization)
    Decoder(model, parameters)
    with torch.inference_mode():
        load_safetensors(model, parameters, _ignore)
    return parameters


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the weights


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_only_linear_layers_are_quantised_and_all_bytes_are_counted(
    family: Family, tied: bool, tmp_path: Path
) -> None:
    make_checkpoint(family, tmp_path, tied=tied)
    model = read_model_config(tmp_path)
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        parameters = _load(tmp_path, dtype=dtype)
        assert parameters.byte_count == model.parameter_bytes(name, "fp8")  # type: ignore[arg-type]
    kept = {"model.embed_tokens.weight", "lm_head.weight"}
    matrices = {name for name, shape in model.tensor_shapes().items() if len(shape) == 2}
    assert set(parameters.scales) == {
        name for name in matrices - kept if not name.endswith("mlp.gate.weight")
    }
    for name, stored in load_file(tmp_path / SINGLE_NAME).items():
        found = parameters.values(name)
        if name in parameters.scales:
            largest = stored.abs().amax(dim=1, keepdim=True)
            assert bool(((found - stored).abs() <= largest / 28 * 1.001).all())
        else:
            assert torch.equal(found, stored.to(torch.bfloat16).double().expand_as(found))


def test_dummy_weights_are_those_of_the_model_without_quantization(tmp_path: Path) -> None:
    make_checkpoint("qwen2", tmp_path)
    model = read_model_config(tmp_path)
    filled = []
    for quantization in ("none", "fp8"):
        parameters = Parameters(model.tensors, torch.bfloat16, CPU, quantization)  # type: ignore[arg-type]
        Decoder(model, parameters)
        fill_dummy(parameters, _ignore)
        filled.append(parameters)
    plain, quantised = filled
    for name, view in plain.views.items():
        if name not in quantised.scales:
            assert torch.equal(view, quantised.views[name])
            continue
        expected, scale = quantise_rows(view)
        assert torch.equal(quantised.views[name].view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(quantised.scales[name], scale)


# ---------------------------------------------------------------- scales of the KV cache


@pytest.mark.parametrize("quantization", ["none", "fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_input_exceeds_its_scale_and_the_worst_comes_close(
    family: Family, quantization: str, tmp_path: Path
) -> None:
    make_checkpoint(family, tmp_path, rope=YARN_ROPE)
    model = read_model_config(tmp_path)
    parameters = _load(tmp_path, quantization)
    scales = kv_scales(model, parameters, True)
    assert (scales.dtype, tuple(scales.shape)) == (torch.float32, (model.layers, 2, model.kv_heads))
    assert bool((scales.log2() == scales.log2().round()).all())
    for layer in range(model.layers):
        prefix = f"model.layers.{layer}."
        gain = parameters.values(prefix + "input_layernorm.weight")
        weight = parameters.values(prefix + "self_attn.v_proj.weight")
        bias = torch.zeros(weight.shape[0], dtype=torch.float64)
        if parameters.has(prefix + "self_attn.v_proj.bias"):
            bias = parameters.values(prefix + "self_attn.v_proj.bias")
        # each row's own direction, which Cauchy and Schwarz say is the worst, and some that are not
        worst = weight * gain * bias.sign().where(bias != 0, 1.0)[:, None]
        inputs = torch.cat((worst, _random(50, 64).double()))
        normed = F.rms_norm(inputs, (model.hidden_size,)) * gain
        largest = (normed @ weight.T + bias).abs().amax(dim=0).view(model.kv_heads, -1).amax(dim=1)
        limit = FP8_MAX * scales[layer, 1].double()
        assert bool((largest <= limit * 1.000001).all())
        assert bool((largest > limit / 2 * 0.999).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_saturates_in_a_running_engine(family: Family, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path, seed=3, eos=False, rope=YARN_ROPE)
    engines = [start_engine(tmp_path), start_engine(tmp_path, kv_dtype="fp8")]
    for engine in engines:
        run_together(engine, [Sequence(prompt_of(60), list(range(20)))], 8)
    plain, quantised = (engine.pool for engine in engines)
    assert quantised.scales is not None
    assert quantised.data.dtype == FP8
    assert float(quantised.data.float().abs().max()) < FP8_MAX
    first = quantised.data.float() * quantised.scales[None, :, :, :, None, None]
    # layer 0 has seen the same input in both: each number is off by half of its last digit at most
    wanted, found = plain.data[:15, 0], first[:15, 0]
    least = quantised.scales[0].amax() * 2.0**-10
    assert bool(((found - wanted).abs() <= wanted.abs() / 16 * 1.001 + least).all())
    assert not torch.equal(found, wanted)


def _with_scales(model_dir: Path, scales: dict[str, Tensor]) -> None:
    tensors = load_file(model_dir / SINGLE_NAME)
    tensors |= {f"model.layers.{name}": value for name, value in scales.items()}
    save_file(tensors, model_dir / SINGLE_NAME)


def test_scales_of_the_checkpoint_count(tmp_path: Path) -> None:
    make_checkpoint("qwen3", tmp_path)
    model = read_model_config(tmp_path)
    derived = kv_scales(model, _load(tmp_path, "none"), True)
    _with_scales(
        tmp_path,
        {
            "0.self_attn.k_scale": torch.tensor(0.03),
            "1.self_attn.v_proj.v_scale": torch.tensor([0.5, 0.7]),
        },
    )
    found = kv_scales(model, _load(tmp_path, "none"), True)
    assert found[0, 0].tolist() == pytest.approx([0.03, 0.03])
    assert found[1, 1].tolist() == pytest.approx([0.5, 0.7])
    assert torch.equal(found[0, 1], derived[0, 1])
    assert torch.equal(found[1, 0], derived[1, 0])
    start_engine(tmp_path)  # and where no fp8 is asked for they are no unexpected tensors


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(3), "must hold one positive scale, or one for each of the 2 KV heads"),
        (torch.tensor(-1.0), "must hold one positive scale"),
        (torch.tensor(torch.nan), "must hold one positive scale"),
        (torch.tensor(torch.inf), "is not finite"),
    ],
)
def test_scales_that_cannot_be_used_are_refused(value: Tensor, message: str, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    _with_scales(tmp_path, {"1.self_attn.k_scale": value})
    with pytest.raises(CheckpointError, match=rf"model\.layers\.1\.self_attn\.k_scale {message}"):
        start_engine(tmp_path, kv_dtype="fp8")


# ---------------------------------------------------------------- engines


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_kv_that_travelled_gives_the_same_tokens(family: Family, quantization: str, tmp_path: Path) -> None:
    """Prefill here, decode there, with other pages: as one engine that does both, chunked, in company."""
    make_checkpoint(family, tmp_path, seed=5, eos=False)
    options = {"kv_dtype": "fp8", "quantization": quantization}
    prompt = prompt_of(37, seed=1)

    alone = start_engine(tmp_path, **options)
    expected = run_together(alone, [Sequence(prompt, list(range(20)), SAMPLED)], 12)[0]
    company = start_engine(tmp_path, **options)
    tables = scattered_pages(20, 3, 128)
    others = [Sequence(prompt_of(21, seed=2), tables[1], chunk=5), Sequence(prompt_of(9, seed=3), tables[2])]
    assert run_together(company, [Sequence(prompt, tables[0], SAMPLED, chunk=7), *others], 12)[0] == expected

    source = start_engine(tmp_path, **options)
    destination = start_engine(tmp_path, page_size_tokens=16, **options)
    sequence = Sequence(prompt, tables[0], SAMPLED)
    sequence.take(source.execute([sequence.next_row()])[0])
    slot = bytearray(1 << 16)
    byte_count, checksum = packed(source, sequence.pages, 0, 37, memoryview(slot), True)
    assert byte_count == 37 * source.geometry.token_bytes == 37 * 2 * 2 * 2 * 16
    assert source.geometry == destination.geometry
    sequence.pages = [9, 3, 7, 5]
    unpacked(destination, sequence.pages, 0, 37, memoryview(slot)[:byte_count], checksum)
    again = bytearray(1 << 16)
    assert packed(destination, sequence.pages, 0, 37, memoryview(again), True) == (byte_count, checksum)
    assert again == slot
    assert run_together(destination, [sequence], 12)[0] == expected


@pytest.mark.parametrize(
    ("options", "most"), [({"kv_dtype": "fp8"}, 0.06), ({"quantization": "fp8"}, 0.12)], ids=["kv", "linear"]
)
def test_results_move_a_little_and_no_more(options: dict[str, Any], most: float, tmp_path: Path) -> None:
    """Log probabilities of a prompt of a random model, which is less forgiving than a trained one. Heads have
    scales that lie far apart, so that a number read with another's would be lost."""
    make_checkpoint("qwen3", tmp_path, seed=6, eos=False, head_dim=32)
    apart = {"0.self_attn.k_scale": [0.04, 1.0], "0.self_attn.v_scale": [0.5, 0.02]}
    apart |= {"1.self_attn.k_scale": [0.7, 0.05], "1.self_attn.v_scale": [0.03, 0.4]}
    _with_scales(tmp_path, {name: torch.tensor(values) for name, values in apart.items()})
    prompt = prompt_of(50)

    def logprobs(engine: Engine) -> Tensor:
        row = Sequence(prompt, list(range(20))).next_row()
        row.targets = prompt[1:]
        result = engine.execute([row])[0]
        return torch.tensor([one.logprob for one in result.prompt_logprobs])

    plain, moved = logprobs(start_engine(tmp_path)), logprobs(start_engine(tmp_path, **options))
    error = (plain - moved).abs()
    assert 1e-5 < float(error.mean()) < most * float(plain.std())


def test_copied_pages_hold_the_same(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, eos=False)
    engine = start_engine(tmp_path, kv_dtype="fp8")
    run_together(engine, [Sequence(prompt_of(8), [0, 1, 2])], 1)
    engine.copy_pages([(0, 5), (1, 9)])
    data = engine.pool.data.view(torch.uint8)
    assert data[0].count_nonzero()
    assert torch.equal(data[[0, 1]], data[[5, 9]])


def test_sizes_are_what_they_are_said_to_be(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    engine = start_engine(tmp_path, pages=10, kv_dtype="fp8", dtype="bfloat16")
    model = read_model_config(tmp_path)
    assert engine.page_bytes * 10 == engine.pool.byte_count
    assert engine.page_bytes == 4 * engine.geometry.token_bytes == 4 * model.kv_token_bytes("bfloat16", "fp8")
    assert model.kv_token_bytes("bfloat16", "fp8") * 2 == model.kv_token_bytes("bfloat16")
    assert engine.geometry.dtype == "float8_e4m3fn"
    assert start_engine(tmp_path, dtype="bfloat16").geometry.dtype == "bfloat16"


def test_digest_tells_quantized_models_apart_and_leaves_the_kv_dtype_to_the_handshake(tmp_path: Path) -> None:
    model = read_model_config(make_checkpoint("llama", tmp_path))
    assert model_digest(model, "float32", "auto") != model_digest(model, "float32", "auto", "fp8")
    digests = {start_engine(tmp_path, kv_dtype=kind).geometry.model_digest for kind in ("auto", "fp8")}
    assert len(digests) == 1


# ---------------------------------------------------------------- what is refused


def _config(**options: Any) -> WorkerConfig:
    return WorkerConfig("w", "unified", Path(), "ipc://unused", **options)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_fp8_products_on_a_gpu_give_bfloat16_only(dtype: Any, tmp_path: Path) -> None:
    model = read_model_config(make_checkpoint("llama", tmp_path))
    message = rf"--dtype {dtype} is not supported \(supported: --dtype bfloat16"
    with pytest.raises(PrecisionError, match=message):
        check_precision(_config(device="cuda", dtype=dtype, quantization="fp8"), model)
    check_precision(_config(device="cuda", dtype="bfloat16", quantization="fp8"), model)
    check_precision(_config(device="cuda", dtype=dtype, kv_dtype="fp8"), model)
    check_precision(_config(device="cpu", dtype=dtype, quantization="fp8"), model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 72}, "hidden_size is 72"),
        ({"intermediate": 100}, "intermediate_size is 100"),
        ({"head_dim": 6}, r"num_attention_heads \* head_dim is 24"),
        ({"head_dim": 20, "kv_heads": 1}, r"num_key_value_heads \* head_dim is 20"),
    ],
)
def test_sizes_that_fp8_products_cannot_take(options: Any, message: str, tmp_path: Path) -> None:
    model = read_model_config(make_checkpoint("llama", tmp_path, **options))
    with pytest.raises(PrecisionError, match=rf"{message} \(supported: multiples of 16\)"):
        check_precision(_config(device="cuda", dtype="bfloat16", quantization="fp8"), model)
    check_precision(_config(device="cpu", quantization="fp8"), model)


@pytest.mark.parametrize(("option", "flag"), [("kv_dtype", "--kv-dtype"), ("quantization", "--quantization")])
def test_a_gpu_without_fp8_is_refused(option: str, flag: str) -> None:
    config = _config(device="cuda", dtype="bfloat16", **{option: "fp8"})
    message = rf"{flag} fp8: this GPU has compute capability 8\.0 \(supported: 8\.9"
    with pytest.raises(PrecisionError, match=message):
        check_capability(config, (8, 0))
    check_capability(config, (9, 0))
    check_capability(_config(device="cuda"), (8, 0))


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        ("15", {"head_dim": 15}),
        ("258", {"head_dim": 258}),
        ("320", {"head_dim": None, "hidden_size": 1280}),
    ],
)
def test_head_sizes(size: str, changes: dict[str, Any], tmp_path: Path) -> None:
    path = make_checkpoint("llama", tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    message = rf"head_dim {size} is not supported \(supported: even sizes from 2 to 256\)"
    with pytest.raises(CheckpointError, match=message):
        read_model_config(tmp_path)


def test_a_quantized_checkpoint_says_what_is_supported(tmp_path: Path) -> None:
    path = make_checkpoint("llama", tmp_path) / "config.json"
    quantized = {"quantization_config": {"quant_method": "fp8"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | quantized))
    message = r"quantised by 'fp8' are not supported; only float32, .*--quantization fp8 quantises"
    with pytest.raises(CheckpointError, match=message):
        read_model_config(tmp_path)


def test_the_scale_of_nothing_is_finite(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    tensors = load_file(tmp_path / SINGLE_NAME)
    tensors["model.layers.0.self_attn.v_proj.weight"].zero_()
    save_file(tensors, tmp_path / SINGLE_NAME)
    scales = kv_scales(read_model_config(tmp_path), _load(tmp_path), True)
    assert all(math.isfinite(1 / scale) for scale in scales.flatten().tolist())
