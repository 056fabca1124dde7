"""Every key of `config.json` and `generation_config.json` that transformers reads for the families that are
served, and what becomes of it: obeyed, harmless, or refused unless its value changes nothing. Keys that one
family alone has are in its file (services/engine/models/).

A test holds these tables against transformers' configuration classes. A key in none of them is not read by
transformers either; it is named when the model is loaded. For tokenizer_config.json there is
router/text/tokenizer_keys.py.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from services.engine.errors import CheckpointError

NOTHING: tuple[Any, ...] = (None, False, 0, [], {}, "")
"""Values that switch a thing off."""

OBEYED = {
    "architectures": "model_config.py",
    "model_type": "model_config.py",
    "vocab_size": "model_config.py",
    "hidden_size": "model_config.py",
    "intermediate_size": "model_config.py",
    "num_hidden_layers": "model_config.py",
    "num_attention_heads": "model_config.py",
    "num_key_value_heads": "model_config.py",
    "head_dim": "model_config.py",
    "hidden_act": "model_config.py: silu, also spelled swish",
    "rms_norm_eps": "model_config.py",
    "max_position_embeddings": "the longest request, and the rotary embedding",
    "original_max_position_embeddings": "rope_config.py: comes before the one within rope_parameters",
    "tie_word_embeddings": "output_matrix.py: a stored head that differs is kept",
    "attention_bias": "Llama and Qwen3; transformers' other families do not read it",
    "mlp_bias": "Llama; transformers' other families do not read it",
    "rope_parameters": "rope_config.py",
    "rope_scaling": "rope_config.py",
    "rope_theta": "rope_config.py",
    "partial_rotary_factor": "rope_config.py: refused unless 1",
    "sliding_window": "windows.py",
    "use_sliding_window": "windows.py: Qwen2 and Qwen3; transformers' other families do not read it",
    "max_window_layers": "windows.py: Qwen2 and Qwen3; transformers' other families do not read it",
    "layer_types": "windows.py",
    "eos_token_id": "end_tokens.py",
    "quantization_config": "quantization_config.py: refused unless it is of the KV cache alone",
    "num_nextn_predict_layers": "tensor_names.py: the tensors of these layers are skipped",
    "mtp_num_hidden_layers": "tensor_names.py: likewise",
    "num_mtp_layers": "tensor_names.py: likewise",
    "mtp_layer_types": "tensor_names.py: likewise",
}

_OUTPUT = "what else transformers' models give out"
_LABELS = "classification heads"
_TRAINING = "training only"
_ORIGIN = "says where the file comes from"
_HOW = "how transformers computes, not what"
HARMLESS = {
    "dtype": "the flag --dtype says what is computed in",
    "torch_dtype": "likewise",
    "bos_token_id": "prompts begin with what the tokenizer puts there",
    "pad_token_id": "nothing is padded",
    "sep_token_id": "nothing is separated",
    "decoder_start_token_id": "for encoder-decoders",
    "tokenizer_class": "router/text/tokenizer_keys.py",
    "initializer_range": _TRAINING,
    "attention_dropout": _TRAINING,
    "hidden_dropout": _TRAINING,
    "resid_pdrop": _TRAINING,
    "embd_pdrop": _TRAINING,
    "mlp_dropout": _TRAINING,
    "gradient_checkpointing": _TRAINING,
    "use_cache": _HOW,
    "pretraining_tp": _HOW,
    "chunk_size_feed_forward": _HOW,
    "attn_implementation": _HOW,
    "_attn_implementation": _HOW,
    "_attn_implementation_internal": _HOW,
    "_attn_implementation_autoset": _HOW,
    "_flash_attn_2_enabled": _HOW,
    "experts_implementation": _HOW,
    "_experts_implementation_internal": _HOW,
    "torchscript": _HOW,
    "use_bfloat16": _HOW,
    "tf_legacy_loss": _HOW,
    "distributed_config": _HOW,
    "return_dict": _OUTPUT,
    "output_attentions": _OUTPUT,
    "output_hidden_states": _OUTPUT,
    "tie_last_hidden_states": _OUTPUT,
    "tie_encoder_decoder": "for encoder-decoders",
    "cross_attention_hidden_size": "for encoder-decoders",
    "pruned_heads": "not read since transformers 5",
    "id2label": _LABELS,
    "label2id": _LABELS,
    "num_labels": _LABELS,
    "problem_type": _LABELS,
    "finetuning_task": _LABELS,
    "task_specific_params": "pipelines only",
    "prefix": "pipelines only",
    "transformers_version": _ORIGIN,
    "name_or_path": _ORIGIN,
    "base_model_name_or_path": _ORIGIN,
    "_name_or_path": _ORIGIN,
    "_commit_hash": _ORIGIN,
    "unsloth_version": _ORIGIN,
    "unsloth_fixed": _ORIGIN,
    "transformers.js_config": _ORIGIN,
    "auto_map": "no code of a checkpoint is run; named when the model is loaded",
    "model_max_length": "max_position_embeddings counts, as in transformers",
}

ONLY: dict[str, tuple[Any, ...]] = {
    "is_causal": (True,),
    "is_encoder_decoder": NOTHING,
    "is_decoder": (True, *NOTHING),
    "add_cross_attention": NOTHING,
    "attention_chunk_size": NOTHING,
    "kv_sharing_modes": NOTHING,
    "num_kv_shared_layers": NOTHING,
    "per_layer_config": NOTHING,
    "fusion_config": NOTHING,
    "compression_config": NOTHING,
    "quantization": NOTHING,
    "transformers_weights": NOTHING,
    "configuration_files": NOTHING,
    "number_of_conv_states": NOTHING,
    "mlp_layer_types": NOTHING,
    "text_config": NOTHING,
    "decoder": NOTHING,
    "generator": NOTHING,
    "text_encoder": NOTHING,
    "encoder": NOTHING,
    "vision_config": NOTHING,
    # What other decoders compute besides. Where it is announced, the weights were not made for these.
    "llama_4_scaling_beta": NOTHING,
    "attn_logit_softcapping": NOTHING,
    "final_logit_softcapping": NOTHING,
    "clip_qkv": NOTHING,
    "query_pre_attn_scalar": (None,),
    "logit_scale": (1, None),
    "logits_scaling": (1, None),
    "attention_multiplier": (None,),
    "embedding_multiplier": (1, None),
    "residual_multiplier": (1, None),
    "scale_emb": (1, None),
    "scale_depth": (None,),
    "num_experts": NOTHING,
    "num_local_experts": NOTHING,
    "n_routed_experts": NOTHING,
    "first_k_dense_replace": NOTHING,
    "no_rope_layers": NOTHING,
    "no_rope_layer_interval": NOTHING,
}
"""Refused with any other value."""

BY_THE_ROUTER = {
    "do_sample": "whether temperature counts",
    "temperature": "the default of a request",
    "top_k": "the default of a request",
    "top_p": "the default of a request",
    "min_p": "the default of a request",
    "repetition_penalty": "the default of a request",
    "max_new_tokens": "the request's max_tokens counts",
    "max_length": "the request's max_tokens counts",
}
"""Of generation_config.json: what the router does with it."""

_BEAMS = "beam search only, which num_beams announces"
_ASSISTED = "speculation in transformers, which changes no greedy token"
GENERATION_HARMLESS = {
    "eos_token_id": "obeyed: end_tokens.py",
    "bos_token_id": HARMLESS["bos_token_id"],
    "pad_token_id": HARMLESS["pad_token_id"],
    "decoder_start_token_id": HARMLESS["decoder_start_token_id"],
    "transformers_version": _ORIGIN,
    "_from_model_config": _ORIGIN,
    "_commit_hash": _ORIGIN,
    "early_stopping": _BEAMS,
    "length_penalty": _BEAMS,
    "num_beam_groups": _BEAMS,
    "diversity_penalty": _BEAMS,
    "low_memory": _BEAMS,
    "num_return_sequences": "the request's n counts",
    "encoder_no_repeat_ngram_size": "for encoder-decoders",
    "use_cache": _HOW,
    "cache_implementation": _HOW,
    "cache_config": _HOW,
    "max_cache_len": _HOW,
    "return_legacy_cache": _HOW,
    "compile_config": _HOW,
    "disable_compile": _HOW,
    "continuous_batching_config": _HOW,
    "prefill_chunk_size": _HOW,
    "output_attentions": _OUTPUT,
    "output_hidden_states": _OUTPUT,
    "output_scores": _OUTPUT,
    "output_logits": _OUTPUT,
    "return_dict_in_generate": _OUTPUT,
    "renormalize_logits": "adds the same to every logit",
    "remove_invalid_values": "a request whose logits are not finite is ended",
    "use_mtp": _ASSISTED,
    "is_assistant": _ASSISTED,
    "num_assistant_tokens": _ASSISTED,
    "num_assistant_tokens_schedule": _ASSISTED,
    "assistant_confidence_threshold": _ASSISTED,
    "assistant_early_exit": _ASSISTED,
    "assistant_lookbehind": _ASSISTED,
    "assistant_ensemble_weight": _ASSISTED,
    "target_lookbehind": _ASSISTED,
    "prompt_lookup_num_tokens": _ASSISTED,
    "max_matching_ngram_size": _ASSISTED,
    "speculation_type": _ASSISTED,
}

GENERATION_ONLY: dict[str, tuple[Any, ...]] = {
    "min_length": NOTHING,
    "min_new_tokens": NOTHING,
    "max_time": (None,),
    "stop_strings": NOTHING,
    "num_beams": (1, None),
    "penalty_alpha": NOTHING,
    "dola_layers": NOTHING,
    "constraints": NOTHING,
    "force_words_ids": NOTHING,
    "typical_p": (1, None),
    "top_h": (None,),
    "epsilon_cutoff": NOTHING,
    "eta_cutoff": NOTHING,
    "encoder_repetition_penalty": (1, None),
    "no_repeat_ngram_size": NOTHING,
    "bad_words_ids": NOTHING,
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": NOTHING,
    "suppress_tokens": NOTHING,
    "begin_suppress_tokens": NOTHING,
    "sequence_bias": NOTHING,
    "token_healing": NOTHING,
    "guidance_scale": (1, None),
    "watermarking_config": NOTHING,
}


def check_config_keys(raw: Mapping[str, Any], own_keys: Collection[str], path: Path) -> list[str]:
    """The keys of config.json that nobody reads. Raises CheckpointError for one that is not supported.

    `own_keys` are those that the model's family alone has, whatever the tables say. Old files hold keys of
    generation_config.json too, which some versions of transformers obey.
    """
    raw = {key: value for key, value in raw.items() if key not in own_keys}
    _refuse(raw, ONLY, path)
    _refuse(raw, GENERATION_ONLY, path)
    known = (
        OBEYED.keys() | HARMLESS.keys() | ONLY.keys() | GENERATION_ONLY.keys() | GENERATION_HARMLESS.keys()
    )
    return sorted(raw.keys() - known - BY_THE_ROUTER.keys())


def check_generation_keys(raw: Mapping[str, Any], path: Path) -> list[str]:
    """As `check_config_keys`, of generation_config.json."""
    _refuse(raw, GENERATION_ONLY, path)
    return sorted(raw.keys() - GENERATION_ONLY.keys() - GENERATION_HARMLESS.keys() - BY_THE_ROUTER.keys())


def _refuse(raw: Mapping[str, Any], only: Mapping[str, tuple[Any, ...]], path: Path) -> None:
    for key, values in only.items():
        if key in raw and raw[key] not in values:
            allowed = (
                "absent" if values[0] is None or values is NOTHING else f"absent or {json.dumps(values[0])}"
            )
            raise CheckpointError(
                f"{path}: {key} is {shown(raw[key])}, which is not supported; it must be {allowed}"
            )


def shown(value: Any) -> str:
    """A value as the file has it, in a few words."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
