"""Gemma 2 (arXiv:2408.00118): norms with 1 + w before and after each block, soft caps on scores and logits, sliding
windows in every other layer, embeddings scaled by sqrt(hidden size)."""

from __future__ import annotations

from typing import Any, ClassVar

from megatune.models.families.base import Config, Family, layer_types
from megatune.models.spec import DecoderSpec, LayerSpec


class Gemma2(Family):
    name = "gemma2"
    model_types: ClassVar[tuple[str, ...]] = ("gemma2",)
    architectures: ClassVar[tuple[str, ...]] = ("Gemma2ForCausalLM",)
    activation_key = "hidden_activation"
    defaults: ClassVar[dict[str, Any]] = {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    }

    def layers(self, hf: Config) -> tuple[LayerSpec, ...]:
        count = self.integer(hf, "num_hidden_layers")
        alternating = ["full_attention" if index % 2 else "sliding_attention" for index in range(count)]
        return self.layers_by_type(hf, hf.get("layer_types") or alternating)

    def extras(self, hf: Config) -> dict[str, Any]:
        self.refuse(hf, "use_bidirectional_attention", "only causal language models are")
        bias = bool(hf.get("attention_bias"))
        return {
            "qkv_bias": bias,
            "attention_out_bias": bias,
            "norm_offset": 1.0,
            "norm_placement": "both",
            "attention_scale": hf["query_pre_attn_scalar"] ** -0.5,
            "attention_softcap": hf["attn_logit_softcapping"],
            "logit_softcap": hf["final_logit_softcapping"],
            "embedding_scale": hf["hidden_size"] ** 0.5,
        }

    def hf_extras(self, spec: DecoderSpec) -> dict[str, Any]:
        scalar = spec.attention_scale**-2
        windows = [layer.window for layer in spec.layers if layer.window is not None]
        return {
            "attention_bias": spec.qkv_bias,
            "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
            "attn_logit_softcapping": spec.attention_softcap,
            "final_logit_softcapping": spec.logit_softcap,
            "sliding_window": windows[0] if windows else None,
            "layer_types": layer_types(spec),
        }
