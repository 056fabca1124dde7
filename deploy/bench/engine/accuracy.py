"""How far each precision option moves a model's logits: `python -m deploy.bench.engine.accuracy --device
cpu`.

Fixed inputs go through the demo model and two small random ones with heads of 128, once in float32 and once
with each option, all from the same bfloat16 weights. Prefill is one forward over each prompt; decode is fed
the prompt's continuation token by token, whatever the option would have said, so that positions stay
comparable. Then the same numbers are computed in other company: a sequence alone and among 64, a prompt whole
and in chunks.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

import deploy.demo
from deploy.demo.text import documents, render
from services.config import WorkerConfig
from services.engine.batch import Row
from services.engine.engine import Engine
from services.engine.models.model_config import read_model_config
from services.engine.step_inputs import build_step, order_rows

DEMO_MODEL = Path(deploy.demo.__file__).parent / "model"
REFERENCE = "float32"
OPTIONS: dict[str, dict[str, Any]] = {
    REFERENCE: {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, kv fp8": {"dtype": "bfloat16", "kv_dtype": "fp8"},
    "bfloat16, linear fp8": {"dtype": "bfloat16", "quantization": "fp8"},
    "bfloat16, both fp8": {"dtype": "bfloat16", "kv_dtype": "fp8", "quantization": "fp8"},
}
PROMPT_TOKENS, DECODE_TOKENS, CHUNK_TOKENS = 128, 32, 24
SEQUENCES, COMPANY = 8, 64
PAGE_SIZE_TOKENS = 16
SEQUENCE_PAGES = -(-(PROMPT_TOKENS + DECODE_TOKENS) // PAGE_SIZE_TOKENS)


@dataclass(frozen=True, slots=True)
class LogitShift:
    """Against float32: absolute differences of logits, KL(float32 || option) in nats a position, and the
    share of positions whose most likely token is the same."""

    largest: float
    mean: float
    kl_mean: float
    kl_largest: float
    same_token: float


@dataclass(frozen=True, slots=True)
class Logits:
    """float32 on the host: `prefill` `[sequences, prompt, vocab]`, `decode` `[sequences, steps, vocab]`."""

    prefill: Tensor
    decode: Tensor


def moved(reference: Tensor, option: Tensor) -> LogitShift:
    error = (reference - option).abs()
    expected, found = reference.log_softmax(-1), option.log_softmax(-1)
    kl = (expected.exp() * (expected - found)).sum(-1)
    same = (reference.argmax(-1) == option.argmax(-1)).float().mean()
    return LogitShift(error.max().item(), error.mean().item(), kl.mean().item(), kl.max().item(), same.item())


class AccuracyModel:
    """An engine with its pages handed out, and its logits taken before they are sampled from."""

    def __init__(self, model_dir: Path, device: str, options: dict[str, Any]) -> None:
        config = WorkerConfig(
            name="accuracy",
            role="unified",
            model_dir=model_dir,
            listen="ipc:///unused",
            device="cuda" if device == "cuda" else "cpu",
            page_size_tokens=PAGE_SIZE_TOKENS,
            max_batch=COMPANY,
            **options,
        )
        self.engine = Engine(config, read_model_config(model_dir))
        self.engine.load(lambda done_bytes, total_bytes: None)
        self.engine.allocate_pool((COMPANY + 1) * SEQUENCE_PAGES)

    def table(self, sequence: int) -> list[int]:
        return list(range(sequence * SEQUENCE_PAGES, (sequence + 1) * SEQUENCE_PAGES))

    @torch.inference_mode()
    def step(self, rows: list[Row]) -> list[Tensor]:
        """One forward; float32 logits `[tokens, vocab]` of each row, in the rows' order."""
        engine, order = self.engine, order_rows(rows)
        step = build_step(
            [rows[at] for at in order],
            engine.steps.sampled,
            [-1] * len(rows),
            engine.model,
            engine.layout,
            engine.pool.pages,
            engine.limits,
        )
        logits = engine.decoder.logits(engine.decoder.forward(step, engine.pool)).float().cpu()
        parts = torch.split(logits, [len(rows[at].tokens) for at in order])
        return [parts[order.index(at)] for at in range(len(rows))]

    def prefill(self, tokens: list[int], sequence: int, chunk: int = PROMPT_TOKENS) -> Tensor:
        starts = range(0, PROMPT_TOKENS, chunk)
        rows = [Row(tokens[s : min(s + chunk, PROMPT_TOKENS)], s, self.table(sequence)) for s in starts]
        return torch.cat([self.step([row])[0] for row in rows])

    def decode(self, inputs: list[list[int]], first_sequence: int) -> Tensor:
        """All sequences in each step; `[sequences, steps, vocab]`."""
        steps = []
        for at in range(PROMPT_TOKENS, PROMPT_TOKENS + DECODE_TOKENS):
            rows = [
                Row([tokens[at]], at, self.table(first_sequence + place))
                for place, tokens in enumerate(inputs)
            ]
            steps.append(torch.cat(self.step(rows)))
        return torch.stack(steps, dim=1)

    def logits(self, inputs: list[list[int]]) -> Logits:
        prefill = torch.stack([self.prefill(tokens, at) for at, tokens in enumerate(inputs)])
        return Logits(prefill, self.decode(inputs, 0))

    def in_company(self, inputs: list[list[int]]) -> dict[str, float]:
        """Largest difference of a logit between two ways of computing the same sequence."""
        alone = COMPANY  # the place whose pages no sequence of the batch has
        for at, tokens in enumerate(inputs):
            self.prefill(tokens, at)
        whole = self.prefill(inputs[0], alone)
        by_itself = self.decode(inputs[:1], alone)[0]
        among = self.decode(inputs, 0)[0]
        chunked = self.prefill(inputs[0], alone, CHUNK_TOKENS)
        return {
            "decode": (by_itself - among).abs().max().item(),
            "prefill": (whole - chunked).abs().max().item(),
        }


@contextmanager
def random_model(architecture: str, kind: str) -> Iterator[Path]:
    """A checkpoint in bfloat16: heads of 128, norms around 1, matrices that keep the variance."""
    values = {
        "architectures": [architecture],
        "model_type": kind,
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    with tempfile.TemporaryDirectory() as name:
        directory, generator = Path(name), torch.Generator().manual_seed(1)
        (directory / "config.json").write_text(json.dumps(values))
        tensors = {}
        for tensor, shape in read_model_config(directory).tensor_shapes().items():
            sampled = torch.randn(shape, generator=generator)
            sampled = 1 + 0.2 * sampled if "norm" in tensor else sampled * 1.3 * shape[-1] ** -0.5
            tensors[tensor] = sampled.to(torch.bfloat16)
        save_file(tensors, directory / "model.safetensors")
        yield directory


def text_inputs() -> list[list[int]]:
    """Tales and chats like those the demo model was trained on, cut to one length."""
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    ids = tokenizer.encode("".join(render(document) for document in documents(5, 100_000))).ids
    length = PROMPT_TOKENS + DECODE_TOKENS
    return [ids[at * length : (at + 1) * length] for at in range(COMPANY)]


def random_inputs() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    sampled = torch.randint(0, 2048, (COMPANY, PROMPT_TOKENS + DECODE_TOKENS), generator=generator)
    return [[int(token) for token in row] for row in sampled]


def measure(title: str, model_dir: Path, inputs: list[list[int]], device: str) -> dict[str, Any]:
    """Print one table for a model; everything in it, as JSON."""
    print(f"\n{title}\n")
    print("| option | phase | largest | mean | KL mean | KL largest | same token | in other company |")
    print("|---|---|---|---|---|---|---|---|")
    results: dict[str, Any] = {}
    reference: Logits | None = None
    for name, options in OPTIONS.items():
        model = AccuracyModel(model_dir, device, options)
        logits, company = model.logits(inputs[:SEQUENCES]), model.in_company(inputs)
        reference = reference or logits
        results[name] = {"company": company}
        for phase, expected, found in (
            ("prefill", reference.prefill, logits.prefill),
            ("decode", reference.decode, logits.decode),
        ):
            one = moved(expected, found)
            results[name][phase] = asdict(one)
            numbers = (one.largest, one.mean, one.kl_mean, one.kl_largest)
            cells = [name, phase, *(f"{number:.2g}" for number in numbers), f"{one.same_token:.1%}"]
            print("| " + " | ".join([*cells, f"{company[phase]:.2g}"]) + " |", flush=True)
    if reference is not None:
        results["spread"] = reference.prefill.std().item()
        print(f"\nThe logits' own standard deviation is {results['spread']:.3g}.")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of the precision options against float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="file for the numbers, as JSON")
    given = parser.parse_args()
    results = {"demo": measure("Demo model, text", DEMO_MODEL, text_inputs(), given.device)}
    for title, architecture, kind in (
        ("Random Llama, heads of 128", "LlamaForCausalLM", "llama"),
        ("Random Qwen3, heads of 128", "Qwen3ForCausalLM", "qwen3"),
    ):
        with random_model(architecture, kind) as directory:
            results[kind] = measure(title, directory, random_inputs(), given.device)
    if given.out is not None:
        given.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
