"""GPT-2: learned positions, layer norms, biases everywhere, a plain MLP, and weights stored [in, out]."""

from __future__ import annotations

from typing import Any, ClassVar

from megatune.models.families.base import Config, Family, Piece
from megatune.models.spec import DecoderSpec, LayerSpec

_HF_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new"}


class GPT2(Family):
    name = "gpt2"
    model_types = ("gpt2",)
    architectures = ("GPT2LMHeadModel",)
    prefix = "transformer."
    layers_name = "h"
    activation_key = "activation_function"
    defaults: ClassVar[dict[str, Any]] = {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
    }

    def spec(self, hf: Config) -> DecoderSpec:
        hf = {**self.defaults, **hf}
        self.refuse(hf, "scale_attn_by_inverse_layer_idx", "all layers scale alike")
        self.refuse(hf, "add_cross_attention", "only decoders are")
        hidden_size, num_heads = self.integer(hf, "n_embd"), self.integer(hf, "n_head")
        head_dim = hidden_size // num_heads
        return DecoderSpec(
            family=self.name,
            vocab_size=self.integer(hf, "vocab_size"),
            hidden_size=hidden_size,
            mlp_size=hf.get("n_inner") or 4 * hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            layers=(LayerSpec(rope=None),) * self.integer(hf, "n_layer"),
            ropes=(),
            max_positions=self.integer(hf, "n_positions"),
            activation=self.activation(hf),
            gated_mlp=False,
            norm="layer",
            norm_eps=float(hf["layer_norm_epsilon"]),
            qkv_bias=True,
            attention_out_bias=True,
            mlp_bias=True,
            attention_scale=head_dim**-0.5 if hf["scale_attn_weights"] else 1.0,
            tied_embeddings=bool(hf["tie_word_embeddings"]),
            positions="learned",
        )

    def hf_fields(self, spec: DecoderSpec) -> dict[str, Any]:
        return {
            "architectures": [self.architectures[0]],
            "model_type": self.model_types[0],
            "vocab_size": spec.vocab_size,
            "n_embd": spec.hidden_size,
            "n_inner": spec.mlp_size,
            "n_layer": spec.num_layers,
            "n_head": spec.num_heads,
            "n_positions": spec.max_positions,
            "activation_function": _HF_ACTIVATIONS[spec.activation],
            "layer_norm_epsilon": spec.norm_eps,
            "scale_attn_weights": spec.attention_scale != 1.0,
            "tie_word_embeddings": spec.tied_embeddings,
        }

    def names(self, spec: DecoderSpec) -> dict[str, list[Piece]]:
        names = super().names(spec)
        at = self.prefix
        return names | {
            "embed.weight": [Piece(f"{at}wte.weight")],
            "positions.weight": [Piece(f"{at}wpe.weight")],
            "norm.weight": [Piece(f"{at}ln_f.weight")],
            "norm.bias": [Piece(f"{at}ln_f.bias")],
        }

    def layer_map(self, spec: DecoderSpec, at: str, moe: bool) -> dict[str, list[Piece]]:
        names = {}
        for kind in ("weight", "bias"):
            transpose, qkv = kind == "weight", f"{at}attn.c_attn.{kind}"
            rows = enumerate("qkv")
            names |= {
                f"attn_norm.{kind}": [Piece(f"{at}ln_1.{kind}")],
                f"attn.qkv.{kind}": [Piece(qkv, part, i * spec.hidden_size, transpose) for i, part in rows],
                f"attn.out.{kind}": [Piece(f"{at}attn.c_proj.{kind}", transpose=transpose)],
                f"mlp_norm.{kind}": [Piece(f"{at}ln_2.{kind}")],
                f"mlp.up.{kind}": [Piece(f"{at}mlp.c_fc.{kind}", transpose=transpose)],
                f"mlp.down.{kind}": [Piece(f"{at}mlp.c_proj.{kind}", transpose=transpose)],
            }
        return names
