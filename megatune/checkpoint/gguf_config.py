"""GGUF metadata and tensor names as a Hugging Face config and Hugging Face names, one entry an architecture.

Keys and names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's converter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatune.errors import CheckpointError

# In the digest of a converted folder: raise it when the conversion writes something else.
CONVERTER_VERSION = 2

_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Rotary factors are part of the config in Hugging Face folders.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# What every published model with Llama 3.1's rotary scaling has.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_LENGTH = 1.0, 4.0, 8192


class Metadata:
    """The scalar fields of a GGUF file; keys of the architecture without its name. `ropes`: the rotary tensors."""

    def __init__(self, fields: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], where: str) -> None:
        self.fields, self.tensors, self.where = fields, tensors, where
        self.architecture: str = self("general.architecture")
        self.ropes: dict[str, np.ndarray] = {}

    def __call__(self, key: str, default: Any = ...) -> Any:
        """The value of a key; CheckpointError where it is missing and has no default."""
        for name in (key, f"{self.fields.get('general.architecture')}.{key}"):
            if name in self.fields:
                return self.fields[name]
        if default is ...:
            raise CheckpointError(
                f"{self.where}: its metadata has no {key}; the file is damaged or of another kind"
            )
        return default


@dataclass(frozen=True)
class Architecture:
    """`permuted`: rows of q and k are stored for interleaved rotary embedding. `norm_offset`: norm weights are stored
    with 1 added. `layer`: names within a layer beside the common ones. `config`: keys beside the common ones."""

    model_type: str
    class_name: str
    permuted: bool = False
    norm_offset: bool = False
    layer: Mapping[str, str] = field(default_factory=dict)
    config: Callable[[Metadata], dict[str, Any]] = lambda meta: {}

    def hf_name(self, name: str) -> str | None:
        """The Hugging Face name of a GGUF tensor; None for one that is not known."""
        found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        if found is None:
            return None
        index, leaf, kind = found.groups()
        theirs = _TOP.get(leaf) if index is None else (_LAYER | dict(self.layer)).get(leaf)
        if theirs is None:
            return None
        return f"{theirs}.{kind}" if index is None else f"model.layers.{index}.{theirs}.{kind}"


def hf_config(meta: Metadata) -> dict[str, Any]:
    """config.json of a GGUF file. CheckpointError, naming the supported ones, for another architecture."""
    architecture = architecture_of(meta)
    if meta("expert_count", 0):
        raise CheckpointError(
            f"{meta.where}: mixtures of experts cannot be imported from GGUF; use safetensors"
        )
    heads, hidden = meta("attention.head_count"), meta("embedding_length")
    config = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": meta.tensors["token_embd.weight"][0],
        "hidden_size": hidden,
        "intermediate_size": meta("feed_forward_length"),
        "num_hidden_layers": meta("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta("attention.head_count_kv", heads),
        "head_dim": meta("attention.key_length", hidden // heads),
        "max_position_embeddings": meta("context_length"),
        "rms_norm_eps": _shortest(meta("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(meta("rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(meta),
        "tie_word_embeddings": "output.weight" not in meta.tensors,
        "bos_token_id": meta("tokenizer.ggml.bos_token_id", None),
        "eos_token_id": meta("tokenizer.ggml.eos_token_id", None),
        "pad_token_id": meta("tokenizer.ggml.padding_token_id", None),
        "torch_dtype": "float32",
    }
    rotated = meta("rope.dimension_count", config["head_dim"])
    if rotated != config["head_dim"]:
        config["partial_rotary_factor"] = rotated / config["head_dim"]
    return config | architecture.config(meta)


def architecture_of(meta: Metadata) -> Architecture:
    if meta.architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{meta.where}: GGUF architecture {meta.architecture!r} is not supported; supported are "
            f"{', '.join(ARCHITECTURES)}; or use the model's safetensors"
        )
    return ARCHITECTURES[meta.architecture]


def _shortest(value: float) -> float:
    """The shortest decimal that is this fp32 number: 1e-05, where the file has 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(meta: Metadata) -> dict[str, Any] | None:
    kind = meta("rope.scaling.type", "none")
    if "rope_freqs.weight" in meta.ropes:
        return _llama3_scaling(meta)
    if "rope_factors_long.weight" in meta.ropes:
        return {
            "rope_type": "longrope",
            "long_factor": [_shortest(value) for value in meta.ropes["rope_factors_long.weight"]],
            "short_factor": [_shortest(value) for value in meta.ropes["rope_factors_short.weight"]],
        }
    if kind == "none":
        return None
    factor = _shortest(meta("rope.scaling.factor"))
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        length = meta("rope.scaling.original_context_length")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
    raise CheckpointError(
        f"{meta.where}: rotary scaling {kind!r} is not supported; use the model's safetensors"
    )


def _llama3_scaling(meta: Metadata) -> dict[str, Any]:
    """Llama 3.1's scaling, of which the file has the outcome: what each frequency is divided by."""
    found = meta.ropes["rope_freqs.weight"].astype(np.float64)
    factor = float(found.max())
    theta, dim = meta("rope.freq_base", 10000.0), 2 * len(found)
    wavelengths = 2 * math.pi * theta ** (np.arange(0, dim, 2) / dim)
    smooth = (_LLAMA3_LENGTH / wavelengths - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)
    expected = 1 / (np.clip(smooth, 0, 1) + (1 - np.clip(smooth, 0, 1)) / factor)
    if not np.allclose(found, expected, rtol=1e-3):
        raise CheckpointError(
            f"{meta.where}: its rotary factors are not those of Llama 3.1's scaling; use the model's safetensors"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_LENGTH,
    }


def _llama(meta: Metadata) -> dict[str, Any]:
    return {"hidden_act": "silu", "attention_bias": "blk.0.attn_q.bias" in meta.tensors, "mlp_bias": False}


def _gemma(meta: Metadata) -> dict[str, Any]:
    heads, hidden, head_dim = (
        meta("attention.head_count"),
        meta("embedding_length"),
        meta("attention.key_length"),
    )
    # The file does not hold the scale of the scores. It is head_dim, but for the two 27B models.
    is_27b = meta("block_count") == (46 if meta.architecture == "gemma2" else 62)
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": hidden // heads if is_27b else head_dim,
        "sliding_window": meta("attention.sliding_window"),
    }


def _gemma2(meta: Metadata) -> dict[str, Any]:
    return _gemma(meta) | {
        "attn_logit_softcapping": _shortest(meta("attn_logit_softcapping")),
        "final_logit_softcapping": _shortest(meta("final_logit_softcapping")),
    }


def _gemma3(meta: Metadata) -> dict[str, Any]:
    return _gemma(meta) | {"rope_local_base_freq": 10000.0, "sliding_window_pattern": 6}


def _phi3(meta: Metadata) -> dict[str, Any]:
    length = meta("context_length")
    return {
        "hidden_act": "silu",
        "sliding_window": meta("attention.sliding_window", None) or None,
        "original_max_position_embeddings": meta("rope.scaling.original_context_length", length),
    }


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", "LlamaForCausalLM", permuted=True, config=_llama),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
    "gemma2": Architecture(
        "gemma2", "Gemma2ForCausalLM", norm_offset=True, layer=_FOUR_NORMS, config=_gemma2
    ),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", norm_offset=True, layer=_FOUR_NORMS, config=_gemma3
    ),
    "phi3": Architecture(
        "phi3",
        "Phi3ForCausalLM",
        layer={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        config=_phi3,
    ),
}
