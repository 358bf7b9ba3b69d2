"""Gemma 3, text only (arXiv:2503.19786): Gemma 2 with norms on q and k in place of the caps on scores, and another
rotary base in the layers with a sliding window."""

from __future__ import annotations

from typing import Any, ClassVar

from megatune.errors import ConfigError
from megatune.models.families.base import Config
from megatune.models.families.gemma2 import Gemma2
from megatune.models.families.rope_config import rope_to_hf
from megatune.models.spec import DecoderSpec, LayerSpec, RopeSpec

_LOCAL, _GLOBAL = 0, 1  # places in DecoderSpec.ropes


class Gemma3(Gemma2):
    name = "gemma3"
    model_types = ("gemma3_text",)
    architectures = ("Gemma3ForCausalLM",)
    defaults: ClassVar[dict[str, Any]] = Gemma2.defaults | {
        "max_position_embeddings": 131072,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "sliding_window_pattern": 6,
    }

    def layers(self, hf: Config) -> tuple[LayerSpec, ...]:
        count = self.integer(hf, "num_hidden_layers")
        every = hf.get("_sliding_window_pattern") or hf["sliding_window_pattern"]
        by_index = [
            "sliding_attention" if (index + 1) % every else "full_attention" for index in range(count)
        ]
        return self.layers_by_type(hf, hf.get("layer_types") or by_index, full_rope=_GLOBAL)

    def ropes(self, hf: Config, head_dim: int) -> tuple[RopeSpec, ...]:
        parameters = hf.get("rope_parameters") or {}
        wide = (parameters.get("full_attention") or {}) | (hf.get("rope_scaling") or {})
        local = parameters.get("sliding_attention") or {}
        if local.get("rope_type", "default") != "default":
            raise ConfigError(
                f"config.json: rotary scaling of type {local['rope_type']!r} in the sliding layers of a gemma3 model "
                "is not supported; remove it from rope_parameters.sliding_attention"
            )
        local_theta = local.get("rope_theta") or hf.get("rope_local_base_freq") or 10000.0
        return RopeSpec(float(local_theta), head_dim), self.rope(hf, wide, head_dim, theta=1000000.0)

    def extras(self, hf: Config) -> dict[str, Any]:
        # Every published config has null here, and transformers does not look at it.
        self.refuse(hf, "attn_logit_softcapping", "they have none")
        return super().extras(hf) | {"qk_norm": "head"}

    def hf_extras(self, spec: DecoderSpec) -> dict[str, Any]:
        return super().hf_extras(spec) | {
            "rope_theta": spec.ropes[_GLOBAL].theta,
            "rope_scaling": rope_to_hf(spec.ropes[_GLOBAL]),
            "rope_local_base_freq": spec.ropes[_LOCAL].theta,
        }
