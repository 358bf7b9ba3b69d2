"""Small models for Megatron's formats: random tensors under Hugging Face names, without transformers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatune.checkpoint.convert.base import Opened
from megatune.checkpoint.convert.megatron_names import MegatronTable
from megatune.checkpoint.sources import TensorSource
from megatune.models.registry import family_for

_SIZES = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
}
_TIED = {"tie_word_embeddings": True}
_GEMMA = {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 7,
    "hidden_activation": "gelu_pytorch_tanh",
}
_MLA = {
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}
_QWEN3_MOE = {
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}

# name -> (model_type, architecture, further keys of config.json)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "LlamaForCausalLM", {}),
    "llama-tied": ("llama", "LlamaForCausalLM", _TIED),
    "llama-biases": ("llama", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "head_dim": 6}),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", _TIED),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", {"head_dim": 8}),
    "mixtral": ("mixtral", "MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeForCausalLM", _QWEN3_MOE),
    "deepseek": ("deepseek_v3", "DeepseekV3ForCausalLM", _MLA | {"q_lora_rank": 16}),
    "deepseek-direct": ("deepseek_v3", "DeepseekV3ForCausalLM", _MLA | {"q_lora_rank": None}),
    "gemma2": ("gemma2", "Gemma2ForCausalLM", _GEMMA | _TIED),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM", _GEMMA | _TIED),
}


class Tensors:
    """A `TensorSource` in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def __str__(self) -> str:
        return "memory"

    def names(self) -> set[str]:
        return set(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensors[name][start:stop]


@cache
def model(name: str) -> Opened:
    """A case as a Hugging Face folder would be opened: bf16, routers' corrections in fp32. Not to be changed."""
    model_type, architecture, keys = FAMILIES[name]
    config = _SIZES | {"model_type": model_type, "architectures": [architecture]} | keys
    table = MegatronTable(family_for(config).spec(config))
    generator = torch.Generator().manual_seed(sum(name.encode()))
    tensors = {}
    for hf_name in sorted(table.hf_names):
        dtype = torch.float32 if hf_name.endswith("e_score_correction_bias") else torch.bfloat16
        tensors[hf_name] = torch.randn(table.hf_shape(hf_name), generator=generator).to(dtype)
    return Opened("hf", Path("memory"), config, Tensors(tensors))


def same_tensors(found: TensorSource, wanted: TensorSource) -> list[str]:
    """Names of tensors that are not in both, or not bit-equal."""
    wrong = sorted(found.names() ^ wanted.names())
    for name in sorted(found.names() & wanted.names()):
        rows = wanted.shape(name)[0]
        same = found.shape(name) == wanted.shape(name) and found.dtype(name) == wanted.dtype(name)
        if not same or not torch.equal(found.rows(name, 0, rows), wanted.rows(name, 0, rows)):
            wrong.append(name)
    return wrong
