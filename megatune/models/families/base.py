"""What a model family says about itself: its config and its tensor names, to and from Hugging Face's.

`Family` holds what most decoders share (Llama's names and keys); a family's file overrides what differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, ClassVar

from megatune.errors import ConfigError
from megatune.models.families.rope_config import rope_from_hf, rope_to_hf
from megatune.models.spec import DecoderSpec, LayerSpec, RopeSpec

Config = Mapping[str, Any]

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_HF_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_ROPE_KEYS = (
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "rope_local_base_freq",
    "partial_rotary_factor",
)


@dataclass(frozen=True)
class Piece:
    """Where (a part of) one of our tensors stands in a Hugging Face checkpoint.

    `part` None: our tensor is rows [first_row, first_row + its rows) of `hf_name`. Else part `part` of our fused
    tensor, all groups one after the other, is rows [first_row, first_row + groups * part_rows) of `hf_name`.
    `transpose`: the file stores [in, out]; rows are counted after transposing.

    A tensor that is stacked over experts (dimension 0; its rows are dimension 1) comes from one tensor for each expert,
    `expert` says which, or (None) from one tensor that is stacked too; `transpose` then swaps its last two dimensions.
    """

    hf_name: str
    part: str | None = None
    first_row: int = 0
    transpose: bool = False
    expert: int | None = None


class Family:
    """One model family. Class attributes: `name` (`DecoderSpec.family`), `model_types` and `architectures` as in
    config.json, `prefix` (Hugging Face's name of the part below the head; files saved from the bare model lack it),
    `layers_name` and `activation_key` (what it calls these), `defaults` (transformers' values of keys that a config
    may leave out), `experts_name` (its name of a mixture-of-experts block), `expert_names` (of an expert's gate, up and
    down projection) and `dequantised` (quantisations of its files that are undone when they are read)."""

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    architectures: ClassVar[tuple[str, ...]]
    prefix: ClassVar[str] = "model."
    layers_name: ClassVar[str] = "layers"
    defaults: ClassVar[dict[str, Any]] = {}
    activation_key: ClassVar[str] = "hidden_act"
    experts_name: ClassVar[str] = "mlp"
    expert_names: ClassVar[tuple[str, str, str]] = ("gate_proj", "up_proj", "down_proj")
    dequantised: ClassVar[tuple[str, ...]] = ()

    # ---- config: Hugging Face -> ours

    def spec(self, hf: Config) -> DecoderSpec:
        """The `DecoderSpec` of a config.json. Raises ConfigError for missing, odd or unsupported values."""
        hf = {"tie_word_embeddings": False, **self.defaults, **hf}
        hidden_size, num_heads = self.integer(hf, "hidden_size"), self.integer(hf, "num_attention_heads")
        num_kv_heads = hf.get("num_key_value_heads") or num_heads
        if num_heads % num_kv_heads:
            raise ConfigError(
                f"config.json: num_attention_heads ({num_heads}) is not a multiple of num_key_value_heads "
                f"({num_kv_heads}); correct one of them"
            )
        head_dim = hf.get("head_dim") or hidden_size // num_heads
        fields: dict[str, Any] = {
            "family": self.name,
            "vocab_size": self.integer(hf, "vocab_size"),
            "hidden_size": hidden_size,
            "mlp_size": self.integer(hf, "intermediate_size"),
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "layers": self.layers(hf),
            "ropes": self.ropes(hf, head_dim),
            "max_positions": self.integer(hf, "max_position_embeddings"),
            "activation": self.activation(hf),
            "norm_eps": float(hf.get("rms_norm_eps", 1e-6)),
            "attention_scale": head_dim**-0.5,
            "tied_embeddings": bool(hf["tie_word_embeddings"]),
        }
        return DecoderSpec(**(fields | self.extras(hf)))

    def layers(self, hf: Config) -> tuple[LayerSpec, ...]:
        """One entry a layer; here: all layers alike, with the config's sliding window if it has one."""
        return (LayerSpec(window=hf.get("sliding_window")),) * self.integer(hf, "num_hidden_layers")

    def ropes(self, hf: Config, head_dim: int) -> tuple[RopeSpec, ...]:
        """The rotary embeddings that layers refer to by index."""
        return (self.rope(hf, hf.get("rope_scaling") or hf.get("rope_parameters") or {}, head_dim),)

    def extras(self, hf: Config) -> dict[str, Any]:
        """Fields of `DecoderSpec` that this family sets beyond the common ones, or otherwise."""
        return {}

    # ---- config: ours -> Hugging Face

    def hf_config(self, spec: DecoderSpec, base: Config | None = None) -> dict[str, Any]:
        """config.json of `spec`. `base`: the config that the model came from; it is returned as it is when it still
        describes the model, and otherwise keeps the keys that `spec` says nothing about."""
        if base is not None and self.spec(base) == spec:
            return dict(base)
        kept = {key: value for key, value in (base or {}).items() if key not in _ROPE_KEYS}
        return kept | self.hf_fields(spec)

    def hf_fields(self, spec: DecoderSpec) -> dict[str, Any]:
        """The keys of config.json that `spec` decides."""
        rope = spec.ropes[0]
        return {
            "architectures": [self.architectures[0]],
            "model_type": self.model_types[0],
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.hidden_size,
            "intermediate_size": spec.mlp_size,
            "num_hidden_layers": spec.num_layers,
            "num_attention_heads": spec.num_heads,
            "num_key_value_heads": spec.num_kv_heads,
            "head_dim": spec.head_dim,
            "max_position_embeddings": spec.max_positions,
            self.activation_key: _HF_ACTIVATIONS[spec.activation],
            "rms_norm_eps": spec.norm_eps,
            "rope_theta": rope.theta,
            "rope_scaling": rope_to_hf(rope),
            "tie_word_embeddings": spec.tied_embeddings,
        } | self.hf_extras(spec)

    def hf_extras(self, spec: DecoderSpec) -> dict[str, Any]:
        """The inverse of `extras` and `layers`: keys of config.json beyond the common ones."""
        return {}

    # ---- tensor names

    def name_map(self, spec: DecoderSpec) -> Mapping[str, list[Piece]]:
        """For each of our global names, the pieces of Hugging Face tensors that it is made of."""
        return _name_map(self, spec)

    def names(self, spec: DecoderSpec) -> dict[str, list[Piece]]:
        """Makes `name_map`."""
        names = {"embed.weight": [Piece(f"{self.prefix}embed_tokens.weight")]}
        for index in range(spec.num_layers):
            at = f"{self.prefix}{self.layers_name}.{index}."
            for ours, pieces in self.layer_map(spec, at, spec.layers[index].moe).items():
                names[f"layers.{index}.{ours}"] = pieces
        names["norm.weight"] = [Piece(f"{self.prefix}norm.weight")]
        if not spec.tied_embeddings:
            names["head.weight"] = [Piece("lm_head.weight")]
        return names

    def layer_map(self, spec: DecoderSpec, at: str, moe: bool) -> dict[str, list[Piece]]:
        """Names within one layer; `at`: its prefix in the Hugging Face names; `moe`: whether it has experts."""
        norms = {
            f"{ours}.weight": [Piece(f"{at}{theirs}.weight")]
            for ours, theirs in self.norm_names(spec).items()
        }
        block = self.experts_map(spec, f"{at}{self.experts_name}.") if moe else self.mlp_map(spec, at)
        return norms | self.attention_map(spec, f"{at}self_attn.") | block

    def attention_map(self, spec: DecoderSpec, at: str) -> dict[str, list[Piece]]:
        names = {}
        for kind, wanted in (("weight", True), ("bias", spec.qkv_bias)):
            if wanted:
                names[f"attn.qkv.{kind}"] = [Piece(f"{at}{part}_proj.{kind}", part) for part in "qkv"]
        for kind, wanted in (("weight", True), ("bias", spec.attention_out_bias)):
            if wanted:
                names[f"attn.out.{kind}"] = [Piece(f"{at}o_proj.{kind}")]
        return names

    def mlp_map(self, spec: DecoderSpec, at: str) -> dict[str, list[Piece]]:
        names = {}
        for kind, wanted in (("weight", True), ("bias", spec.mlp_bias)):
            if wanted:
                parts = ("gate", "up")
                names[f"mlp.gate_up.{kind}"] = [Piece(f"{at}mlp.{part}_proj.{kind}", part) for part in parts]
                names[f"mlp.down.{kind}"] = [Piece(f"{at}mlp.down_proj.{kind}")]
        return names

    def experts_map(self, spec: DecoderSpec, at: str) -> dict[str, list[Piece]]:
        """Router and experts, each expert in tensors of its own, which is how most files have them."""
        gate, up, down = self.expert_names
        experts = range(spec.moe.num_experts)
        gates = [Piece(f"{at}experts.{e}.{gate}.weight", "gate", expert=e) for e in experts]
        ups = [Piece(f"{at}experts.{e}.{up}.weight", "up", expert=e) for e in experts]
        return {
            "mlp.router.weight": [Piece(f"{at}gate.weight")],
            "mlp.experts.gate_up.weight": gates + ups,
            "mlp.experts.down.weight": [Piece(f"{at}experts.{e}.{down}.weight", expert=e) for e in experts],
        }

    def is_unused(self, spec: DecoderSpec, hf_name: str) -> bool:
        """Whether files of this family may hold a tensor of that name which is no part of the model here."""
        return False

    def norm_names(self, spec: DecoderSpec) -> dict[str, str]:
        """Our norm -> Hugging Face's, within a layer."""
        names = {
            "pre": {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
            "post": {
                "attn_post_norm": "post_attention_layernorm",
                "mlp_post_norm": "post_feedforward_layernorm",
            },
            "both": {
                "attn_norm": "input_layernorm",
                "attn_post_norm": "post_attention_layernorm",
                "mlp_norm": "pre_feedforward_layernorm",
                "mlp_post_norm": "post_feedforward_layernorm",
            },
        }[spec.norm_placement]
        if spec.qk_norm != "none":
            names |= {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}
        return names

    # ---- helpers for the families' files

    def integer(self, hf: Config, key: str) -> int:
        """A size that the config must have."""
        value = hf.get(key)
        if not isinstance(value, int) or value < 1:
            raise ConfigError(
                f"config.json: `{key}` of a {self.name} model must be a positive integer, but it is {value!r}"
            )
        return value

    def activation(self, hf: Config) -> str:
        """Our name of the config's activation."""
        value = hf.get(self.activation_key)
        if value not in ACTIVATIONS:
            raise ConfigError(
                f"config.json: `{self.activation_key}` is {value!r}; supported are {', '.join(ACTIVATIONS)}"
            )
        return ACTIVATIONS[value]

    def refuse(self, hf: Config, key: str, why: str) -> None:
        """Raise ConfigError when the config sets `key`, which would change the model in a way not supported."""
        if hf.get(key):
            raise ConfigError(
                f"config.json: `{key}: {hf[key]!r}` is not supported for {self.name} models: {why}"
            )

    def only(self, hf: Config, values: Config) -> None:
        """Raise ConfigError when the config has one of these keys with another value than this, the supported one."""
        for key, value in values.items():
            if hf.get(key, value) != value:
                raise ConfigError(
                    f"config.json: `{key}` is {hf[key]!r}; of {self.name} models {value!r} is supported"
                )

    def rope(self, hf: Config, parameters: Config, dim: int, theta: float = 10000.0) -> RopeSpec:
        """A `RopeSpec` from one dict of rotary settings and the config's top level."""
        return rope_from_hf(
            parameters,
            dim=dim,
            theta=hf.get("rope_theta") or theta,
            max_positions=self.integer(hf, "max_position_embeddings"),
            original_max_positions=hf.get("original_max_position_embeddings"),
        )

    def layers_by_type(self, hf: Config, types: list[str], full_rope: int = 0) -> tuple[LayerSpec, ...]:
        """Layers from a list of `full_attention` (rotary embedding `full_rope`) and `sliding_attention` (0)."""
        count = self.integer(hf, "num_hidden_layers")
        known = {"full_attention": LayerSpec(None, full_rope)}
        if "sliding_attention" in types:
            known["sliding_attention"] = LayerSpec(self.integer(hf, "sliding_window"), 0)
        for index, kind in enumerate(types):
            if kind not in known:
                raise ConfigError(
                    f"config.json: layer_types[{index}] is {kind!r}; supported are full_attention and "
                    "sliding_attention"
                )
        if len(types) != count:
            raise ConfigError(
                f"config.json: layer_types has {len(types)} entries for {count} layers; they must agree"
            )
        return tuple(known[kind] for kind in types)


@lru_cache(maxsize=32)
def _name_map(family: Family, spec: DecoderSpec) -> Mapping[str, list[Piece]]:
    """Made once: a large mixture has tens of thousands of tensors, and every adapter asks."""
    return MappingProxyType(family.names(spec))


def layer_types(spec: DecoderSpec) -> list[str]:
    """The `layer_types` list of a config: which layers have a sliding window."""
    return ["full_attention" if layer.window is None else "sliding_attention" for layer in spec.layers]
