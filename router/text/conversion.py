"""Tokenizer conversion: transformers makes a tokenizer of a checkpoint's files, in a process of its own.

Loading transformers here would leave much in the router that it needs once. So the router runs
`router/text/convert_tokenizer.py` once at start, which sends the tokenizer back through a pipe: no file is
written that could be left behind.
"""

import os
import subprocess
import sys
from pathlib import Path

import msgspec

from router.config import RouterConfigError
from router.text.checkpoint import read_json

TOKENIZER_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
VOCABULARY_FILE, MERGES_FILE = "vocab.json", "merges.txt"
UNREAD_FILES = ("tekken.json", "tiktoken.model", "qwen.tiktoken")
TIME_LIMIT_S = 180.0
"""Most of it is importing transformers: seconds, and more where many processes start at once."""
_LAST_LINES = 2


class Converted(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    tokenizer: str
    """What would stand in `tokenizer.json`."""
    special_tokens: dict[str, str]
    """By role: `bos_token`, `eos_token`, ...; some are known to the tokenizer's class only."""


class ConversionRefused(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    message: str
    """Names the file and what is wrong with it."""


_decode_answer = msgspec.json.Decoder(Converted | ConversionRefused).decode


def convert(model_dir: Path, time_limit_s: float = TIME_LIMIT_S) -> Converted:
    """Blocks for the seconds that it takes. Raises RouterConfigError."""
    sources = (TOKENIZER_FILE, SENTENCEPIECE_FILE, VOCABULARY_FILE)
    if not any((model_dir / name).exists() for name in sources):
        unread = [name for name in UNREAD_FILES if (model_dir / name).exists()]
        raise RouterConfigError(
            f"{model_dir} has no tokenizer: looked for {TOKENIZER_FILE}, {SENTENCEPIECE_FILE}, and "
            f"{VOCABULARY_FILE} with {MERGES_FILE}"
            + (f"; {unread[0]} is not read: save a {TOKENIZER_FILE} of it" if unread else "")
        )
    if (settings := model_dir / "tokenizer_config.json").exists():
        read_json(settings)
    command = [
        sys.executable,
        "-m",
        "router.text.convert_tokenizer",
        str(model_dir.resolve()),
        str(os.getpid()),
    ]
    try:
        done = subprocess.run(
            command,
            # Python puts the working directory before all packages: it must not be one with foreign files,
            # such as the checkpoint itself.
            cwd=Path(__file__).parents[2],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=time_limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RouterConfigError(
            f"{model_dir}: making a tokenizer of its files took more than {time_limit_s:g} s"
        ) from error
    try:
        answer: Converted | ConversionRefused = _decode_answer(done.stdout)
    except msgspec.DecodeError as error:
        words = " ".join(done.stderr.decode(errors="replace").splitlines()[-_LAST_LINES:])
        raise RouterConfigError(
            f"{model_dir}: the process that makes a tokenizer of its files ended with code "
            f"{done.returncode}: {words}"
        ) from error
    if isinstance(answer, ConversionRefused):
        raise RouterConfigError(answer.message)
    return answer
