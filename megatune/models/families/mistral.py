"""Mistral 7B and its kin (arXiv:2310.06825): Llama with a sliding window in every layer, where the config has one."""

from __future__ import annotations

from typing import Any, ClassVar

from megatune.models.families.base import Family
from megatune.models.spec import DecoderSpec


class Mistral(Family):
    name = "mistral"
    model_types = ("mistral",)
    architectures = ("MistralForCausalLM",)
    defaults: ClassVar[dict[str, Any]] = {
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    }

    def hf_extras(self, spec: DecoderSpec) -> dict[str, Any]:
        return {"sliding_window": spec.layers[0].window}
