"""A model's config.json as Megatron's arguments: the Namespace that its checkpoints carry."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from megatune.checkpoint.convert.base import Line, Options
from megatune.checkpoint.convert.megatron_config import LLAMA3, OUR_CONFIG
from megatune.errors import ConfigError
from megatune.models.families.rope_config import yarn_magnitude
from megatune.models.registry import family_for
from megatune.models.spec import DecoderSpec, RopeSpec


def padded_vocab(vocab: int, options: Options) -> int:
    """Rows of the embedding in Megatron's files: a multiple of `vocab_multiple` times the tensor parallel size."""
    multiple = options.vocab_multiple * options.tensor
    return -(-vocab // multiple) * multiple


def megatron_args(
    config: Mapping[str, Any], dtype: torch.dtype, options: Options
) -> tuple[dict[str, Any], list[Line]]:
    """Megatron's arguments for a model of this config.json, stored as `dtype` under the layout of `options`; and what
    they cannot say. ConfigError for a model that Megatron cannot run."""
    spec = family_for(config).spec(config)
    args: dict[str, Any] = {
        "num_layers": spec.num_layers,
        "encoder_num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "ffn_hidden_size": spec.mlp_size,
        "num_attention_heads": spec.num_heads,
        "group_query_attention": spec.mla is None and spec.num_kv_heads != spec.num_heads,
        "num_query_groups": spec.num_kv_heads if spec.mla is None else spec.num_heads,
        "kv_channels": spec.head_dim,
        "seq_length": spec.max_positions,
        "max_position_embeddings": spec.max_positions,
        "position_embedding_type": "rope",
        "add_position_embedding": False,
        "use_rotary_position_embeddings": True,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "normalization": "RMSNorm",
        "norm_epsilon": spec.norm_eps,
        "apply_layernorm_1p": spec.norm_offset == 1.0,
        "swiglu": spec.activation == "silu",
        "squared_relu": False,
        "qk_layernorm": spec.qk_norm == "head" or spec.mla is not None,
        "untie_embeddings_and_output_weights": not spec.tied_embeddings,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "vocab_size": spec.vocab_size,
        "padded_vocab_size": padded_vocab(spec.vocab_size, options),
        "make_vocab_size_divisible_by": options.vocab_multiple,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "tokenizer_type": "HuggingFaceTokenizer",
        "multi_latent_attention": spec.mla is not None,
        "num_experts": None,
        OUR_CONFIG: json.dumps(dict(config)),
    }
    args |= _biases(spec) | _layout(options, spec)
    rope, notes = _rope_args(spec)
    args |= rope
    if spec.moe is not None:
        args |= _moe_args(spec)
    if spec.mla is not None:
        args |= _mla_args(spec)
    return args, [
        Line("args", "skipped", f"Megatron's arguments cannot say {note}") for note in notes + _unsaid(spec)
    ]


def _layout(options: Options, spec: DecoderSpec) -> dict[str, Any]:
    chunks = options.pipeline * options.virtual
    virtual = options.virtual > 1
    return {
        "tensor_model_parallel_size": options.tensor,
        "pipeline_model_parallel_size": options.pipeline,
        "virtual_pipeline_model_parallel_size": options.virtual if virtual else None,
        "num_layers_per_virtual_pipeline_stage": spec.num_layers // chunks if virtual else None,
        "expert_model_parallel_size": options.expert,
        "expert_tensor_parallel_size": options.tensor,
        "context_parallel_size": 1,
        "transformer_impl": "transformer_engine",
        "use_distributed_optimizer": False,
        "use_dist_ckpt": False,
        "ckpt_format": "torch",
        "no_save_optim": True,
        "no_save_rng": True,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "skipped_train_samples": 0,
        "iteration": 0,
    }


def _biases(spec: DecoderSpec) -> dict[str, Any]:
    kinds = (spec.qkv_bias, spec.attention_out_bias, spec.mlp_bias)
    if kinds not in ((False, False, False), (True, False, False), (True, True, True)):
        raise ConfigError(
            f"a {spec.family} model with biases on attention but not on all linear layers has no counterpart in "
            "Megatron (add_bias_linear, add_qkv_bias); convert to another format"
        )
    return {"add_bias_linear": kinds == (True, True, True), "add_qkv_bias": spec.qkv_bias}


def _rope_args(spec: DecoderSpec) -> tuple[dict[str, Any], list[str]]:
    rope = spec.ropes[-1]
    args: dict[str, Any] = {"rotary_base": int(rope.theta) if rope.theta.is_integer() else rope.theta}
    if spec.mla is None and rope.scaling == "linear" and len(spec.ropes) == 1:
        args["rotary_seq_len_interpolation_factor"] = rope.factor
    elif spec.mla is None and rope.scaling == "llama3":
        args |= {"use_rope_scaling": True, "rope_scaling_factor": rope.factor}
        if rope != RopeSpec(
            rope.theta, rope.dim, "llama3", rope.factor, 1.0, 4.0, LLAMA3["original_max_position_embeddings"]
        ):
            return args, ["the other numbers of this model's llama3 rotary scaling than its factor"]
    elif spec.mla is None and rope.scaling != "none":
        return args, [f"rotary scaling of type {rope.scaling}"]
    if len(spec.ropes) > 1:
        return args, ["another rotary base in some layers"]
    if rope.dim != (spec.head_dim if spec.mla is None else spec.mla.rope_dim):
        args["rotary_percent"] = rope.dim / spec.head_dim
    return args, []


def _moe_args(spec: DecoderSpec) -> dict[str, Any]:
    moe = spec.moe
    args = {
        "num_experts": moe.num_experts,
        "moe_router_topk": moe.top_k,
        "moe_ffn_hidden_size": moe.expert_size,
        "moe_layer_freq": 1 if all(one.moe for one in spec.layers) else [int(one.moe) for one in spec.layers],
        "moe_grouped_gemm": True,
        "moe_router_score_function": "sigmoid" if moe.score == "sigmoid" else "softmax",
        "moe_router_pre_softmax": moe.score == "softmax" and not moe.normalise,
        "moe_router_enable_expert_bias": moe.correction,
        "moe_shared_expert_intermediate_size": moe.shared_size or None,
        "moe_router_topk_scaling_factor": moe.scale if moe.scale != 1.0 else None,
        "moe_router_load_balancing_type": "seq_aux_loss" if moe.correction else "aux_loss",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall",
    }
    if moe.groups > 1:
        args |= {"moe_router_num_groups": moe.groups, "moe_router_group_topk": moe.groups_per_token}
    return args


def _mla_args(spec: DecoderSpec) -> dict[str, Any]:
    mla, rope = spec.mla, spec.ropes[0]
    args: dict[str, Any] = {
        "q_lora_rank": mla.q_rank,
        "kv_lora_rank": mla.kv_rank,
        "qk_head_dim": mla.nope_dim,
        "qk_pos_emb_head_dim": mla.rope_dim,
        "v_head_dim": mla.value_dim,
        "kv_channels": mla.value_dim,
        "rope_type": "rope" if rope.scaling == "none" else "yarn",
        "rotary_scaling_factor": rope.factor,
        "mscale_all_dim": rope.mscale_all_dim,
    }
    if rope.scaling == "yarn":
        args |= {
            "original_max_position_embeddings": rope.original_max_positions,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "mscale": _mscale(rope),
        }
    elif rope.scaling != "none":
        raise ConfigError(
            f"Megatron's latent attention has no rotary scaling of type {rope.scaling}; use another format"
        )
    return args


def _mscale(rope: RopeSpec) -> float:
    """Megatron multiplies cos and sin by magnitude(mscale) / magnitude(mscale_all_dim): the mscale for our factor."""
    over = rope.attention_factor * yarn_magnitude(rope.factor, rope.mscale_all_dim)
    one = yarn_magnitude(rope.factor) - 1.0
    return (over - 1.0) / one if one else 1.0


def _unsaid(spec: DecoderSpec) -> list[str]:
    """What of a model goes beyond Megatron-LM's arguments; its config (which the files carry) says it."""
    found = []
    if any(layer.window is not None for layer in spec.layers):
        found.append("that layers have sliding windows")
    if spec.activation != "silu":
        found.append(f"a gate of {spec.activation}")
    if spec.norm_placement == "both":
        found.append("norms after blocks")
    if spec.embedding_scale != 1.0:
        found.append(f"that embeddings are multiplied by {spec.embedding_scale:.6g}")
    if spec.attention_softcap or spec.logit_softcap:
        found.append("caps on scores and logits")
    if spec.moe is not None and spec.moe.groups > 1 and spec.moe.top_k // spec.moe.groups_per_token != 2:
        best = spec.moe.top_k // spec.moe.groups_per_token
        found.append(f"that groups of experts are rated by their two best (it takes the {best} best)")
    width = spec.head_dim**-0.5
    if spec.mla is None and abs(spec.attention_scale - width) > 1e-9:
        found.append(f"that scores are multiplied by {spec.attention_scale:.6g}")
    return found
