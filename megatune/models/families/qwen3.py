"""Qwen3 (arXiv:2505.09388): Qwen2 with a norm on each head of q and k in place of the biases."""

from __future__ import annotations

from typing import Any, ClassVar

from megatune.models.families.base import Config
from megatune.models.families.qwen2 import Qwen2
from megatune.models.spec import DecoderSpec


class Qwen3(Qwen2):
    name = "qwen3"
    model_types = ("qwen3",)
    architectures = ("Qwen3ForCausalLM",)
    defaults: ClassVar[dict[str, Any]] = Qwen2.defaults | {"head_dim": 128}

    def extras(self, hf: Config) -> dict[str, Any]:
        bias = bool(hf.get("attention_bias"))
        return {"qk_norm": "head", "qkv_bias": bias, "attention_out_bias": bias}

    def hf_extras(self, spec: DecoderSpec) -> dict[str, Any]:
        return super().hf_extras(spec) | {"attention_bias": spec.qkv_bias}
