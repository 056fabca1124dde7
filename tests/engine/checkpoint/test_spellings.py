"""What transformers takes for a family under other names: the same tokens, or a refusal that tells why."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.engine.checkpoint.safetensors_files import INDEX_NAME, SINGLE_NAME, read_checkpoint_files
from services.engine.errors import CheckpointError
from services.engine.models.kv_scales import kv_scales
from services.engine.models.layers import Decoder
from services.engine.models.model_config import read_model_config
from services.engine.models.parameters import Parameters
from services.engine.models.stored_tensors import check_tensors
from services.engine.models.weights import load_safetensors
from tests.checkpoints import (
    FAMILIES,
    IM_END,
    make_checkpoint,
    write_sentencepiece,
    write_tokenizer,
    write_vocabulary,
)
from tests.engine.checkpoint.test_config_keys import ours, theirs

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Tensors = dict[str, torch.Tensor]


def edit(model_dir: Path, change: Callable[[Tensors], Any] = lambda tensors: None, **config: Any) -> Path:
    tensors = load_file(model_dir / SINGLE_NAME)
    change(tensors)
    save_file(tensors, model_dir / SINGLE_NAME, metadata={"format": "pt"})
    path = model_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return model_dir


def renamed(tensors: Tensors, rename: Callable[[str], str]) -> None:
    for name in list(tensors):
        tensors[rename(name)] = tensors.pop(name)


def without_prefix(tensors: Tensors) -> None:
    renamed(tensors, lambda name: name.removeprefix("model."))


def head_in_base_model(tensors: Tensors) -> None:
    renamed(tensors, lambda name: "model.lm_head.weight" if name == HEAD else name)


def rotary_tables(tensors: Tensors) -> None:
    for name in (
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "rotary_emb.inv_freq",
    ):
        tensors[name] = torch.ones(8)


def as_float64(tensors: Tensors) -> None:
    for name in tensors:
        tensors[name] = tensors[name].double()


def in_two_dtypes(tensors: Tensors) -> None:
    for name in tensors:
        if "proj" in name:
            tensors[name] = tensors[name].bfloat16()


def another_head(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[EMBEDDING].flip(0).contiguous()


def the_same_head(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()


def rounded_head(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[EMBEDDING].bfloat16()


def head_alone(tensors: Tensors) -> None:
    tensors[HEAD] = tensors.pop(EMBEDDING)


def a_further_layer(tensors: Tensors) -> None:
    for name in [name for name in tensors if ".layers.1." in name]:
        tensors[name.replace(".layers.1.", ".layers.2.")] = tensors[name].clone()
    tensors["model.layers.2.eh_proj.weight"] = torch.ones(4)


def mtp_tensors(tensors: Tensors) -> None:
    tensors["mtp.fc.weight"] = torch.ones(4)
    tensors["model.mtp.norm.weight"] = torch.ones(4)


SPELLINGS: dict[str, tuple[bool, Callable[[Tensors], None], dict[str, Any]]] = {
    "as it is": (False, lambda tensors: None, {}),
    "no prefix": (False, without_prefix, {}),
    "no prefix, tied": (True, without_prefix, {}),
    "the head within the base model": (False, head_in_base_model, {}),
    "rotary tables": (False, rotary_tables, {}),
    "float64": (False, as_float64, {}),
    "two dtypes": (False, in_two_dtypes, {}),
    "tied with a head that differs": (True, another_head, {}),
    "tied with a head that is the same": (True, the_same_head, {}),
    "tied with a rounded head": (True, rounded_head, {}),
    "tied under the head's name": (True, head_alone, {}),
    "an MTP layer": (False, a_further_layer, {"num_nextn_predict_layers": 1}),
    "MTP tensors": (False, mtp_tensors, {"mtp_num_hidden_layers": 1}),
}


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_spelling_is_taken_as_by_transformers(family: Any, name: str, tmp_path: Path) -> None:
    tied, change, config = SPELLINGS[name]
    make_checkpoint(family, tmp_path, seed=6, tied=tied, eos=False)
    edit(tmp_path, change, **config)
    assert ours(tmp_path) == theirs(tmp_path)


def test_a_head_is_kept_where_it_differs_and_said_so(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, tied=True)
    assert read_model_config(tmp_path).tied_embeddings and read_model_config(tmp_path).notes == ()
    model = read_model_config(edit(tmp_path, the_same_head))
    assert model.tied_embeddings and model.notes == ()
    model = read_model_config(edit(tmp_path, another_head))
    assert not model.tied_embeddings
    assert any("lm_head.weight" in note for note in model.notes)


def test_a_single_file_comes_before_an_index(tmp_path: Path) -> None:
    several = make_checkpoint("llama", tmp_path / "m", seed=1, sharded=True, eos=False)
    one = make_checkpoint("llama", tmp_path / "one", seed=2, eos=False)
    (several / SINGLE_NAME).write_bytes((one / SINGLE_NAME).read_bytes())
    assert ours(several) == theirs(several) == ours(one)


def twice_named(tensors: Tensors) -> None:
    tensors["norm.weight"] = tensors["model.norm.weight"].clone()


def float8(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (
            twice_named,
            {},
            r"model\.norm\.weight and norm\.weight are the same tensor|norm\.weight and model\.norm",
        ),
        (float8, {}, r"model\.norm\.weight has dtype F8_E4M3 \(supported: F32, BF16, F16, F64\)"),
        (a_further_layer, {}, r"unexpected tensor model\.layers\.2\."),
        (mtp_tensors, {}, r"unexpected tensor (model\.)?mtp\."),
        (
            lambda tensors: None,
            {"vocab_size": 330},
            r"has shape \[320, 64\], config\.json asks for \[330, 64\]",
        ),
        (lambda tensors: tensors.pop(HEAD), {}, r"missing tensor lm_head\.weight"),
        (head_alone, {}, r"missing tensor model\.embed_tokens\.weight"),
    ],
)
def test_what_is_not_taken_is_refused_by_name(
    change: Callable[[Tensors], None], config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make_checkpoint("llama", tmp_path)
    edit(tmp_path, change, **config)
    with pytest.raises(CheckpointError, match=message):
        check_tensors(read_model_config(tmp_path), read_checkpoint_files(tmp_path))


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, sharded=True)
    weight_map = json.loads((tmp_path / INDEX_NAME).read_text())["weight_map"]
    home = weight_map["model.norm.weight"]
    other = next(name for name in sorted(set(weight_map.values())) if name != home)
    tensors = load_file(tmp_path / other) | {"model.norm.weight": torch.ones(64)}
    save_file(tensors, tmp_path / other)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is in model-.* and in model-"):
        read_checkpoint_files(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], r"adapter \(LoRA\): merge it"),
        (["weights.gguf"], r"GGUF is not supported"),
        (["params.json", "consolidated.safetensors"], r"params\.json is the maker's own format"),
    ],
)
def test_another_kind_of_directory_is_told(files: list[str], message: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=message):
        read_model_config(tmp_path)
    make_checkpoint("llama", tmp_path)
    (tmp_path / SINGLE_NAME).unlink()
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint_files(tmp_path)


# ---------------------------------------------------------------- scales of the KV cache

ONE, BOTH = {(1, 0): 0.5}, {(1, 0): 0.5, (1, 1): 0.5}
SCALES = {
    "k_proj.k_scale": ONE,
    "k_scale": ONE,
    "attn.k_scale": ONE,
    "qkv_proj.k_scale": ONE,
    "k_proj.output_scale": ONE,
    "v_proj.output_scale": {(1, 1): 0.5},
    "attn.v_scale": {(1, 1): 0.5},
    "kv_scale": BOTH,
    "attn.kv_scale": BOTH,
    "q_scale": {},
    "attn.prob_scale": {},
    "q_proj.output_scale": {},
}


def _load(model_dir: Path) -> tuple[Any, Parameters]:
    model = read_model_config(model_dir)
    parameters = Parameters(model.tensors, torch.float32, torch.device("cpu"))
    Decoder(model, parameters)
    with torch.inference_mode():
        load_safetensors(model, parameters, lambda done, total: None)
    return model, parameters


@pytest.mark.parametrize("name", SCALES)
def test_scales_are_taken_under_the_names_of_all_exporters(name: str, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    stored = {f"model.layers.1.self_attn.{name}": torch.tensor(0.5)}
    model, parameters = _load(edit(tmp_path, lambda tensors: tensors.update(stored)))
    found, bounds = kv_scales(model, parameters, True), kv_scales(model, parameters, False)
    for layer, kind in ((0, 0), (0, 1), (1, 0), (1, 1)):
        expected = SCALES[name].get((layer, kind))
        assert torch.equal(found[layer, kind], bounds[layer, kind]) is (expected is None)
        assert expected is None or bool((found[layer, kind] == expected).all())


def test_a_scale_under_two_names_is_refused(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    names = ("model.layers.1.self_attn.k_proj.k_scale", "model.layers.1.self_attn.kv_scale")
    edit(tmp_path, lambda tensors: tensors.update({name: torch.tensor(0.5) for name in names}))
    with pytest.raises(CheckpointError, match=r"are the same scale"):
        kv_scales(*_load(tmp_path), True)


@pytest.mark.parametrize(
    ("config", "served"),
    [
        (
            {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": {"num_bits": 8}},
            True,
        ),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {}}, "kv_cache_scheme": {}}, False),
        ({"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"}, True),
        (
            {"quant_method": "modelopt", "quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}},
            True,
        ),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}, False),
        ({"quant_method": "gptq"}, False),
    ],
)
def test_a_scheme_of_the_kv_cache_alone_is_served(
    config: dict[str, Any], served: bool, tmp_path: Path
) -> None:
    make_checkpoint("llama", tmp_path, eos=False)
    plain = ours(tmp_path)
    edit(tmp_path, quantization_config=config)
    if served:
        assert ours(tmp_path) == plain
    else:
        with pytest.raises(
            CheckpointError, match=rf"weights quantised by '{config['quant_method']}' are not"
        ):
            read_model_config(tmp_path)


# ---------------------------------------------------------------- end tokens


def ends(model_dir: Path) -> tuple[int, ...]:
    return read_model_config(model_dir).eos_token_ids


def test_end_tokens_come_from_all_three_files(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    end = write_tokenizer(tmp_path)[IM_END]
    assert ends(tmp_path) == (end,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 3]}))
    edit(tmp_path, eos_token_id=11)
    assert ends(tmp_path) == (3, 7, 11, end)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": None}))
    (tmp_path / "generation_config.json").unlink()
    assert ends(tmp_path) == (11,)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    assert ends(tmp_path) == (11,)


def test_end_tokens_that_no_model_makes_are_passed_over_with_a_note(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    edit(tmp_path, eos_token_id=[-1, 5])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 4000}))
    assert ends(tmp_path) == (5,)
    assert read_model_config(tmp_path).notes == (
        "config.json: end token -1 is passed over: vocab_size is 320",
        "generation_config.json: end token 4000 is passed over: vocab_size is 320",
    )


def _named_as_dict(model_dir: Path) -> None:
    path = model_dir / "tokenizer_config.json"
    values = json.loads(path.read_text())
    values["eos_token"] = {"__type": "AddedToken", "content": values["eos_token"], "special": True}
    path.write_text(json.dumps(values))


def _named_in_older_map(model_dir: Path) -> None:
    path = model_dir / "tokenizer_config.json"
    values = json.loads(path.read_text())
    values.pop("added_tokens_decoder", None)
    end = values.pop("eos_token")
    path.write_text(json.dumps(values))
    (model_dir / "special_tokens_map.json").write_text(json.dumps({"eos_token": end}))


def _named_an_ordinary_token(model_dir: Path) -> None:
    path = model_dir / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": "Ġthe"}))


def _named_by_the_class(model_dir: Path) -> None:
    (model_dir / "tokenizer_config.json").unlink()
    path = model_dir / "tokenizer.json"
    path.write_text(path.read_text().replace(IM_END, "<|endoftext|>"))


def _named_by_no_class(model_dir: Path, tokenizer_class: str = "TokenizersBackend") -> None:
    _named_by_the_class(model_dir)
    (model_dir / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class}))


TOKENIZERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "tokenizer.json": ("qwen3", lambda path: None),
    "as an object": ("qwen3", _named_as_dict),
    "special_tokens_map": ("qwen3", _named_in_older_map),
    "an ordinary token": ("llama", _named_an_ordinary_token),
    "not named": ("llama", lambda path: (path / "tokenizer_config.json").unlink()),
    "the class's own": ("qwen2", _named_by_the_class),
    "a general class": ("qwen3", _named_by_no_class),
    "a class of the settings": ("qwen3", lambda path: _named_by_no_class(path, "Qwen2TokenizerFast")),
    "a class that does not count": ("mistral", lambda path: _named_by_no_class(path, "Qwen2Tokenizer")),
    "vocab.json": ("qwen2", write_vocabulary),
    "sentencepiece": ("llama", write_sentencepiece),
    "sentencepiece, mistral": ("mistral", lambda path: write_sentencepiece(path, "mistral")),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_end_token_of_the_tokenizer_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    family, change = TOKENIZERS[name]
    make_checkpoint(family, tmp_path, eos=False)  # type: ignore[arg-type]
    write_tokenizer(tmp_path)
    config = (tmp_path / "config.json").read_text()
    if change in (write_vocabulary,) or "sentencepiece" in name:
        (tmp_path / "tokenizer.json").unlink()
    change(tmp_path)
    (tmp_path / "config.json").write_text(config)
    token = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True).eos_token_id
    assert ends(tmp_path) == (() if token is None or token >= 320 else (token,))
