"""A model directory to put a load on, with no weights: `python -m deploy.bench.model_dir DIR`.

It has a known model's configuration, and a byte-level tokenizer in which every id of that model's vocabulary
is a word of its own: with random weights every id may be sampled, and each has to show in the stream that is
measured. `baton serve DIR --load-format dummy` and the `bench` commands take it.
"""

import argparse
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from deploy.bench.engine.shapes import SHAPES, write_shape
from deploy.errors import UserError

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """tokenizer.json and tokenizer_config.json: all bytes, then words of letters up to `vocab_size`."""
    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for number in range(vocab_size - len(vocab)):
        vocab["Ġ" + _word(number)] = len(vocab)
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.save(str(directory / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(values))


def _word(number: int) -> str:
    """A different one of two letters or more for every number."""
    letters = ""
    while number or len(letters) < 2:
        number, letter = divmod(number, len(LETTERS))
        letters += LETTERS[letter]
    return letters


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.bench.model_dir", description=" ".join((__doc__ or "").split())
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument(
        "--model-config", default="qwen3-8b", help=f"{', '.join(SHAPES)}, or a config.json (%(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        options.directory.mkdir(parents=True, exist_ok=True)
        place = write_shape(options.model_config, options.directory)
        if place != options.directory:
            raise UserError("--model-config: a directory is a model directory already")
        config = json.loads((options.directory / "config.json").read_text())
        write_tokenizer(options.directory, int(config["vocab_size"]))
    except (UserError, OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
