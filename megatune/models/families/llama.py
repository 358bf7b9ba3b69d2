"""Llama 2, 3, 3.1, 3.2, 3.3 (arXiv:2307.09288, arXiv:2407.21783) and what shares their architecture: SmolLM2, ..."""

from __future__ import annotations

from typing import Any, ClassVar

from megatune.models.families.base import Config, Family
from megatune.models.spec import DecoderSpec, LayerSpec


class Llama(Family):
    name = "llama"
    model_types = ("llama",)
    architectures = ("LlamaForCausalLM",)
    defaults: ClassVar[dict[str, Any]] = {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
    }

    def layers(self, hf: Config) -> tuple[LayerSpec, ...]:
        return (LayerSpec(),) * self.integer(hf, "num_hidden_layers")

    def extras(self, hf: Config) -> dict[str, Any]:
        bias = bool(hf.get("attention_bias"))
        return {"qkv_bias": bias, "attention_out_bias": bias, "mlp_bias": bool(hf.get("mlp_bias"))}

    def hf_extras(self, spec: DecoderSpec) -> dict[str, Any]:
        return {"attention_bias": spec.qkv_bias, "mlp_bias": spec.mlp_bias}
