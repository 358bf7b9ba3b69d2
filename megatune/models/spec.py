"""What a decoder-only transformer is made of: the one description that every family maps its config to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatune.parallel.shard import Fused


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding (RoFormer, arXiv:2104.09864), half-split convention as in Hugging Face.

    `dim`: rotated leading dimensions of a head (partial rotary: < head_dim). `scaling`: "none"; "linear" (positions
    divided by `factor`); "llama3" (by-frequency interpolation, Llama 3.1); "yarn" (arXiv:2309.00071; `truncate`:
    round the borders of its ramp to whole dimensions); "longrope" (arXiv:2402.13753: per-frequency factors, the long
    ones for documents of more than `original_max_positions` tokens). `attention_factor` multiplies cos and sin.
    `mscale_all_dim`: YaRN's setting of DeepSeek-V3, which has gone into `DecoderSpec.attention_scale`.
    """

    theta: float
    dim: int
    scaling: Literal["none", "linear", "llama3", "yarn", "longrope"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    mscale_all_dim: float = 0.0
    long_factors: tuple[float, ...] = ()
    short_factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class LayerSpec:
    """What differs between the layers of one model. `window`: tokens a query sees, itself included (None: all);
    `rope`: index into `DecoderSpec.ropes` (None: no rotary embedding in this layer); `moe`: experts in place of the
    one feed-forward block."""

    window: int | None = None
    rope: int | None = 0
    moe: bool = False


@dataclass(frozen=True)
class MoESpec:
    """The experts of a mixture-of-experts layer and how tokens choose theirs.

    `score`: "softmax" over all experts and then the `top_k` largest (Mixtral, Qwen3-MoE), "sigmoid" of each
    (DeepSeek-V3), or "topk_softmax", softmax over the chosen logits alone (GPT-OSS). `normalise`: the chosen
    weights are divided by their sum. `scale` multiplies them. `groups`, `groups_per_token`: experts stand in equal
    groups, and only the best groups (by the sum of their two best) can be chosen from. `correction`: the router has
    a bias that decides which experts are chosen but not their weights (arXiv:2408.15664). `router_bias`,
    `expert_bias`: ordinary biases of the router's and the experts' linear layers. `expert_size`: inner size of one
    expert. `shared_size`: inner size of the experts that every token passes, together (0: none). `clamped`: GPT-
    OSS's gate, which is (min(max(up, -7), 7) + 1) * gate' * sigmoid(1.702 gate') with gate' = min(gate, 7).
    """

    num_experts: int
    top_k: int
    expert_size: int
    shared_size: int = 0
    score: Literal["softmax", "sigmoid", "topk_softmax"] = "softmax"
    normalise: bool = True
    scale: float = 1.0
    groups: int = 1
    groups_per_token: int = 1
    correction: bool = False
    router_bias: bool = False
    expert_bias: bool = False
    clamped: bool = False

    @property
    def gate_up(self) -> Fused:
        """Row order of one expert's fused gate and up projection."""
        return Fused((("gate", 1), ("up", 1)), self.expert_size)

    @property
    def shared_gate_up(self) -> Fused:
        return Fused((("gate", 1), ("up", 1)), self.shared_size)


@dataclass(frozen=True)
class MLASpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): q comes from a latent of `q_rank` (None: directly),
    k and v of all heads from one latent of `kv_rank` and one rotated key of `rope_dim` that all heads share. A head's q
    and k are `nope_dim` + `rope_dim` wide, its v `value_dim`. `interleaved`: rotated pairs stand next to each other.
    `norm_eps`: of the latents' norms (not the config's: transformers has it fixed)."""

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    interleaved: bool = True
    norm_eps: float = 1e-6

    @property
    def query_dim(self) -> int:
        return self.nope_dim + self.rope_dim


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder-only transformer. Sizes in elements; `layers` has one entry a layer.

    `norm_placement`: "pre" (Llama), "post" (OLMo-2: norm on each block's output), "both" (Gemma 2/3: four norms).
    `norm_offset`: added to norm weights in compute (Gemma: 1.0; the stored weight is the file's own).
    `qk_norm`: "head" (per head over head_dim, Qwen3/Gemma 3) or "full" (over all heads at once, OLMo-2).
    `attention_scale`: multiplies q.k (usually head_dim ** -0.5). Soft caps: x -> cap * tanh(x / cap).
    `positions`: "rope", or "learned" (GPT-2: an embedding of `max_positions` rows). `moe`: the experts of the layers
    that have some. `mla`: latent attention in place of the fused q, k, v (`head_dim` is then that of q and k).
    `sinks`: each query head has a learned logit that takes part in its softmax and has no value (GPT-OSS).
    """

    family: str
    vocab_size: int
    hidden_size: int
    mlp_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    max_positions: int
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated_mlp: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    norm_placement: Literal["pre", "post", "both"] = "pre"
    qk_norm: Literal["none", "head", "full"] = "none"
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    attention_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    tied_embeddings: bool = False
    positions: Literal["rope", "learned"] = "rope"
    moe: MoESpec | None = None
    mla: MLASpec | None = None
    sinks: bool = False

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def qkv(self) -> Fused:
        """Row order of the fused q, k, v projection: grouped by KV head."""
        queries = self.num_heads // self.num_kv_heads * self.head_dim
        return Fused((("q", queries), ("k", self.head_dim), ("v", self.head_dim)), self.num_kv_heads)

    @property
    def gate_up(self) -> Fused:
        """Row order of the fused gate and up projection: interleaved row by row."""
        return Fused((("gate", 1), ("up", 1)), self.mlp_size)
