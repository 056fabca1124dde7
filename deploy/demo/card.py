"""Writes the model card of the demo model, with the numbers of the run that made it."""

from __future__ import annotations

from pathlib import Path

CARD = """\
---
license: apache-2.0
language: en
pipeline_tag: text-generation
---

# Baton demo model

A toy chat model of {millions:.1f} million parameters in the Qwen3 architecture. It comes with Baton
so that a newcomer can see the whole system at work (prefill, KV cache transfer, decode, streaming)
without a download, on a machine without a GPU.

## What it is

- Trained from nothing on text that a small generator writes ([text.py](../text.py)): short tales,
  and chats about serving language models. No text of other people went into it.
- It answers simple questions ("What is prefill?", "Why disaggregate?"), makes small talk, and tells
  tales ("Tell me a story.").
- To most other questions it answers "I am a small demo model and only know about tales and
  serving."

## What it is not

- It has no knowledge of the world. It repeats and mixes the sentences of its generator, and it can
  be wrong even about those.
- It is not for use in any product, and no measure of the quality of Baton's answers with other
  models.
- It does not keep to details. A tale follows its plot, but not the animal that was asked for, and
  the names in it change from line to line. It does not keep names from earlier turns either.
- It does not always notice that it knows nothing: now and then it answers a strange question with a
  sentence about serving.
- Its speed says little about larger models.

## Facts

| | |
|---|---|
| Architecture | Qwen3: 5 layers, hidden size 192, 6 heads, 2 key-value heads, tied embeddings |
| Parameters | {parameters} (bfloat16) |
| Vocabulary | 2048, byte-level BPE: reads and writes any text |
| Context | 2048 positions, trained on windows of up to 512 tokens |
| Chat format | ChatML; `<|im_end|>` ends a turn, `<|endoftext|>` a document |
| Training | {steps} steps of 2048 tokens, {minutes:.0f} minutes on 2 CPU cores |
| Loss | {train_loss:.3f} in training, {test_loss:.3f} on held-out text (nats per token of its own lines) |

## How to reproduce it

```
python -m deploy.demo.train --out deploy/demo/model
```

The seed fixes the text, the first weights, and the order of the batches. Another processor or
another version of PyTorch rounds in other ways, so the weights will be close in quality, but not
the same bytes.
"""


def write_card(
    out: Path, *, parameters: int, steps: int, train_loss: float, test_loss: float, minutes: float
) -> None:
    """Write ``README.md`` into the model's folder."""
    text = CARD.format(
        millions=parameters / 1e6,
        parameters=parameters,
        steps=steps,
        train_loss=train_loss,
        test_loss=test_loss,
        minutes=minutes,
    )
    (out / "README.md").write_text(text, encoding="utf-8")
