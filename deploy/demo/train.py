"""Trains the bundled demo model from nothing: ``python -m deploy.demo.train --out deploy/demo/model``.

The model shows a newcomer the whole system without a download, so it has to be tiny, to train in minutes on
two CPU cores, and to write readable sentences. Everything follows from the seed; another machine or another
version of the libraries rounds differently and then ends at slightly other weights.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from deploy.demo.card import write_card
from deploy.demo.optimizer import Optimizer
from deploy.demo.text import END_OF_TEXT, TURN_END, Document, documents, render, render_chat
from deploy.demo.tokenizer import VOCABULARY, train_tokenizer

TEXT_BYTES = 8_000_000
HELD_OUT_BYTES = 120_000
CONTEXT = 2048
SHORT = (8, 256)
LONG = (4, 512)
LONG_SHARE = 0.25
# What users say is noise to a large part; the model learns a little from it, and all from its own lines.
PROMPT_WEIGHT = 0.1


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A Qwen3 of about two million parameters; two key-value heads let it be split over two devices."""
    vocabulary = tokenizer.get_vocab()
    stops: list[int] = [vocabulary[TURN_END], vocabulary[END_OF_TEXT]]
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    return model


def encode(tokenizer: PreTrainedTokenizerFast, made: list[Document]) -> list[torch.Tensor]:
    """Each document as a tensor of two rows: the tokens, and 1 where the model is to learn them in full.

    Turns are tokenized one by one; that changes nothing, because they meet at special tokens.
    """
    pieces: list[tuple[str, int]] = []
    counts: list[int] = []
    for document in made:
        turns = (
            [(document, 1)]
            if isinstance(document, str)
            else [(render_chat([turn]), int(turn.role == "assistant")) for turn in document]
        )
        pieces += [*turns, (END_OF_TEXT, 1)]
        counts.append(len(turns) + 1)
    ids: list[list[int]] = tokenizer([text for text, _ in pieces])["input_ids"]
    rows = iter(
        [
            torch.tensor([tokens, [learn] * len(tokens)])
            for tokens, (_, learn) in zip(ids, pieces, strict=True)
        ]
    )
    return [torch.cat(list(islice(rows, count)), dim=1) for count in counts]


def windows(encoded: list[torch.Tensor], length: int, rng: torch.Generator) -> torch.Tensor:
    """Windows that start where a document starts, as a prompt does; what sticks out at the end is cut off."""
    cut: list[torch.Tensor] = []
    open_parts: list[torch.Tensor] = []
    filled = 0
    for index in torch.randperm(len(encoded), generator=rng).tolist():
        open_parts.append(encoded[index])
        filled += encoded[index].shape[1]
        if filled >= length:
            cut.append(torch.cat(open_parts, dim=1)[:, :length])
            open_parts, filled = [], 0
    return torch.stack(cut)


def batches(encoded: list[torch.Tensor], steps: int, rng: torch.Generator) -> Iterator[torch.Tensor]:
    """Short windows first, because they are cheap and hold most documents; long ones at the end."""
    long_steps = int(steps * LONG_SHARE)
    for (rows, length), wanted in ((SHORT, steps - long_steps), (LONG, long_steps)):
        given = 0
        while given < wanted:
            for batch in windows(encoded, length, rng).split(rows):
                if len(batch) == rows and given < wanted:
                    given += 1
                    yield batch


def loss_of(model: Qwen3ForCausalLM, batch: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The loss to learn from, and the plain mean loss over what the model itself has to write."""
    tokens, learn = batch[:, 0], batch[:, 1, 1:].flatten().float()
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    weights = learn + PROMPT_WEIGHT * (1 - learn)
    written = (losses.detach() * learn).sum() / learn.sum()
    return (losses * weights).sum() / weights.sum(), written.item()


def fit(model: Qwen3ForCausalLM, encoded: list[torch.Tensor], steps: int, seed: int) -> float:
    """Train and return the mean loss of the last hundred steps."""
    optimizer = Optimizer(model, steps)
    model.train()
    losses: list[float] = []
    began = time.monotonic()
    for step, batch in enumerate(batches(encoded, steps, torch.Generator().manual_seed(seed))):
        loss, written = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(written)
        if (step + 1) % 50 == 0:
            recent = sum(losses[-50:]) / 50
            print(f"step {step + 1}/{steps}  loss {recent:.3f}  {time.monotonic() - began:.0f} s", flush=True)
    last = losses[-100:]
    return sum(last) / len(last)


@torch.inference_mode()
def held_out_loss(model: Qwen3ForCausalLM, encoded: list[torch.Tensor]) -> float:
    """Mean loss on documents of another seed."""
    model.eval()
    rows = windows(encoded, LONG[1], torch.Generator().manual_seed(0)).split(1)
    return sum(loss_of(model, row)[1] for row in rows) / len(rows)


def main(
    out: Annotated[Path, typer.Option(help="Folder to write the model to.")] = Path("deploy/demo/model"),
    steps: Annotated[int, typer.Option(help="Training steps of 2048 tokens each.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the text, the weights, and the order.")] = 7,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Write the text, train the tokenizer and the model, and save both with a model card."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    made = list(documents(seed, TEXT_BYTES))
    tokenizer = train_tokenizer(map(render, made), CONTEXT)
    encoded = encode(tokenizer, made)
    model = make_model(tokenizer)
    size = sum(p.numel() for p in model.parameters())
    tokens = sum(document.shape[1] for document in encoded)
    print(f"{len(made)} documents, {tokens} tokens, {size} parameters", flush=True)
    began = time.monotonic()
    train_loss = fit(model, encoded, steps, seed)
    minutes = (time.monotonic() - began) / 60
    model.bfloat16()
    test_loss = held_out_loss(model, encode(tokenizer, list(documents(seed + 1, HELD_OUT_BYTES))))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    write_card(out, parameters=size, steps=steps, train_loss=train_loss, test_loss=test_loss, minutes=minutes)
    print(f"loss {train_loss:.3f}, held-out loss {test_loss:.3f}, {minutes:.1f} minutes, saved to {out}")


if __name__ == "__main__":
    typer.run(main)
