"""Qwen3-MoE (arXiv:2505.09388): Qwen3 with mixtures of many small experts in all or some of its layers."""

from __future__ import annotations

from typing import Any, ClassVar

from megatune.models.families.base import Config, Family
from megatune.models.spec import DecoderSpec, LayerSpec, MoESpec


class Qwen3Moe(Family):
    name = "qwen3_moe"
    model_types = ("qwen3_moe",)
    architectures = ("Qwen3MoeForCausalLM",)
    defaults: ClassVar[dict[str, Any]] = {
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    }

    def layers(self, hf: Config) -> tuple[LayerSpec, ...]:
        window = hf["sliding_window"] if hf["use_sliding_window"] else None
        dense, step = hf["mlp_only_layers"] or (), self.integer(hf, "decoder_sparse_step")
        return tuple(
            LayerSpec(window=window, moe=index not in dense and (index + 1) % step == 0)
            for index in range(self.integer(hf, "num_hidden_layers"))
        )

    def extras(self, hf: Config) -> dict[str, Any]:
        # transformers 5 writes num_local_experts, the published files have num_experts.
        count = hf.get("num_experts", hf.get("num_local_experts", 128))
        bias = bool(hf.get("attention_bias"))
        moe = MoESpec(
            num_experts=self.integer({"num_experts": count}, "num_experts"),
            top_k=self.integer(hf, "num_experts_per_tok"),
            expert_size=self.integer(hf, "moe_intermediate_size"),
            normalise=bool(hf["norm_topk_prob"]),
        )
        return {"qk_norm": "head", "qkv_bias": bias, "attention_out_bias": bias, "moe": moe}

    def hf_extras(self, spec: DecoderSpec) -> dict[str, Any]:
        window = spec.layers[0].window
        return {
            "attention_bias": spec.qkv_bias,
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [index for index, layer in enumerate(spec.layers) if not layer.moe],
            "moe_intermediate_size": spec.moe.expert_size,
            "num_experts_per_tok": spec.moe.top_k,
            "num_experts": spec.moe.num_experts,
            "norm_topk_prob": spec.moe.normalise,
        }
