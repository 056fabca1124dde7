"""Every key of tokenizer_config.json, and every file beside tokenizer.json, against AutoTokenizer: the same
ids, or a refusal that names it."""

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaTokenizer, Qwen2Tokenizer, TokenizersBackend
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from router.config import RouterConfigError
from router.text import tokenizer_keys as keys
from router.text.convert_tokenizer import convert_here
from router.text.tokenizer import TextTokenizer
from tests.checkpoints import IM_END, write_sentencepiece, write_tokenizer

TEXTS = (
    "Hello world",
    "  two  spaces. And that's 2024 it",
    "é café né 日本 🙂 Ⅷ",
    "<|im_start|>user\nthat was<|im_end|> <s>x</s> <mask> [PAD]the",
    " ",
)

# ---------------------------------------------------------------- the tables are whole


def test_qwens_types_have_the_tokenizer_that_transformers_gives_them() -> None:
    """So a further family of Qwen's that is served needs no word of the router's."""
    of_qwen = {kind for kind, name in TOKENIZER_MAPPING_NAMES.items() if name == "Qwen2Tokenizer"}
    assert {kind for kind in of_qwen if kind.startswith("qwen")} == keys.QWEN2_TYPES


_READ = re.compile(r"""kwargs\.(?:pop|get|setdefault)\(\s*["'](\w+)["']|["'](\w+)["'] in (?:init_)?kwargs""")
OF_THE_CALL = {
    *("return_tensors", "truncation", "padding", "text_pair", "add_special_tokens", "max_target_length"),
    *(
        "tokenizer",
        "commit_message",
        "repo_id",
        "use_source_tokenizer",
        "text_target",
        "name",
        "trust_remote_code",
    ),
    *("_json_truncation", "_json_padding", "_spm_precompiled_charsmap", "_commit_hash", "_from_auto"),
    *("_from_pipeline", "unk_id", "sanitize_control_tokens", "save_jinja_files", "return_token_type_ids"),
    *(
        "subfolder",
        "cache_dir",
        "force_download",
        "proxies",
        "token",
        "revision",
        "use_auth_token",
        "device_map",
    ),
}
"""Arguments of methods, and what transformers hands on between its own."""


def test_every_key_that_transformers_reads_is_in_a_table() -> None:
    known = keys.OBEYED.keys() | keys.HARMLESS.keys() | set(keys.ONLY_OFF)
    read = set()
    for kind in (PreTrainedTokenizerBase, TokenizersBackend, LlamaTokenizer, Qwen2Tokenizer):
        read |= inspect.signature(kind.__init__).parameters.keys() - {"self", "args", "kwargs"}
    for function in (PreTrainedTokenizerBase.__init__, PreTrainedTokenizerBase._from_pretrained):
        read |= {one or other for one, other in _READ.findall(inspect.getsource(function))}
    for function in (TokenizersBackend.__init__, TokenizersBackend._convert_from_tiktoken):
        read |= {one or other for one, other in _READ.findall(inspect.getsource(function))}
    assert len(read) > 40
    assert read - OF_THE_CALL <= known, read - OF_THE_CALL - known
    assert not keys.OBEYED.keys() & keys.HARMLESS.keys()


# ---------------------------------------------------------------- each with other values


def write_llama2(directory: Path, model_type: str = "llama") -> None:
    """As Llama 2 was published: a normalizer in place of a pre-tokenizer."""
    write_sentencepiece(directory, model_type, legacy=False)
    AutoTokenizer.from_pretrained(directory, local_files_only=True).save_pretrained(directory)
    (directory / "tokenizer.model").unlink(missing_ok=True)
    edit(
        directory / "tokenizer.json",
        pre_tokenizer=None,
        normalizer={
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
    )
    edit(directory / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")


def write_general(directory: Path, model_type: str = "llama") -> None:
    write_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))


def write_qwen(directory: Path, model_type: str = "qwen3") -> None:
    write_general(directory, model_type)
    edit(directory / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer", unk_token=None)
    AutoTokenizer.from_pretrained(directory, local_files_only=True).save_pretrained(directory)
    edit(directory / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer", unk_token=None)


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**values, **changes}))


WRITERS: dict[str, Callable[[Path], None]] = {
    "general": write_general,
    "general, qwen3": lambda path: write_general(path, "qwen3"),
    "general, qwen2": lambda path: write_general(path, "qwen2"),
    "general, mistral": lambda path: write_general(path, "mistral"),
    "llama": write_llama2,
    "llama, mistral": lambda path: write_llama2(path, "mistral"),
    "qwen": write_qwen,
}
ADDED = {"content": IM_END, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
OTHER: dict[str, list[Any]] = {
    "tokenizer_class": [
        None,
        "LlamaTokenizer",
        "Qwen2TokenizerFast",
        "TokenizersBackend",
        "OddTokenizer",
        "GPT2Tokenizer",
    ],
    "add_bos_token": [True, False],
    "add_eos_token": [True],
    "add_prefix_space": [True, False],
    "legacy": [True, False],
    "bos_token": [None, "<|im_start|>", "<new>", "Ġthe"],
    "eos_token": [None, "<new>"],
    "unk_token": ["<unk>", None],
    "pad_token": ["[PAD]", None],
    "sep_token": ["it"],
    "cls_token": ["<cls>"],
    "mask_token": ["<mask>", {**ADDED, "__type": "AddedToken", "content": "<mask>", "lstrip": True}],
    "image_token": ["<s>", "that"],
    "extra_special_tokens": [["was"], {"odd_token": "was"}, [], None],
    "additional_special_tokens": [["<|im_start|>", "<mask>"], []],
    "added_tokens_decoder": [
        {},
        {"306": {**ADDED, "special": True}},
        {"306": {**ADDED, "special": False, "lstrip": True}},
        {"330": {**ADDED, "content": "was", "special": True}},
    ],
    "split_special_tokens": [True, False],
    "clean_up_tokenization_spaces": [True, False],
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": [True],
    "fix_mistral_regex": [True, False],
    "fast_tokenizer_files": [["tokenizer.4.0.0.json", "tokenizer.json"]],
    "post_processor": ["odd"],
    "init_inputs": [["odd"]],
    "vocab": [{"a": 1}],
    "auto_map": [{"AutoTokenizer": ["mine.Mine", "mine.MineFast"]}],
}
PAIRS = [
    (name, key)
    for name in WRITERS
    for key in OTHER
    if "," not in name or key in ("tokenizer_class", "bos_token")
]
"""Of a family whose class is another's, only the keys by which it could differ."""
HARMLESS_VALUES: dict[str, Any] = {
    "model_max_length": 3,
    "max_len": 3,
    "max_length": 3,
    "padding_side": "left",
    "truncation_side": "left",
    "truncation_strategy": "longest_first",
    "stride": 2,
    "pad_to_multiple_of": 8,
    "pad_token_type_id": 1,
    "model_input_names": ["input_ids"],
    "verbose": False,
    "name_or_path": "odd",
    "processor_class": "Odd",
    "is_local": False,
    "local_files_only": False,
    "files_loaded": ["odd"],
    "backend": "sentencepiece",
    "tokenizer_file": "odd",
    "vocab_file": "odd",
    "merges_file": "odd",
    "special_tokens_map_file": "odd",
    "use_default_system_prompt": True,
    "use_fast": False,
    "sp_model_kwargs": {},
    "spaces_between_special_tokens": True,
    "errors": "strict",
    "response_template": {},
    "chat_control_tokens": ["that"],
    "unread_by_all": 3,
}


@pytest.fixture(scope="module", params=WRITERS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    WRITERS[request.param](directory)
    return directory


@pytest.fixture(autouse=True)
def convert_within_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.text.tokenizer.convert", convert_here)


def variant(base: Path, directory: Path, changes: dict[str, Any]) -> Path:
    for path in base.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    edit(directory / "tokenizer_config.json", **changes)
    return directory


def same(model_dir: Path, named: list[str]) -> bool:
    """Whether it is served, with AutoTokenizer's ids; if not, a key is named."""
    try:
        ours = TextTokenizer(model_dir)
    except RouterConfigError as error:
        assert any(name in str(error).replace(str(model_dir), "") for name in named), str(error)
        assert "\n" not in str(error)
        return False
    theirs = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    for text in TEXTS:
        for special in (False, True):
            found = ours.encode(text, special)
            assert found == theirs.encode(text, add_special_tokens=special), (text, named)
            assert ours.decode(found) == theirs.decode(found)
    return True


@pytest.mark.parametrize(("base", "key"), PAIRS, indirect=["base"])
def test_a_key_is_obeyed_or_refused_by_its_name(base: Path, key: str, tmp_path: Path) -> None:
    for value in OTHER[key]:
        same(variant(base, tmp_path, {key: value}), [key])


def test_harmless_keys_change_no_token(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert same(variant(base, tmp_path, HARMLESS_VALUES), [])
    assert "tokenizer_config.json: not read: unread_by_all" in caplog.text


def no_settings(model_dir: Path) -> None:
    (model_dir / "tokenizer_config.json").unlink()


def older_map(model_dir: Path) -> None:
    no_settings(model_dir)
    edit(
        model_dir / "special_tokens_map.json",
        eos_token=IM_END,
        unk_token={"content": "<unk>", "lstrip": False},
    )


def older_added(model_dir: Path) -> None:
    edit(model_dir / "added_tokens.json", **{"<mask>": 320, "[PAD]": 321})


def shortening(model_dir: Path) -> None:
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    edit(model_dir / "tokenizer.json", truncation=truncation)


def class_in_config(model_dir: Path) -> None:
    settings = json.loads((model_dir / "tokenizer_config.json").read_text())
    settings.pop("tokenizer_class", None)
    (model_dir / "tokenizer_config.json").write_text(json.dumps(settings))
    edit(model_dir / "config.json", tokenizer_class="LlamaTokenizer")


@pytest.mark.parametrize("change", [no_settings, older_map, older_added, shortening, class_in_config])
def test_files_beside_it_are_read_as_by_transformers(
    base: Path, change: Callable[[Path], None], tmp_path: Path
) -> None:
    change(variant(base, tmp_path, {}))
    assert same(tmp_path, [])


@pytest.mark.parametrize(
    ("name", "converted"),
    [
        ("general", False),
        ("general, qwen3", False),
        ("general, mistral", False),
        ("qwen", False),
        ("llama", True),
    ],
)
def test_a_conversion_is_made_only_where_it_changes_something(
    name: str, converted: bool, tmp_path: Path
) -> None:
    WRITERS[name](tmp_path)
    reason = keys.why_converted(tmp_path, json.loads((tmp_path / "tokenizer.json").read_text()))
    assert (reason is not None) is converted


@pytest.mark.parametrize("value", [3, [3], {"a": 3}, {"3": 4}])
def test_settings_of_another_shape_are_one_clear_line(value: Any, tmp_path: Path) -> None:
    write_general(tmp_path)
    edit(tmp_path / "tokenizer_config.json", added_tokens_decoder=value)
    with pytest.raises(RouterConfigError, match=r"tokenizer_config\.json.* does not hold what it should: .*"):
        TextTokenizer(tmp_path)
