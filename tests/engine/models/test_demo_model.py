"""The bundled demo model: small, whole, offline, and able to answer what a newcomer asks first."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest

import deploy.demo
from deploy.demo.tales import tell
from deploy.demo.text import ChatTurn, documents, render, render_chat

MODEL = Path(deploy.demo.__file__).parent / "model"
LIMIT_BYTES = 8_000_000


@pytest.fixture(scope="module", autouse=True)
def offline() -> Any:
    """Nothing here may reach for a network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TRANSFORMERS_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    # Float32 gives the same greedy answer on every processor; the file itself holds bfloat16.
    # One thread, because for so small a model the threads cost more than they bring.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    loaded = AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True, dtype=torch.float32)
    yield loaded.eval()
    torch.set_num_threads(threads)


def reply(model: Any, tokenizer: Any, *turns: str, system: str | None = None) -> tuple[str, int]:
    """The greedy answer to the last of ``turns`` (user first, then taking turns), and its last token."""
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": role, "content": turn} for turn, role in zip(turns, roles, strict=False)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, do_sample=False, max_new_tokens=250)[0]
    answer = output[prompt["input_ids"].shape[1] :]
    return tokenizer.decode(answer, skip_special_tokens=True), int(answer[-1])


def test_folder_is_small_and_whole() -> None:
    files = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert sum(files.values()) < LIMIT_BYTES
    assert {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= files.keys()


def test_stop_tokens_agree(model: Any, tokenizer: Any) -> None:
    stops = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert model.generation_config.eos_token_id == stops
    assert model.config.eos_token_id == stops
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    "text",
    [
        "Once upon a time, a fox lived by a slow river.",
        "🦊 and 👩‍👩‍👧 and 🇳🇱",
        "你好，世界 привет मित्र مرحبا こんにちは",
        "two  spaces,\ttabs\n\nand lines\r\n  12345 = x ",
        "e\u0301 is not \u00e9",
        "",
    ],
)
def test_tokenizer_gives_text_back(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_chat_template_writes_what_training_wrote(tokenizer: Any) -> None:
    turns = [ChatTurn("system", "Be kind."), ChatTurn("user", "Hi\n"), ChatTurn("assistant", " Hello! 🦊")]
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == render_chat(turns)
    asked = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert asked == render_chat(turns[:2]) + "<|im_start|>assistant\n"
    in_parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}]}]
    assert tokenizer.apply_chat_template(in_parts, tokenize=False) == render_chat([ChatTurn("user", "Hi!")])


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("What is prefill?", ("prompt", "KV cache", "first token")),
        ("Why disaggregate prefill and decode?", ("prompt", "wait")),
        ("What is Baton?", ("Baton", "staging buffer")),
        ("What is the capital of France?", ("only know about tales and serving",)),
    ],
)
def test_answers_what_newcomers_ask(
    model: Any, tokenizer: Any, question: str, words: tuple[str, ...]
) -> None:
    text, last = reply(model, tokenizer, question)
    assert all(word in text for word in words), text
    assert last == tokenizer.eos_token_id


def test_tells_a_tale_to_its_end(model: Any, tokenizer: Any) -> None:
    """A whole tale. Not checked: who is in it, because the model does not keep to that (see its card)."""
    text, last = reply(model, tokenizer, "Tell me a story.")
    assert " named " in text
    assert text.count(".") >= 6
    assert last == tokenizer.eos_token_id


def test_long_prompt_and_earlier_turns(model: Any, tokenizer: Any) -> None:
    story = tell(random.Random(1)).text
    turns = [
        "Tell me a story about an owl.",
        story,
        "What is decode?",
        "It makes tokens.",
        "Tell me a joke.",
        "No.",
    ]
    text, last = reply(model, tokenizer, *turns, "What is prefill?", system="You are a helpful assistant.")
    assert "prompt" in text
    assert last == tokenizer.eos_token_id


def test_text_follows_its_seed() -> None:
    def written(seed: int) -> list[str]:
        return [render(document) for document in documents(seed, 60_000)]

    assert written(3) == written(3)
    assert written(3) != written(4)
    assert all(text.endswith("<|endoftext|>") for text in written(3))
    assert not any("{" in text for text in written(3) if not text.startswith("<|im_start|>"))
