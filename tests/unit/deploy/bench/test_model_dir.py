"""A directory to put a load on: every id is a word, so that each token shows in a stream."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from deploy.bench.model_dir import main


def test_every_id_is_text_of_its_own(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"], "vocab_size": 3000}))
    directory = tmp_path / "model"
    assert main([str(directory), "--model-config", str(config)]) == 0
    assert json.loads((directory / "config.json").read_text())["vocab_size"] == 3000
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 3000
    words = [tokenizer.decode([token]) for token in range(256, 3000)]
    assert len(set(words)) == len(words) and all(word.strip().isascii() for word in words)


def test_what_cannot_be_made_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "m"), "--model-config", "no-such-model"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "neither a known model" in line
