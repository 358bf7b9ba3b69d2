"""Phi-3, Phi-3.5 and Phi-4 (arXiv:2404.14219): Llama whose files hold q, k, v and gate, up in one tensor each, with
long-context rotary factors, partly rotated heads and sliding windows where the config has them."""

from __future__ import annotations

from typing import Any, ClassVar

from megatune.models.families.base import Config, Family, Piece
from megatune.models.spec import DecoderSpec, RopeSpec


class Phi3(Family):
    name = "phi3"
    model_types = ("phi3",)
    architectures = ("Phi3ForCausalLM",)
    defaults: ClassVar[dict[str, Any]] = {
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }

    def ropes(self, hf: Config, head_dim: int) -> tuple[RopeSpec, ...]:
        parameters = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
        partial = parameters.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        # Older files call it so; transformers does the same.
        parameters["rope_type"] = "longrope" if kind in ("su", "yarn") else kind
        return (self.rope(hf, parameters, int(head_dim * partial)),)

    def hf_extras(self, spec: DecoderSpec) -> dict[str, Any]:
        rope = spec.ropes[0]
        original = rope.original_max_positions if rope.scaling == "longrope" else spec.max_positions
        return {
            "original_max_position_embeddings": original,
            "partial_rotary_factor": rope.dim / spec.head_dim,
            "sliding_window": spec.layers[0].window,
        }

    def attention_map(self, spec: DecoderSpec, at: str) -> dict[str, list[Piece]]:
        qkv, first_k = f"{at}qkv_proj.weight", spec.num_heads * spec.head_dim
        first_v = first_k + spec.num_kv_heads * spec.head_dim
        pieces = [Piece(qkv, "q"), Piece(qkv, "k", first_k), Piece(qkv, "v", first_v)]
        return super().attention_map(spec, at) | {"attn.qkv.weight": pieces}

    def mlp_map(self, spec: DecoderSpec, at: str) -> dict[str, list[Piece]]:
        gate_up = f"{at}mlp.gate_up_proj.weight"
        pieces = [Piece(gate_up, "gate"), Piece(gate_up, "up", spec.mlp_size)]
        return super().mlp_map(spec, at) | {"mlp.gate_up.weight": pieces}
