"""GPT-OSS 20B and 120B (arXiv:2508.10925): experts with biases and a clamped gate, a learned sink in each head's
softmax, a window in every other layer, YaRN. Its files hold the experts stacked and transposed, gate and up in turn."""

from __future__ import annotations

from typing import Any, ClassVar

from megatune.models.families.base import Config, Family, Piece, layer_types
from megatune.models.families.rope_config import rope_to_hf
from megatune.models.spec import DecoderSpec, LayerSpec, MoESpec, RopeSpec

_FIXED = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}


class GptOss(Family):
    name = "gpt_oss"
    model_types = ("gpt_oss",)
    architectures = ("GptOssForCausalLM",)
    dequantised = ("mxfp4",)
    defaults: ClassVar[dict[str, Any]] = {
        "num_key_value_heads": 8,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "sliding_window": 128,
        "attention_bias": True,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    }

    def layers(self, hf: Config) -> tuple[LayerSpec, ...]:
        count = self.integer(hf, "num_hidden_layers")
        by_turns = (["sliding_attention", "full_attention"] * count)[:count]
        layers = self.layers_by_type(hf, hf.get("layer_types") or by_turns)
        return tuple(LayerSpec(layer.window, moe=True) for layer in layers)

    def ropes(self, hf: Config, head_dim: int) -> tuple[RopeSpec, ...]:
        parameters = hf.get("rope_scaling") or hf.get("rope_parameters") or self.defaults["rope_parameters"]
        return (self.rope(hf, parameters, head_dim, theta=150000.0),)

    def extras(self, hf: Config) -> dict[str, Any]:
        self.only(hf, _FIXED)
        bias = bool(hf["attention_bias"])
        moe = MoESpec(
            num_experts=self.integer(hf, "num_local_experts"),
            top_k=self.integer(hf, "num_experts_per_tok"),
            expert_size=self.integer(hf, "intermediate_size"),
            score="topk_softmax",
            router_bias=True,
            expert_bias=True,
            clamped=True,
        )
        return {"qkv_bias": bias, "attention_out_bias": bias, "sinks": True, "moe": moe}

    def hf_extras(self, spec: DecoderSpec) -> dict[str, Any]:
        windows = [layer.window for layer in spec.layers if layer.window is not None]
        return {
            "attention_bias": spec.qkv_bias,
            "layer_types": layer_types(spec),
            "sliding_window": windows[0] if windows else None,
            "num_local_experts": spec.moe.num_experts,
            "num_experts_per_tok": spec.moe.top_k,
            # Without an entry transformers takes YaRN.
            "rope_scaling": rope_to_hf(spec.ropes[0]) or {"rope_type": "default"},
        }

    def attention_map(self, spec: DecoderSpec, at: str) -> dict[str, list[Piece]]:
        return super().attention_map(spec, at) | {"attn.sinks": [Piece(f"{at}sinks")]}

    def experts_map(self, spec: DecoderSpec, at: str) -> dict[str, list[Piece]]:
        names = {f"mlp.router.{kind}": [Piece(f"{at}router.{kind}")] for kind in ("weight", "bias")}
        for ours, theirs in (("gate_up", "gate_up_proj"), ("down", "down_proj")):
            names[f"mlp.experts.{ours}.weight"] = [Piece(f"{at}experts.{theirs}", transpose=True)]
            names[f"mlp.experts.{ours}.bias"] = [Piece(f"{at}experts.{theirs}_bias")]
        return names
