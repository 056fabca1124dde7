"""A checkpoint without tokenizer.json, served: prompts, answers, and how a start ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

from tests.checkpoints import write_sentencepiece
from tests.e2e.router.harness import DEADLINE_S, small_cluster
from tests.fake_worker import Script

TEMPLATE = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"


def test_prompts_and_answers_are_those_of_sentencepiece(tmp_path: Path) -> None:
    model_dir, sockets = tmp_path / "model", tmp_path / "s"
    model_dir.mkdir()
    sockets.mkdir()
    # "legacy": every run of text between special tokens begins as a text does.
    write_sentencepiece(model_dir, add_bos_token=True, legacy=True, chat_template=TEMPLATE)
    reference = SentencePieceProcessor(model_file=str(model_dir / "tokenizer.model"))
    with small_cluster(model_dir, sockets) as cluster, cluster.router.http() as http:
        prompt = http.post("/tokenize", json={"prompt": "that he was"}).json()["tokens"]
        assert prompt == [reference.bos_id(), *reference.encode("that he was")]
        messages = [{"role": "user", "content": "that"}]
        chat = http.post("/tokenize", json={"messages": messages}).json()["tokens"]
        assert chat == [reference.bos_id(), *reference.encode("[INST] that [/INST]")]
        more = {"messages": messages, "add_special_tokens": True}
        assert http.post("/tokenize", json=more).json()["tokens"] == [reference.bos_id(), *chat]
        usage = http.post("/v1/chat/completions", json={**more, "max_tokens": 1}).json()["usage"]
        assert usage["prompt_tokens"] == len(chat) + 1
        plain = {"prompt": "that he was", "add_special_tokens": False, "max_tokens": 1}
        usage = http.post("/v1/completions", json=plain).json()["usage"]
        assert usage["prompt_tokens"] == len(prompt) - 1
        cluster.use(Script(answers=[reference.encode("with naïve 🙂")]))
        body = {"prompt": "that he was", "echo": True, "max_tokens": 64}
        answer = http.post("/v1/completions", json=body).json()["choices"][0]
        assert answer["text"] == "that he was with naïve 🙂"


def start(model_dir: Path) -> "subprocess.Popen[str]":
    (model_dir / "config.json").write_text("{}")
    command = [sys.executable, "-m", "deploy", "router", str(model_dir), "--worker", f"ipc://{model_dir}/w"]
    return subprocess.Popen(
        [*command, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_broken_file_is_a_refused_configuration(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"no such thing")
    router = start(tmp_path)
    out, error = router.communicate(timeout=DEADLINE_S)
    assert (router.returncode, out) == (2, "")
    assert error.startswith(f"baton: error: {tmp_path}/tokenizer.model is not a sentencepiece model: ")
    assert error.count("\n") == 1


def test_a_start_is_stopped_with_its_conversion(tmp_path: Path) -> None:
    fifo = tmp_path / "tokenizer.model"
    os.mkfifo(fifo)
    router = start(tmp_path)
    writer = os.open(fifo, os.O_WRONLY)  # waits until the conversion reads
    try:
        router.send_signal(signal.SIGTERM)
        assert router.wait(DEADLINE_S) == 0
        with pytest.raises(BrokenPipeError):
            for _ in range(1024):  # a pipe holds 64 KiB: a write beyond that fails when there is no reader
                os.write(writer, bytes(1 << 16))
    finally:
        os.close(writer)
        router.communicate()
