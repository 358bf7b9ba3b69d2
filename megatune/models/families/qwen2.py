"""Qwen2 and Qwen2.5 (arXiv:2407.10671): Llama with biases on q, k and v, and sliding windows in some layers."""

from __future__ import annotations

from typing import Any, ClassVar

from megatune.models.families.base import Config, Family, layer_types
from megatune.models.spec import DecoderSpec, LayerSpec


class Qwen2(Family):
    name = "qwen2"
    model_types: ClassVar[tuple[str, ...]] = ("qwen2",)
    architectures: ClassVar[tuple[str, ...]] = ("Qwen2ForCausalLM",)
    defaults: ClassVar[dict[str, Any]] = {
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    }

    def layers(self, hf: Config) -> tuple[LayerSpec, ...]:
        count = self.integer(hf, "num_hidden_layers")
        if not hf["use_sliding_window"] or hf["sliding_window"] is None:
            return (LayerSpec(),) * count
        first = hf["max_window_layers"]
        by_index = ["sliding_attention" if index >= first else "full_attention" for index in range(count)]
        return self.layers_by_type(hf, hf.get("layer_types") or by_index)

    def extras(self, hf: Config) -> dict[str, Any]:
        return {"qkv_bias": True}

    def hf_extras(self, spec: DecoderSpec) -> dict[str, Any]:
        windows = [layer.window for layer in spec.layers]
        sliding = [index for index, window in enumerate(windows) if window is not None]
        return {
            "use_sliding_window": bool(sliding),
            "sliding_window": windows[sliding[0]] if sliding else None,
            "max_window_layers": sliding[0] if sliding else spec.num_layers,
            "layer_types": layer_types(spec),
        }
