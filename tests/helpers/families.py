"""A small random model of every family, by transformers and by us."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatune.models import Decoder, DecoderSpec, Family, build, family_for, from_hf_state
from megatune.ops import Segments, Targets

SIZES = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
# Borders of the ramp that rounding to whole dimensions would move.
GPT_OSS_YARN = YARN | {"original_max_position_embeddings": 40, "truncate": False}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [1.0, 2.5, 4.0],
}
# Rotated dimensions of DeepSeek's heads: 6, so that the ramp of YaRN is inside of them.
_DEEPSEEK = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 12,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_mtp_layers": 0,
}
_QWEN3_MOE = {
    "head_dim": 16,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 7}

# name -> (transformers' config class, its arguments beyond SIZES)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "llama3.1": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "mistral": ("MistralConfig", {"sliding_window": 7}),
    "mistral-all": ("MistralConfig", {"sliding_window": None, "rope_parameters": YARN}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", _GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": (
        "Gemma3TextConfig",
        _GEMMA
        | {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0},
            },
        },
    ),
    "phi3": (
        "Phi3Config",
        {"sliding_window": 7, "rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.5}},
    ),
    "phi3-long": (
        "Phi3Config",
        {
            "original_max_position_embeddings": 16,
            "rope_parameters": LONGROPE | {"partial_rotary_factor": 0.75},
        },
    ),
    "olmo2": ("Olmo2Config", {}),
    "gpt2": (
        "GPT2Config",
        {
            **dict.fromkeys(SIZES.keys() - {"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"}),
            "n_embd": 48,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
        },
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7}),
    "qwen3-moe": ("Qwen3MoeConfig", _QWEN3_MOE | {"norm_topk_prob": True, "mlp_only_layers": [1]}),
    "qwen3-moe-sparse": (
        "Qwen3MoeConfig",
        _QWEN3_MOE | {"norm_topk_prob": False, "decoder_sparse_step": 2, "attention_bias": True},
    ),
    "deepseek-v3": (
        "DeepseekV3Config",
        _DEEPSEEK
        | {
            "num_hidden_layers": 3,
            "q_lora_rank": 28,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "first_k_dense_replace": 1,
            "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0},
        },
    ),
    "deepseek-v3-direct": (
        "DeepseekV3Config",
        _DEEPSEEK
        | {
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 0,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "rope_interleave": False,
            "attention_bias": True,
            "rms_norm_eps": 1e-4,
        },
    ),
    "gpt-oss": (
        "GptOssConfig",
        {
            "head_dim": 16,
            "sliding_window": 7,
            "num_hidden_layers": 3,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": GPT_OSS_YARN,
        },
    ),
}
MOE_CASES = [name for name in CASES if name.startswith(("mixtral", "qwen3-moe", "deepseek", "gpt-oss"))]


@dataclass(frozen=True)
class Pair:
    """One model twice: `hf` by transformers (eager, fp32, evaluation mode), `ours` with the same weights."""

    hf: Any
    ours: Decoder
    spec: DecoderSpec
    family: Family

    def hf_state(self) -> dict[str, Tensor]:
        """Tensors as in a safetensors file: a tied head is not there, and experts are as that family's files have
        them."""
        state = as_in_files(self.hf, self.hf.state_dict())
        if self.spec.tied_embeddings:
            del state["lm_head.weight"]
        return state


def as_in_files(hf: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of transformers' model in memory, where experts stand in one tensor -> by those of the files
    that it saves."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(hf, dict(tensors))


def hf_config(name: str) -> Any:
    """transformers' config of a case."""
    import transformers

    class_name, extra = CASES[name]
    # None takes a key of SIZES away.
    left = (item for item in (SIZES | extra).items() if item[1] is not None or item[0] not in SIZES)
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    return getattr(transformers, class_name)(**dict(left), **special)


def hf_model(name: str, seed: int = 0) -> Any:
    """transformers' model of a case; every weight random, norms and biases too."""
    model = hf_from_config(hf_config(name))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                base = parameter if "norm" in key or ".ln_" in key else 0.0
                parameter.copy_(base + 0.2 * noise)
            elif key.endswith("gate_up_proj_bias"):
                parameter.copy_(5.0 * noise)  # GPT-OSS: beyond the gate's limits
            else:
                parameter.copy_(0.15 * noise)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model


def hf_from_config(config: Any) -> Any:
    """transformers' model of a config with its plainest code, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_config(config, **options).eval()


@cache
def pair(name: str) -> Pair:
    """The case `name`; one for all tests: they must not change its weights."""
    hf = hf_model(name)
    config = hf.config.to_dict()
    family = family_for(config)
    spec = family.spec(config)
    ours = build(spec).to_empty(device="cpu")
    ours.load_state_dict(from_hf_state(spec, family, as_in_files(hf, hf.state_dict())))
    return Pair(hf, ours, spec, family)


def documents(lengths: tuple[int, ...], vocab_size: int, seed: int = 1) -> tuple[Tensor, Segments, Targets]:
    """A packed stream of random tokens; every token is a target but the first of each document."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab_size, (sum(lengths),), generator=generator)
    segments = Segments.from_lengths(lengths)
    index = (segments.positions[1:] > 0).nonzero().flatten()
    return tokens, segments, Targets(index, tokens[index + 1])
