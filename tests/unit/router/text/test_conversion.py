"""Tokenizers of checkpoints without tokenizer.json, against transformers' own and sentencepiece."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from router.chat.chat_template import ChatTemplate
from router.config import RouterConfigError
from router.text.checkpoint import read_json
from router.text.conversion import convert
from router.text.convert_tokenizer import convert_here
from router.text.tokenizer import TextTokenizer
from tests.checkpoints import write_sentencepiece, write_tokenizer, write_vocabulary
from tests.patience import patient

BOTH = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"


def write_llama(directory: Path) -> None:
    write_sentencepiece(directory, add_bos_token=True, chat_template=BOTH)


def write_mistral(directory: Path) -> None:
    write_sentencepiece(directory, "mistral", add_bos_token=True)


def write_gpt2(directory: Path) -> None:
    write_vocabulary(directory, "llama", tokenizer_class="GPT2Tokenizer")
    (directory / "chat_template.jinja").write_text(BOTH)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "llama": write_llama,
    "qwen2": write_vocabulary,
    "gpt2": write_gpt2,
    "tokenizer.json": write_tokenizer,
}


@dataclass(frozen=True)
class Loaded:
    directory: Path
    ours: TextTokenizer
    theirs: Any
    """transformers' AutoTokenizer of the same directory."""


def refuse_to_run(*args: Any, **kwargs: Any) -> NoReturn:
    raise AssertionError("a process was started")


@pytest.fixture(scope="module", params=WRITERS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("loaded")
    WRITERS[request.param](directory)
    before = sorted(directory.iterdir())
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "tokenizer.json":
            patch.setattr(subprocess, "run", refuse_to_run)
        ours = TextTokenizer(directory)
    assert sorted(directory.iterdir()) == before, "the conversion left a file"
    return Loaded(directory, ours, AutoTokenizer.from_pretrained(directory, local_files_only=True))


TEXTS = (
    "",
    " ",
    "Hello world",
    "  two  spaces and a tab\t.",
    "that he was\nwith his\n\n  not",
    "naïve é 日本 🙂👍🏽 \x00\x7f",
    "<s>x</s> <|im_start|>user\n<|im_end|><unk>",
    "\N{REPLACEMENT CHARACTER} ▁ <0x41>",
)


@given(text=st.one_of(st.sampled_from(TEXTS), st.text(max_size=30)), special=st.booleans())
@settings(max_examples=100, deadline=None)
def test_encoding_is_that_of_transformers(loaded: Loaded, text: str, special: bool) -> None:
    ours = loaded.ours.encode(text, special)
    assert ours == loaded.theirs.encode(text, add_special_tokens=special)


@given(text=st.one_of(st.sampled_from(TEXTS), st.text(max_size=30)))
@settings(max_examples=100, deadline=None)
def test_decoding_is_that_of_transformers(loaded: Loaded, text: str) -> None:
    tokens = loaded.theirs.encode(text)

    def decoded(skip: bool) -> str:
        text: str = loaded.theirs.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        return text

    assert loaded.ours.decode(tokens, skip_special_tokens=True) == decoded(skip=True)
    assert loaded.ours.decode(tokens, skip_special_tokens=False) == decoded(skip=False)
    detokenizer = loaded.ours.detokenizer()
    pieces = [detokenizer.push([token]) for token in tokens]
    assert "".join(pieces) + detokenizer.flush() == decoded(skip=True)


def test_the_vocabulary_is_that_of_transformers(loaded: Loaded) -> None:
    assert loaded.ours.size == len(loaded.theirs)
    added = loaded.theirs.added_tokens_decoder
    assert loaded.ours.special == {token for token, entry in added.items() if entry.special}


def test_a_chat_is_that_of_transformers(loaded: Loaded) -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "that is"}]
    template = ChatTemplate(loaded.directory, loaded.ours.special_tokens)
    expected = loaded.theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert template.render(messages, add_generation_prompt=True) == expected
    if loaded.theirs.chat_template == BOTH:
        assert expected.startswith(loaded.theirs.bos_token) and expected.endswith(loaded.theirs.eos_token)


@pytest.mark.parametrize("write", [write_llama, write_mistral])
def test_sentencepiece_agrees_and_the_beginning_is_marked(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    write(tmp_path)
    tokenizer = TextTokenizer(tmp_path)
    reference = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in ("that he was", "x = [1, 2]; naïve", "日本 🙂\nwith"):
        tokens = tokenizer.encode(text, add_special_tokens=True)
        assert tokens == [reference.bos_id(), *reference.encode(text)]
        assert tokenizer.decode(tokens, skip_special_tokens=True) == reference.decode(tokens) == text
    smile = tokenizer.encode("🙂", add_special_tokens=False)[-4:]
    assert b"".join(map(tokenizer.token_bytes, smile)) == "🙂".encode()


def test_the_process_that_asks_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    write_llama(tmp_path)
    code = (
        "import sys, pathlib, router.process\n"
        "from router.text.tokenizer import TextTokenizer\n"
        "tokenizer = TextTokenizer(pathlib.Path(sys.argv[1]))\n"
        "bad = {'torch', 'transformers', 'sentencepiece', 'google.protobuf', 'numpy'}\n"
        "print(tokenizer.size, sorted(bad & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "320 []"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("write", "file", "content", "message"),
    [
        (write_llama, "tokenizer.model", b"", r"tokenizer\.model is not a sentencepiece model: it is empty"),
        (write_llama, "tokenizer.model", b"aGVsbG8= 0\n" * 50, r"tokenizer\.model is not a sentencepiece mo"),
        (write_vocabulary, "vocab.json", b"{", r"vocab\.json cannot be read"),
        (write_vocabulary, "vocab.json", b"[]", r"vocab\.json must hold a JSON object"),
        (write_vocabulary, "vocab.json", b'{"a": "b"}', r"vocab\.json: the id of 'a' is 'b'"),
        (write_vocabulary, "merges.txt", b"#version: 0.2\nzz qq\n", r"merges\.txt: line 2: 'zz' is not in"),
        (write_vocabulary, "merges.txt", b"a\n", r"merges\.txt: line 1 must hold two tokens"),
        (write_vocabulary, "merges.txt", b"\xff", r"merges\.txt cannot be read"),
        (write_vocabulary, "merges.txt", None, r"merges\.txt does not exist; .*vocab\.json needs it"),
        (
            write_gpt2,
            "tokenizer_config.json",
            b'{"tokenizer_class": "LlamaTokenizer"}',
            r"vocab\.json: '!' has the id 0, but None in the LlamaTokenizer",
        ),
        (
            write_gpt2,
            "tokenizer_config.json",
            b'{"tokenizer_class": "CanineTokenizer"}',
            r"vocab\.json: CanineTokenizer of transformers has no form",
        ),
    ],
)
def test_a_broken_file_is_named(
    tmp_path: Path, write: Callable[[Path], None], file: str, content: bytes | None, message: str
) -> None:
    write(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(RouterConfigError, match=message):
        convert_here(tmp_path)


def test_what_transformers_finds_wrong_is_passed_on(tmp_path: Path) -> None:
    write_vocabulary(tmp_path, "mistral", tokenizer_class=None)
    with pytest.raises(RouterConfigError, match=r"vocab\.json: transformers cannot make .*tokenizer_class"):
        convert_here(tmp_path)


def test_a_conversion_that_sentencepiece_contradicts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_llama(tmp_path)
    monkeypatch.setattr(SentencePieceProcessor, "encode", lambda *args, **kwargs: ["▁a"])
    with pytest.raises(RouterConfigError, match=r"tokenizer\.model: sentencepiece and what transformers"):
        convert_here(tmp_path)


def test_the_files_looked_for_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", refuse_to_run)
    names = r"looked for tokenizer\.json, tokenizer\.model, and vocab\.json with merges\.txt"
    with pytest.raises(RouterConfigError, match=names):
        TextTokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(RouterConfigError, match=r"tokenizer_config\.json must hold a JSON object"):
        TextTokenizer(tmp_path)


def test_no_code_of_the_checkpoint_or_the_working_directory_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_vocabulary(tmp_path, auto_map={"AutoTokenizer": ["mine.Mine", "mine.Mine"]}, tokenizer_class="Mine")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**read_json(path), "auto_map": {"AutoConfig": "mine.Mine"}}))
    mark = tmp_path / "ran"
    for name in ("mine", "sentencepiece", "transformers", "msgspec"):
        (tmp_path / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')\nraise SystemExit(7)\n")
    monkeypatch.chdir(tmp_path)
    try:
        convert(Path())
    except RouterConfigError as error:
        assert "vocab.json" in str(error)
    assert not mark.exists()


def test_a_conversion_that_does_not_end_is_given_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.model")  # without a writer, whoever opens it waits
    with pytest.raises(RouterConfigError, match=r"took more than 0\.5 s"):
        convert(tmp_path, time_limit_s=0.5)


def test_a_process_without_an_answer_is_an_error_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_llama(tmp_path)
    (tmp_path / "python").write_text("#!/bin/sh\necho went wrong >&2\nexit 3\n")
    (tmp_path / "python").chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(RouterConfigError, match=r"ended with code 3: went wrong"):
        convert(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_process_ends_with_the_one_that_asked(tmp_path: Path, number: signal.Signals) -> None:
    fifo = tmp_path / "tokenizer.model"
    os.mkfifo(fifo)
    code = (
        "import sys, pathlib, signal, router.text.conversion\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "router.text.conversion.convert(pathlib.Path(sys.argv[1]))"
    )
    asking = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    writer = os.open(fifo, os.O_WRONLY)  # waits until the conversion reads
    try:
        asking.send_signal(number)
        assert asking.wait(patient(30)) == (0 if number is signal.SIGTERM else -number)
        with pytest.raises(BrokenPipeError):
            # A pipe holds 64 KiB: a write beyond that waits for a reader, and fails when there is none.
            for _ in range(1024):
                os.write(writer, bytes(1 << 16))
    finally:
        os.close(writer)
