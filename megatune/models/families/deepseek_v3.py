"""DeepSeek-V3 and R1 (arXiv:2412.19437): latent attention; a sigmoid router that picks among the best groups of
experts, with a correction that balances their load; experts that every token passes; first layers without experts.

The layers for multi-token prediction that its files hold after the last one are left out."""

from __future__ import annotations

from typing import Any, ClassVar

from megatune.errors import ConfigError
from megatune.models.families.base import Config, Family, Piece
from megatune.models.families.rope_config import yarn_magnitude
from megatune.models.spec import DecoderSpec, LayerSpec, MLASpec, MoESpec

_MTP = "num_nextn_predict_layers"
# Choices of DeepSeek's own code that transformers does not look at: these are the ones that it computes.
_FIXED = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}


class DeepseekV3(Family):
    name = "deepseek_v3"
    model_types = ("deepseek_v3",)
    architectures = ("DeepseekV3ForCausalLM",)
    dequantised = ("fp8",)
    defaults: ClassVar[dict[str, Any]] = {
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "intermediate_size": 18432,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_interleave": True,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
    }

    def spec(self, hf: Config) -> DecoderSpec:
        # Keys and values are of all heads, whatever the config says of them.
        return super().spec({**hf, "num_key_value_heads": None})

    def layers(self, hf: Config) -> tuple[LayerSpec, ...]:
        dense = hf["first_k_dense_replace"] or 0
        return tuple(LayerSpec(moe=index >= dense) for index in range(self.integer(hf, "num_hidden_layers")))

    def extras(self, hf: Config) -> dict[str, Any]:
        self.only(hf, _FIXED)
        mla = MLASpec(
            q_rank=None if hf["q_lora_rank"] is None else self.integer(hf, "q_lora_rank"),
            kv_rank=self.integer(hf, "kv_lora_rank"),
            nope_dim=self.integer(hf, "qk_nope_head_dim"),
            rope_dim=self.integer(hf, "qk_rope_head_dim"),
            value_dim=self.integer(hf, "v_head_dim"),
            interleaved=bool(hf["rope_interleave"]),
        )
        (rope,) = self.ropes(hf, mla.rope_dim)
        scale = mla.query_dim**-0.5
        if rope.mscale_all_dim:
            scale *= yarn_magnitude(rope.factor, rope.mscale_all_dim) ** 2
        bias = bool(hf.get("attention_bias"))
        return {
            "head_dim": mla.query_dim,
            "ropes": (rope,),
            "attention_scale": scale,
            "qkv_bias": bias,
            "attention_out_bias": bias,
            "mla": mla,
            "moe": self._moe(hf),
        }

    def _moe(self, hf: Config) -> MoESpec:
        inner = self.integer(hf, "moe_intermediate_size")
        experts, groups = self.integer(hf, "n_routed_experts"), hf["n_group"] or 1
        if experts % groups or experts // groups < 2:
            raise ConfigError(
                f"config.json: n_group ({groups}) must divide n_routed_experts ({experts}) into groups of at least "
                "two; correct one of them"
            )
        return MoESpec(
            num_experts=experts,
            top_k=self.integer(hf, "num_experts_per_tok"),
            expert_size=inner,
            shared_size=inner * (hf["n_shared_experts"] or 0),
            score="sigmoid",
            normalise=bool(hf["norm_topk_prob"]),
            scale=float(hf["routed_scaling_factor"]),
            groups=groups,
            groups_per_token=hf["topk_group"] or 1,
            correction=True,
        )

    def hf_config(self, spec: DecoderSpec, base: Config | None = None) -> dict[str, Any]:
        return super().hf_config(spec, base) | {_MTP: 0}

    def hf_extras(self, spec: DecoderSpec) -> dict[str, Any]:
        mla, moe = spec.mla, spec.moe
        return {
            "attention_bias": spec.qkv_bias,
            "head_dim": mla.rope_dim,
            "q_lora_rank": mla.q_rank,
            "kv_lora_rank": mla.kv_rank,
            "qk_nope_head_dim": mla.nope_dim,
            "qk_rope_head_dim": mla.rope_dim,
            "v_head_dim": mla.value_dim,
            "rope_interleave": mla.interleaved,
            "moe_intermediate_size": moe.expert_size,
            "n_routed_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "n_shared_experts": moe.shared_size // moe.expert_size,
            "n_group": moe.groups,
            "topk_group": moe.groups_per_token,
            "norm_topk_prob": moe.normalise,
            "routed_scaling_factor": moe.scale,
            "first_k_dense_replace": sum(not layer.moe for layer in spec.layers),
        }

    def attention_map(self, spec: DecoderSpec, at: str) -> dict[str, list[Piece]]:
        theirs = {"kv_a": "kv_a_proj_with_mqa", "kv_b": "kv_b_proj", "out": "o_proj"}
        theirs |= {"q": "q_proj"} if spec.mla.q_rank is None else {"q_a": "q_a_proj", "q_b": "q_b_proj"}
        norms = {f"{name}_norm": f"{name}_layernorm" for name in ("q_a", "kv_a") if name in theirs}
        names = {
            f"attn.{our}.weight": [Piece(f"{at}{name}.weight")] for our, name in (theirs | norms).items()
        }
        biased = {"q_a": spec.qkv_bias, "kv_a": spec.qkv_bias, "out": spec.attention_out_bias}
        kept = (our for our in theirs if biased.get(our))
        return names | {f"attn.{our}.bias": [Piece(f"{at}{theirs[our]}.bias")] for our in kept}

    def experts_map(self, spec: DecoderSpec, at: str) -> dict[str, list[Piece]]:
        names = super().experts_map(spec, at)
        names["mlp.router.correction"] = [Piece(f"{at}gate.e_score_correction_bias")]
        if spec.moe.shared_size:
            shared = f"{at}shared_experts."
            parts = [Piece(f"{shared}{part}_proj.weight", part) for part in ("gate", "up")]
            names["mlp.shared.gate_up.weight"] = parts
            names["mlp.shared.down.weight"] = [Piece(f"{shared}down_proj.weight")]
        return names

    def is_unused(self, spec: DecoderSpec, hf_name: str) -> bool:
        before, _, rest = hf_name.partition("layers.")
        index = rest.partition(".")[0]
        return before in ("", self.prefix) and index.isdecimal() and int(index) >= spec.num_layers
