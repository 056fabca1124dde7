"""A process that lives for one conversion: `python -m router.text.convert_tokenizer MODEL_DIR PARENT_PID`.

1. Die with the parent.
2. Check the files for what transformers would not name, or would load as something else.
3. Load the tokenizer by transformers; never fetch anything, never run code of the checkpoint.
4. Check that it gives the tokens which the files say.
5. Write one answer to stdout: `Converted` or `ConversionRefused` (router/text/conversion.py).
"""

import os
import sys
from pathlib import Path
from typing import Any

import msgspec
from sentencepiece import SentencePieceProcessor

from router.child_process import die_with
from router.config import RouterConfigError
from router.text.checkpoint import read_json
from router.text.conversion import (
    MERGES_FILE,
    SENTENCEPIECE_FILE,
    TOKENIZER_FILE,
    VOCABULARY_FILE,
    ConversionRefused,
    Converted,
)

PROBES = ("Hello world, how are you?", "In 2024 it's naïve: 日本, 🙂 and\nx_1 = [y];")
"""Single spaces only, and none at the start: there transformers' own tokenizers may differ by design."""


def run(model_dir: Path, parent_pid: int) -> None:
    die_with(parent_pid)
    # Where transformers finds torch it imports it, for seconds; tokenizers need none of it.
    sys.modules["torch"] = None  # type: ignore[assignment]
    # The answer has stdout to itself; what a library prints goes to stderr.
    answers = os.dup(1)
    os.dup2(2, 1)
    answer: Converted | ConversionRefused
    try:
        answer = convert_here(model_dir)
    except RouterConfigError as error:
        answer = ConversionRefused(str(error))
    with os.fdopen(answers, "wb") as pipe:
        pipe.write(msgspec.json.encode(answer))


def convert_here(model_dir: Path) -> Converted:
    """Imports transformers. Raises RouterConfigError naming the file at fault."""
    if (model_dir / TOKENIZER_FILE).exists():
        tokenizer = _of_tokenizer_file(model_dir)
    elif (model_dir / SENTENCEPIECE_FILE).exists():
        tokenizer = _of_sentencepiece(model_dir, _read_sentencepiece(model_dir / SENTENCEPIECE_FILE))
    else:
        tokenizer = _of_vocabulary(model_dir, _read_vocabulary(model_dir))
    return Converted(
        tokenizer.backend_tokenizer.to_str(),
        {role: str(token) for role, token in tokenizer.special_tokens_map.items()},
    )


def _load(class_name: str, model_dir: Path, source: Path, **options: Any) -> Any:
    """A transformers tokenizer with a `tokenizers` backend."""
    import transformers

    try:
        tokenizer = getattr(transformers, class_name).from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=False, **options
        )
    except Exception as error:  # whatever transformers finds wrong is the checkpoint's fault
        raise RouterConfigError(
            f"{source}: transformers cannot make a tokenizer of it (does tokenizer_config.json name its "
            f'"tokenizer_class"?): {" ".join(str(error).split())}'
        ) from error
    if not tokenizer.is_fast:
        raise RouterConfigError(
            f"{source}: {type(tokenizer).__name__} of transformers has no form that tokenizer.json can hold"
        )
    return tokenizer


def _read_sentencepiece(path: Path) -> SentencePieceProcessor:
    try:
        content = path.read_bytes()
        processor = SentencePieceProcessor(model_proto=content) if content else None
    except OSError as error:
        raise RouterConfigError(f"{path} cannot be read: {error}") from error
    except RuntimeError as error:
        raise RouterConfigError(f"{path} is not a sentencepiece model: {error}") from error
    if processor is None or processor.get_piece_size() == 0:
        raise RouterConfigError(f"{path} is not a sentencepiece model: it is empty")
    return processor


def _of_sentencepiece(model_dir: Path, reference: SentencePieceProcessor) -> Any:
    """What AutoTokenizer makes of it, if sentencepiece agrees. For some model types, Mistral among them,
    AutoTokenizer takes a general class that forgets the space before the first word; then LlamaTokenizer."""
    source = model_dir / SENTENCEPIECE_FILE
    begins_with_space = reference.encode("a", out_type=str)[0].startswith("▁")
    tokenizer = _load("AutoTokenizer", model_dir, source)
    if not _agree(tokenizer, reference):
        tokenizer = _load("LlamaTokenizer", model_dir, source, add_prefix_space=begins_with_space)
    if not _agree(tokenizer, reference):
        raise RouterConfigError(
            f"{source}: sentencepiece and what transformers makes of it give different tokens; "
            "a tokenizer.json beside it would be read instead"
        )
    return tokenizer


def _agree(tokenizer: Any, reference: SentencePieceProcessor) -> bool:
    return all(
        tokenizer.encode(probe, add_special_tokens=False) == reference.encode(probe) for probe in PROBES
    )


def _read_vocabulary(model_dir: Path) -> dict[str, int]:
    """The ids of a byte-pair vocabulary, whose merges were checked."""
    path, merges_path = model_dir / VOCABULARY_FILE, model_dir / MERGES_FILE
    vocabulary: dict[str, int] = read_json(path)
    for token, token_id in vocabulary.items():
        if type(token_id) is not int or token_id < 0:
            raise RouterConfigError(f"{path}: the id of {token!r} is {token_id!r}, must be an integer from 0")
    try:
        lines = merges_path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise RouterConfigError(f"{merges_path} does not exist; {path} needs it") from error
    except (OSError, ValueError) as error:
        raise RouterConfigError(f"{merges_path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        pair = line.rstrip("\r").split(" ")
        if pair == [""] or line.startswith("#version"):
            continue
        if len(pair) != 2:
            raise RouterConfigError(f"{merges_path}: line {number} must hold two tokens and a space")
        for token in (*pair, "".join(pair)):
            if token not in vocabulary:
                raise RouterConfigError(
                    f"{merges_path}: line {number}: {token!r} is not in {VOCABULARY_FILE}"
                )
    return vocabulary


def _of_tokenizer_file(model_dir: Path) -> Any:
    """What AutoTokenizer makes of it, which may be another tokenizer, of the same vocabulary."""
    source = model_dir / TOKENIZER_FILE
    vocabulary = (read_json(source).get("model") or {}).get("vocab")
    tokenizer = _load("AutoTokenizer", model_dir, source)
    _check_ids(vocabulary if isinstance(vocabulary, dict) else {}, tokenizer, source)
    return tokenizer


def _of_vocabulary(model_dir: Path, vocabulary: dict[str, int]) -> Any:
    source = model_dir / VOCABULARY_FILE
    tokenizer = _load("AutoTokenizer", model_dir, source)
    _check_ids(vocabulary, tokenizer, source)
    return tokenizer


def _check_ids(vocabulary: dict[str, int], tokenizer: Any, source: Path) -> None:
    made = tokenizer.get_vocab()
    for token, token_id in vocabulary.items():
        if made.get(token) != token_id:
            raise RouterConfigError(
                f"{source}: {token!r} has the id {token_id}, but {made.get(token)} in the "
                f"{type(tokenizer).__name__} that transformers makes; tokenizer_config.json may name the "
                'wrong "tokenizer_class"'
            )


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))
