"""Mixtral 8x7B and 8x22B (arXiv:2401.04088): Mistral whose every feed-forward block is a mixture of experts.

Here, as in all mixtures, the router computes in fp32; transformers' logits have the model's dtype but in DeepSeek-V3.
"""

from __future__ import annotations

from typing import Any, ClassVar

from megatune.models.families.base import Config, Family
from megatune.models.spec import DecoderSpec, LayerSpec, MoESpec, RopeSpec


class Mixtral(Family):
    name = "mixtral"
    model_types = ("mixtral",)
    architectures = ("MixtralForCausalLM",)
    experts_name = "block_sparse_moe"
    expert_names = ("w1", "w3", "w2")
    defaults: ClassVar[dict[str, Any]] = {
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }

    def layers(self, hf: Config) -> tuple[LayerSpec, ...]:
        return (LayerSpec(window=hf.get("sliding_window"), moe=True),) * self.integer(hf, "num_hidden_layers")

    def ropes(self, hf: Config, head_dim: int) -> tuple[RopeSpec, ...]:
        parameters = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
        return (self.rope(hf, parameters, head_dim, theta=1000000.0),)

    def extras(self, hf: Config) -> dict[str, Any]:
        self.refuse(hf, "router_jitter_noise", "the router's input has no noise here")
        moe = MoESpec(
            num_experts=self.integer(hf, "num_local_experts"),
            top_k=self.integer(hf, "num_experts_per_tok"),
            expert_size=self.integer(hf, "intermediate_size"),
        )
        return {"moe": moe}

    def hf_extras(self, spec: DecoderSpec) -> dict[str, Any]:
        return {
            "sliding_window": spec.layers[0].window,
            "num_local_experts": spec.moe.num_experts,
            "num_experts_per_tok": spec.moe.top_k,
        }
