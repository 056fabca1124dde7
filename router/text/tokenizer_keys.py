"""What transformers reads of tokenizer_config.json, and whether the tokenizer.json beside it counts.

transformers does not take a tokenizer.json at its word: the class that tokenizer_config.json names, or that
goes with the model's type, may replace its parts, and tokens that are named elsewhere are added to it. Where
nothing of that changes a token, the file is read as it is; else transformers converts it (conversion.py).
A test holds the tables against transformers' classes, and the tokens against AutoTokenizer's.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router.config import RouterConfigError
from router.text.checkpoint import read_json

OBEYED = {
    "tokenizer_class": "_kind",
    "added_tokens_decoder": "_named_tokens",
    "additional_special_tokens": "_named_tokens",
    "extra_special_tokens": "_named_tokens",
    "bos_token": "_named_tokens, and the chat template",
    "eos_token": "_named_tokens, the chat template, and the workers' end tokens",
    "unk_token": "_named_tokens, and the chat template",
    "sep_token": "_named_tokens, and the chat template",
    "pad_token": "_named_tokens, and the chat template",
    "cls_token": "_named_tokens, and the chat template",
    "mask_token": "_named_tokens, and the chat template",
    "chat_template": "router/chat/chat_template.py",
    "add_prefix_space": "by the conversion, where the class reads it",
    "legacy": "by the conversion, where the class reads it",
    "fix_mistral_regex": "by the conversion",
    "auto_map": "by the conversion, which runs no code of a checkpoint",
    "add_bos_token": "by the conversion; beside a tokenizer.json transformers does not read it",
    "add_eos_token": "by the conversion; beside a tokenizer.json transformers does not read it",
}
"""By what. Any other key that ends in `_token` names a token too."""

_LENGTHS = "no prompt is shortened or padded"
_FILES = "files are looked for under their own names"
_ORIGIN = "says where the file comes from"
HARMLESS = {
    "model_max_length": "max_position_embeddings counts, as in transformers",
    "max_len": "likewise",
    "max_length": _LENGTHS,
    "padding_side": _LENGTHS,
    "truncation_side": _LENGTHS,
    "truncation_strategy": _LENGTHS,
    "stride": _LENGTHS,
    "pad_to_multiple_of": _LENGTHS,
    "pad_token_type_id": _LENGTHS,
    "model_input_names": "ids are all that a decoder takes",
    "verbose": "warnings only",
    "name_or_path": _ORIGIN,
    "processor_class": "of pictures and sound",
    "is_local": _ORIGIN,
    "local_files_only": _ORIGIN,
    "files_loaded": _ORIGIN,
    "backend": _ORIGIN,
    "tokenizer_file": _FILES,
    "vocab_file": _FILES,
    "merges_file": _FILES,
    "special_tokens_map_file": _FILES,
    "use_default_system_prompt": "not read since chat templates",
    "use_fast": "all are",
    "sp_model_kwargs": "for tokenizers that are not `tokenizers`'",
    "spaces_between_special_tokens": "for tokenizers that are not `tokenizers`'",
    "errors": "bytes that are no text are U+FFFD",
    "response_template": "how transformers reads an answer back",
    "response_schema": "how transformers reads an answer back",
    "chat_control_tokens": "what transformers strips from messages when it is asked to",
    "transformers_version": _ORIGIN,
}

ONLY_OFF = (
    "split_special_tokens",
    "fast_tokenizer_files",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
    "clean_up_tokenization_spaces",
    "gguf_file",
    "init_inputs",
    "tokenizer_object",
    "tokenizer_padding",
    "tokenizer_truncation",
    "post_processor",
    "vocab",
    "merges",
    "model_specific_special_tokens",
)
"""Refused unless null or false. Cleaning up is taken where transformers, too, leaves it: of byte pairs."""

_GENERAL = {"TokenizersBackend", "PreTrainedTokenizer", "PreTrainedTokenizerFast", "PythonBackend"}
_QWEN2, _LLAMA = "Qwen2Tokenizer", "LlamaTokenizer"
QWEN2_TYPES = {
    *("qwen2", "qwen2_5_omni", "qwen2_5_vl", "qwen2_audio", "qwen2_moe", "qwen2_vl", "qwen3", "qwen3_asr"),
    *("qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_vl", "qwen3_vl_moe"),
}
"""Model types of Qwen that AutoTokenizer gives Qwen2Tokenizer where the files name no class."""
_QWEN2_DEFAULTS = ("unk_token", "eos_token", "pad_token")
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Named:
    """A token that is named outside tokenizer.json; what is None does not matter."""

    content: str
    token: int | None = None
    flags: Mapping[str, bool] | None = None


def check_keys(model_dir: Path, model_kind: str) -> list[str]:
    """The keys of tokenizer_config.json that nobody reads. Raises RouterConfigError for one that would change
    tokens or text and is not supported. `model_kind`: what the vocabulary is, "BPE" or another."""
    path = model_dir / "tokenizer_config.json"
    settings = _read_if_there(path)
    for key in ONLY_OFF:
        if not settings.get(key) or (key == "clean_up_tokenization_spaces" and model_kind == "BPE"):
            continue
        value = json.dumps(settings[key])
        raise RouterConfigError(f"{path}: {key} is {value[:60]}, which is not supported; it must be absent")
    known = OBEYED.keys() | HARMLESS.keys() | set(ONLY_OFF)
    return sorted(key for key in settings.keys() - known if not key.endswith("_token"))


def why_converted(model_dir: Path, tokenizer: Mapping[str, Any]) -> str | None:
    """Why transformers would not read this tokenizer.json as it is; None: it would.

    Raises RouterConfigError where the files do not hold what they should.
    """
    try:
        return _why_converted(model_dir, tokenizer)
    except RouterConfigError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RouterConfigError(
            f"{model_dir}: tokenizer.json, tokenizer_config.json, special_tokens_map.json or "
            f"added_tokens.json does not hold what it should: {error!r}"
        ) from error


def _why_converted(model_dir: Path, tokenizer: Mapping[str, Any]) -> str | None:
    config = _read_if_there(model_dir / "config.json")
    settings = _read_if_there(model_dir / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings = {**settings, **_read_if_there(model_dir / "special_tokens_map.json")}
    for key in ("auto_map", "fix_mistral_regex"):
        if settings.get(key):
            return f"tokenizer_config.json has {key}"
    kind = _kind(config, settings, tokenizer)
    if kind == _QWEN2:
        if not _is_qwen2(settings, tokenizer):
            return f"{kind} of transformers replaces parts of it"
    elif kind not in _GENERAL:
        return f"{kind} of transformers may replace parts of it"
    added = {entry["content"]: entry for entry in tokenizer.get("added_tokens") or []}
    for named in _named_tokens(model_dir, settings):
        if not _is_there(named, added):
            return f"{named.content!r} is named elsewhere and not, or not alike, among its added tokens"
    return None


def _kind(config: Mapping[str, Any], settings: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> str:
    """The class that AutoTokenizer takes, by the model's type and the class that the files name."""
    model_type = config.get("model_type")
    if model_type is None or model_type == "mistral":
        return "TokenizersBackend"
    if model_type == "qwen2":
        return _QWEN2
    named = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if not isinstance(named, str):
        return _QWEN2 if model_type in QWEN2_TYPES else "TokenizersBackend"
    if named.removesuffix("Fast") == _LLAMA and '"ByteLevel"' in json.dumps(tokenizer):
        return "TokenizersBackend"
    return named.removesuffix("Fast") if named not in _GENERAL else named


def _is_qwen2(settings: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> bool:
    """Whether Qwen2Tokenizer's own parts are those of the file."""
    normal, split = tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer") or {}
    model, decoder = tokenizer.get("model") or {}, tokenizer.get("decoder") or {}
    steps = split.get("pretokenizers") or [{}, {}]
    switches = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk")
    plain = not any(model.get(key) for key in (*switches, "byte_fallback", "ignore_merges"))
    first = {"type": "Split", "pattern": {"Regex": _QWEN2_SPLIT}, "behavior": "Isolated", "invert": False}
    second = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    named = settings.get("added_tokens_decoder")
    contents = {entry["content"] for entry in tokenizer.get("added_tokens") or []}
    kept = named is None or {entry.get("content") for entry in named.values()} == contents
    return (
        normal == {"type": "NFC"}
        and len(steps) == 2
        and steps[0] == first
        and {key: steps[1].get(key) for key in second} == second
        and (model.get("type"), decoder.get("type")) == ("BPE", "ByteLevel")
        and plain
        and kept
        and not settings.get("add_prefix_space")
        and all(key in settings for key in _QWEN2_DEFAULTS)
    )


def _named_tokens(model_dir: Path, settings: Mapping[str, Any]) -> Iterator[_Named]:
    """Every token that the other files name."""
    special = {"special": True}
    for key, value in settings.items():
        if key.endswith("_token") and (content := _content(value)) is not None:
            yield _Named(content, flags=special)
    for key in ("extra_special_tokens", "additional_special_tokens"):
        listed = settings.get(key) or []
        for value in listed.values() if isinstance(listed, dict) else listed:
            yield _Named(_content(value) or "", flags=special)
    decoder = settings.get("added_tokens_decoder")
    for token, entry in (decoder or {}).items():
        flags = {key: value for key, value in entry.items() if isinstance(value, bool)}
        yield _Named(entry.get("content", ""), int(token), flags)
    if decoder is None:
        for content, token in _read_if_there(model_dir / "added_tokens.json").items():
            yield _Named(content, token)


def _content(value: Any) -> str | None:
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else None


def _is_there(named: _Named, added: Mapping[str, Mapping[str, Any]]) -> bool:
    entry = added.get(named.content)
    if entry is None or named.token not in (None, entry["id"]):
        return False
    return all(bool(entry.get(flag)) == value for flag, value in (named.flags or {}).items())


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
