"""The config.json of a checkpoint of Megatron, from the arguments (a Namespace) that it carries.

They say less than a config.json: nothing of sliding windows, of Gemma's caps and scales. Where they cannot
say it, `like` (a Hugging Face config) is used, or what our own files carry beside the arguments.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatune.checkpoint.convert.base import Line, Options
from megatune.checkpoint.sources import read_json
from megatune.errors import CheckpointError, ConfigError

Args = Mapping[str, Any]

# An attribute of ours in the arguments of files that we write; Megatron does not look at it.
OUR_CONFIG = "megatune_hf_config"
# Llama 3.1's scaling as Megatron has it built in; its arguments give the factor only.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_DEFAULTLLAMA3_FACTOR = 8.0
_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def like_config(options: Options) -> dict[str, Any] | None:
    """The config.json of `options.like`, None where nothing was said. CheckpointError where there is none."""
    if options.like is None:
        return None
    path = Path(options.like)
    return read_json(path if path.is_file() else path / "config.json")


def hf_config(
    args: Args, like: Mapping[str, Any] | None, padded_vocab: int, where: str
) -> tuple[dict[str, Any], list[Line]]:
    """The config.json of a Megatron checkpoint, and what is to be said about it.

    `like`, or the config that a file of ours carries, is taken as it is; otherwise the config is made from `args`.
    `padded_vocab`: rows of the embedding, padding included. `where`: the checkpoint's place, for messages. ConfigError
    for arguments that no supported family has.
    """
    if like is not None:
        return dict(like), []
    carried = args.get(OUR_CONFIG)
    if isinstance(carried, str):
        try:
            found = json.loads(carried)
        except (ValueError, RecursionError):
            raise CheckpointError(
                f"{where}: args.{OUR_CONFIG} is no JSON; say which model it is with --like FOLDER"
            ) from None
        if isinstance(found, dict):
            return found, []
    config = _from_args(args, where)
    vocab, lines = _vocab(args, padded_vocab)
    return config | {"vocab_size": vocab}, lines


def _vocab(args: Args, padded: int) -> tuple[int, list[Line]]:
    vocab = args.get("vocab_size")
    if isinstance(vocab, int) and 0 < vocab <= padded:
        return vocab, []
    detail = (
        f"the checkpoint does not say its true vocabulary: all {padded} rows are kept; --like would say it"
    )
    return padded, [Line("vocab_size", "padded", detail)]


def _from_args(args: Args, where: str) -> dict[str, Any]:
    _refuse(args, where)
    heads = _size(args, "num_attention_heads", where)
    hidden = _size(args, "hidden_size", where)
    grouped = args.get("group_query_attention")
    config: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": _size(args, "num_layers", where),
        "num_attention_heads": heads,
        "num_key_value_heads": _size(args, "num_query_groups", where) if grouped else heads,
        "head_dim": args.get("kv_channels") or hidden // heads,
        "intermediate_size": _size(args, "ffn_hidden_size", where),
        "max_position_embeddings": args.get("max_position_embeddings") or _size(args, "seq_length", where),
        "hidden_act": "silu",
        "rms_norm_eps": float(args.get("norm_epsilon", args.get("layernorm_epsilon", 1e-5))),
        "rope_theta": float(args.get("rotary_base", 10000)),
        "rope_scaling": _scaling(args),
        "tie_word_embeddings": not args.get("untie_embeddings_and_output_weights"),
        "torch_dtype": _DTYPES.get(args.get("params_dtype"), "bfloat16"),
    }
    bias, qkv_bias = bool(args.get("add_bias_linear")), bool(args.get("add_qkv_bias"))
    if args.get("multi_latent_attention"):
        return config | _deepseek(args, where)
    if args.get("num_experts"):
        return config | (_qwen3_moe if args.get("qk_layernorm") else _mixtral)(args, where)
    if args.get("qk_layernorm"):
        family = {
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": qkv_bias or bias,
        }
    elif qkv_bias and not bias:
        family = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False}
    else:
        family = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        family |= {"attention_bias": bias, "mlp_bias": bias}
    return config | family


def _refuse(args: Args, where: str) -> None:
    """ConfigError for arguments that change the model in a way that no supported family has."""
    problems = {
        "normalization is not RMSNorm": args.get("normalization", "LayerNorm") != "RMSNorm",
        "swiglu is off": not args.get("swiglu"),
        "position_embedding_type is not rope": args.get("position_embedding_type", "rope") != "rope",
        "rotary_percent is not 1": float(args.get("rotary_percent", 1.0) or 1.0) != 1.0,
        "rotary_interleaved is set": bool(args.get("rotary_interleaved")),
        "apply_layernorm_1p is set": bool(args.get("apply_layernorm_1p")),
    }
    for problem, is_so in problems.items():
        if is_so:
            raise ConfigError(
                f"{where}: its arguments are those of no supported family ({problem}); if it is one, give its Hugging "
                "Face folder with --like"
            )


def _scaling(args: Args) -> dict[str, Any] | None:
    if args.get("use_rope_scaling"):
        factor = float(args.get("rope_scaling_factor") or _DEFAULTLLAMA3_FACTOR)
        return {"rope_type": "llama3", "factor": factor, **LLAMA3}
    factor = args.get("rotary_seq_len_interpolation_factor")
    return {"rope_type": "linear", "factor": float(factor)} if factor not in (None, 1) else None


def _mixtral(args: Args, where: str) -> dict[str, Any]:
    _only_moe_layers(args, where)
    return {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "intermediate_size": args.get("moe_ffn_hidden_size") or _size(args, "ffn_hidden_size", where),
        "num_local_experts": _size(args, "num_experts", where),
        "num_experts_per_tok": _size(args, "moe_router_topk", where),
        "sliding_window": None,
    }


def _qwen3_moe(args: Args, where: str) -> dict[str, Any]:
    sparse = moe_layers(args, where)
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "moe_intermediate_size": args.get("moe_ffn_hidden_size") or _size(args, "ffn_hidden_size", where),
        "num_experts": _size(args, "num_experts", where),
        "num_experts_per_tok": _size(args, "moe_router_topk", where),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [index for index, moe in enumerate(sparse) if not moe],
        "norm_topk_prob": not args.get("moe_router_pre_softmax"),
        "attention_bias": bool(args.get("add_qkv_bias") or args.get("add_bias_linear")),
        "use_sliding_window": False,
    }


def _deepseek(args: Args, where: str) -> dict[str, Any]:
    sparse = moe_layers(args, where)
    first = sparse.index(True) if True in sparse else len(sparse)
    if not all(sparse[first:]):
        raise ConfigError(
            f"{where}: layers without experts come after layers with some (moe_layer_freq), which DeepSeek-V3 has not; "
            "give the model's Hugging Face folder with --like"
        )
    inner = args.get("moe_ffn_hidden_size") or _size(args, "ffn_hidden_size", where)
    config = {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_key_value_heads": args["num_attention_heads"],
        "q_lora_rank": args.get("q_lora_rank"),
        "kv_lora_rank": _size(args, "kv_lora_rank", where),
        "qk_nope_head_dim": _size(args, "qk_head_dim", where),
        "qk_rope_head_dim": _size(args, "qk_pos_emb_head_dim", where),
        "v_head_dim": _size(args, "v_head_dim", where),
        "head_dim": args["qk_pos_emb_head_dim"],
        "moe_intermediate_size": inner,
        "n_routed_experts": _size(args, "num_experts", where),
        "num_experts_per_tok": _size(args, "moe_router_topk", where),
        "n_shared_experts": (args.get("moe_shared_expert_intermediate_size") or 0) // inner,
        "n_group": args.get("moe_router_num_groups") or 1,
        "topk_group": args.get("moe_router_group_topk") or 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": float(args.get("moe_router_topk_scaling_factor") or 1.0),
        "first_k_dense_replace": first,
        "num_nextn_predict_layers": 0,
        "rope_interleave": True,
        "attention_bias": False,
    }
    if args.get("moe_router_score_function", "softmax") != "sigmoid":
        raise ConfigError(
            f"{where}: latent attention with a softmax router is no DeepSeek-V3; megatune has no such family"
        )
    factor = float(args.get("rotary_scaling_factor") or 1.0)
    if args.get("rope_type", "yarn") == "yarn" and factor != 1.0:
        scaling = {"rope_type": "yarn", "factor": factor}
        keys = ("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
        config["rope_scaling"] = scaling | {key: args[key] for key in keys if args.get(key) is not None}
    return config


def moe_layers(args: Args, where: str) -> list[bool]:
    """Which layers have experts: Megatron's `moe_layer_freq`, a list of 0 and 1 or every how many."""
    count, every = _size(args, "num_layers", where), args.get("moe_layer_freq", 1)
    if not args.get("num_experts"):
        return [False] * count
    if isinstance(every, int) and every > 0:
        return [index % every == 0 for index in range(count)]
    if isinstance(every, (list, tuple)) and len(every) == count:
        return [bool(one) for one in every]
    raise ConfigError(
        f"{where}: args.moe_layer_freq ({every!r}) is no list of {count} zeros and ones; give --like"
    )


def _only_moe_layers(args: Args, where: str) -> None:
    if not all(moe_layers(args, where)) or args.get("moe_router_pre_softmax"):
        raise ConfigError(
            f"{where}: a mixture without norms on q and k, some of whose layers are dense or whose router takes the "
            "softmax first, is of no supported family; give the model's Hugging Face folder with --like"
        )


def _size(args: Args, key: str, where: str) -> int:
    value = args.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(
            f"{where}: args.{key} is {value!r}, not a size; give the model's Hugging Face folder with --like"
        )
    return value
