"""The tokens that end a text: those of config.json, generation_config.json, and the tokenizer's own.

Chat models often name the end of a turn in one of the three only.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from services.engine.checkpoint.config_keys import shown
from services.engine.checkpoint.json_files import read_json
from services.engine.errors import CheckpointError

TokenizerClass = Callable[[Any, bool], str]
"""`Family.tokenizer_class`."""
_DEFAULT = {"LlamaTokenizer": "</s>", "Qwen2Tokenizer": "<|endoftext|>"}
"""What transformers' tokenizer classes take where the files name none; its general class takes none."""


def read_end_tokens(
    model_dir: Path,
    tokenizer_class: TokenizerClass,
    vocab_size: int,
    from_config: Any,
    generation: dict[str, Any],
) -> tuple[tuple[int, ...], list[str]]:
    """The ids in order, and notes on those that no model of this size can make. Raises CheckpointError."""
    found: set[int] = set()
    notes: list[str] = []
    sources = [("config.json", from_config), ("generation_config.json", generation.get("eos_token_id"))]
    sources.append(("the tokenizer", _of_tokenizer(model_dir, tokenizer_class)))
    for name, value in sources:
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int):
                raise CheckpointError(
                    f"{model_dir / name}: eos_token_id is {shown(value)}; it must be a token id or a list"
                )
            if 0 <= token < vocab_size:
                found.add(token)
            else:
                notes.append(f"{name}: end token {token} is passed over: vocab_size is {vocab_size}")
    return tuple(sorted(found)), notes


def _of_tokenizer(model_dir: Path, tokenizer_class: TokenizerClass) -> int | None:
    """The id of the tokenizer's `eos_token`, None if it has none."""
    settings = _read_if_there(model_dir / "tokenizer_config.json")
    older = {}
    if "added_tokens_decoder" not in settings:
        older = _read_if_there(model_dir / "special_tokens_map.json")
    named = {**settings, **older}
    has_file = (model_dir / "tokenizer.json").exists()
    kind = tokenizer_class(settings.get("tokenizer_class"), has_file)
    token = named.get("eos_token", _DEFAULT.get(kind))
    text = token.get("content") if isinstance(token, dict) else token
    return _id_of(text, settings, model_dir) if isinstance(text, str) else None


def _id_of(text: str, settings: dict[str, Any], model_dir: Path) -> int | None:
    added = settings.get("added_tokens_decoder")
    if isinstance(added, dict):
        for token, entry in added.items():
            if isinstance(entry, dict) and entry.get("content") == text and token.isdecimal():
                return int(token)
    tokenizer = _read_if_there(model_dir / "tokenizer.json")
    if tokenizer:
        return _in_tokenizer(text, tokenizer)
    for name in ("added_tokens.json", "vocab.json"):
        token_id = _read_if_there(model_dir / name).get(text)
        if isinstance(token_id, int):
            return token_id
    return _in_sentencepiece(text, model_dir / "tokenizer.model")


def _in_tokenizer(text: str, tokenizer: dict[str, Any]) -> int | None:
    for entry in tokenizer.get("added_tokens") or []:
        if entry.get("content") == text:
            return int(entry["id"])
    vocabulary = (tokenizer.get("model") or {}).get("vocab")
    if isinstance(vocabulary, dict):
        return vocabulary.get(text)
    pieces = [entry[0] for entry in vocabulary or []]  # a Unigram's, in order
    return pieces.index(text) if text in pieces else None


def _in_sentencepiece(text: str, path: Path) -> int | None:
    if not path.exists():
        return None
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_proto=path.read_bytes())
    except (OSError, RuntimeError):  # the router, which needs it, says what is wrong
        return None
    token = processor.piece_to_id(text)
    return token if processor.id_to_piece(token) == text else None


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
