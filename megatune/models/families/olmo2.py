"""OLMo 2 (arXiv:2501.00656): norms on the output of each block, and over all heads of q and of k at once."""

from __future__ import annotations

from typing import Any, ClassVar

from megatune.models.families.base import Config
from megatune.models.families.llama import Llama
from megatune.models.spec import DecoderSpec


class Olmo2(Llama):
    name = "olmo2"
    model_types = ("olmo2",)
    architectures = ("Olmo2ForCausalLM",)
    defaults: ClassVar[dict[str, Any]] = Llama.defaults | {"rms_norm_eps": 1e-5}

    def extras(self, hf: Config) -> dict[str, Any]:
        bias = bool(hf.get("attention_bias"))
        return {"qkv_bias": bias, "attention_out_bias": bias, "norm_placement": "post", "qk_norm": "full"}

    def hf_extras(self, spec: DecoderSpec) -> dict[str, Any]:
        return {"attention_bias": spec.qkv_bias}
