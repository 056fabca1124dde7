"""Makes tiny random checkpoints, complete enough to be served: config, safetensors weights, tokenizer.

`make_checkpoint("qwen3", tmp_path / "m", seed=1)` writes config.json, generation_config.json,
model.safetensors (or shards with an index), tokenizer.json and tokenizer_config.json with a chat template.
The weights are drawn so that logits are well apart and every bias and norm matters: a forgotten one shows.
"""

import io
import json
from pathlib import Path
from typing import Any, Literal

Family = Literal["llama", "mistral", "qwen2", "qwen3", "qwen3_moe"]
FAMILIES: tuple[Family, ...] = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")

VOCAB_SIZE = 320
BOS, IM_START, IM_END = "<|bos|>", "<|im_start|>", "<|im_end|>"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_WORDS = " the and of to in a is that for it as was with be by on not he his but at are this have from"


def make_checkpoint(
    family: Family,
    directory: Path,
    seed: int = 0,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    intermediate: int = 96,
    max_model_len: int = 1024,
    tied: bool = False,
    dtype: str = "float32",
    rope: dict[str, Any] | None = None,
    legacy_rope: bool = False,
    sharded: bool = False,
    eos: bool = True,
    **config_overrides: Any,
) -> Path:
    """Write a checkpoint of `family` and return `directory`.

    `rope` is transformers' `rope_parameters`; `legacy_rope` writes it the old way (`rope_theta` and
    `rope_scaling`). `sharded` splits the weights over several files with an index. `eos=False` leaves the
    model without an end token, so that a random model never stops early. `config_overrides` go into the
    config as they are (`sliding_window`, `attention_bias`, ...).
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer_ids = write_tokenizer(directory, eos)
    end_ids = [tokenizer_ids[IM_END]] if eos else None
    values: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": max_model_len,
        "tie_word_embeddings": tied,
        "bos_token_id": tokenizer_ids[BOS],
        "eos_token_id": end_ids,
        "rope_parameters": dict(rope or {"rope_type": "default", "rope_theta": 10000.0}),
    }
    if family == "mistral":
        values["sliding_window"] = None
    if family == "qwen3_moe":
        values |= {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    values.update(config_overrides)
    config = AutoConfig.for_model(family, **values)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).to(torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                _fill(name, parameter)
    model.generation_config.eos_token_id = end_ids
    model = model.to(getattr(torch, dtype))
    total_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(directory, max_shard_size=total_bytes // 3 if sharded else "5GB")
    if legacy_rope:
        _rewrite_rope_the_old_way(directory / "config.json")
    return directory


def _fill(name: str, parameter: Any) -> None:
    """Norm weights around 1, biases of the activations' size, matrices that keep the variance, also where
    those of several experts are one tensor."""
    if "norm" in name:
        parameter.normal_(1.0, 0.2)
    elif name.endswith("bias"):
        parameter.normal_(0.0, 0.3)
    elif "embed" in name:
        parameter.normal_(0.0, 0.7)
    else:
        parameter.normal_(0.0, 1.3 * parameter.shape[-1] ** -0.5)


def write_tokenizer(directory: Path, eos: bool = True) -> dict[str, int]:
    """A byte-level BPE of `VOCAB_SIZE` tokens with a chat template; returns the ids of the special ones.
    `eos=False` leaves it without an end token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = [BOS, IM_START, IM_END]
    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    for word in _WORDS.split():
        built = "Ġ"
        for letter in word:
            if built + letter not in vocab and len(vocab) < VOCAB_SIZE - len(specials):
                vocab[built + letter] = len(vocab)
                merges.append((built, letter))
            built += letter
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=IM_END if eos else None,
        pad_token=IM_END,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    return {text: bpe.token_to_id(text) for text in specials}


def write_sentencepiece(directory: Path, model_type: str = "llama", **settings: Any) -> None:
    """A checkpoint's tokenizer as Llama 2 and Mistral v0.1 had it: `tokenizer.model` with byte fallback and
    no tokenizer.json. `settings` go into tokenizer_config.json."""
    from sentencepiece import SentencePieceTrainer

    sentences = [" ".join(_WORDS.split()[start : start + 8]) + ", naïve: x = [1, 2]" for start in range(32)]
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    _write_settings(directory, model_type, {"tokenizer_class": "LlamaTokenizer", **settings})


def write_vocabulary(directory: Path, model_type: str = "qwen2", **settings: Any) -> None:
    """A checkpoint's tokenizer as GPT-2 and Qwen2 had it: `vocab.json` and `merges.txt`."""
    write_tokenizer(directory)
    path = directory / "tokenizer.json"
    made = json.loads(path.read_text())
    path.unlink()
    (directory / "vocab.json").write_text(json.dumps(made["model"]["vocab"]))
    merges = [" ".join(pair) for pair in made["model"]["merges"]]
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    added = {str(entry.pop("id")): entry for entry in made["added_tokens"]}
    given = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": IM_END, "added_tokens_decoder": added}
    _write_settings(directory, model_type, {**given, **settings})


def _write_settings(directory: Path, model_type: str, settings: dict[str, Any]) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": VOCAB_SIZE}))


def _rewrite_rope_the_old_way(path: Path) -> None:
    values = json.loads(path.read_text())
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type", "default") != "default":
        values["rope_scaling"] = rope
    path.write_text(json.dumps(values))
