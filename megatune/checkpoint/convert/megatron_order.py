"""The order in which Megatron-Core's modules register their parameters: that of an optimizer's numbered states, and
(reversed) of the buckets of a distributed one.

Attention makes its output projection before those of its inputs; a layer of Transformer Engine registers the norm that
it begins with first. Sources: the constructors in megatron/core/transformer/{transformer_layer,attention,
multi_latent_attention,mlp,moe/moe_layer,moe/experts}.py and megatron/core/models/gpt/gpt_model.py (0.16.1).
"""

from __future__ import annotations

from collections.abc import Iterable

from megatune.checkpoint.convert.megatron_names import EMBEDDING, HEAD, Backend, MegatronTensor

_EXPERTS = "mlp.experts"
_MODULES = (
    "input_layernorm",
    "self_attention.linear_proj",
    "self_attention.linear_proj.post_layernorm",
    "self_attention.linear_q_proj",
    "self_attention.linear_q_down_proj",
    "self_attention.linear_q_up_proj",
    "self_attention.linear_kv_down_proj",
    "self_attention.linear_kv_up_proj",
    "self_attention.linear_qkv",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "self_attention.kv_layernorm",
    "pre_mlp_layernorm",
    "mlp.router",
    _EXPERTS,
    "mlp.linear_fc1",
    "mlp.linear_fc2",
    "mlp.linear_fc2.post_layernorm",
    "mlp.shared_experts.linear_fc1",
    "mlp.shared_experts.linear_fc2",
)
_PARAMETERS = ("layer_norm_weight", "weight", "bias", "expert_bias")
_OUTSIDE = (EMBEDDING, None, "decoder.final_layernorm.weight", HEAD)  # None: all layers


def in_order(
    tensors: Iterable[MegatronTensor], backend: Backend, *, grouped: bool | None = None
) -> list[MegatronTensor]:
    """Parameters of a model, or of a part of one, in the order of its modules. `grouped`: all first matrices of a
    layer's experts stand before the second ones (default: with Transformer Engine), else expert after expert."""
    grouped = backend == "te" if grouped is None else grouped

    def place(one: MegatronTensor) -> tuple[int, ...]:
        if one.layer is None:
            return (_OUTSIDE.index(one.within),)
        module, _, parameter = one.key(None, None, backend).rpartition(".")
        at = (_OUTSIDE.index(None), one.layer)
        if one.expert is not None:
            matrix = int("linear_fc2" in module)
            inner = (matrix, one.expert) if grouped else (one.expert, matrix)
            return (*at, _MODULES.index(_EXPERTS), *inner)
        return (*at, _MODULES.index(module), _PARAMETERS.index(parameter))

    return sorted(tensors, key=place)
