"""Every parameter of a model by its global name, from the spec alone; what follows from that: counts and FLOPs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from megatune.models.spec import DecoderSpec
from megatune.parallel.shard import Fused, ShardSpec
from megatune.parallel.stages import Stage, whole


def shard_specs(spec: DecoderSpec, stages: Sequence[Stage] | None = None) -> dict[str, ShardSpec]:
    """The base model's parameters in the given pipeline stages (default: all of them), in the model's order.

    Norms, row-parallel biases and learned positions are replicated, but see a slice of the tokens (sequence
    parallelism), and norms on single heads see this rank's heads: `partial`.
    """
    stages = whole(spec.num_layers) if stages is None else stages
    first, last = stages[0].is_first, stages[-1].is_last
    found: list[ShardSpec] = []
    if first or (last and spec.tied_embeddings):
        found.append(ShardSpec("embed.weight", (spec.vocab_size, spec.hidden_size), 0, vocab=True))
    if first and spec.positions == "learned":
        found.append(ShardSpec("positions.weight", (spec.max_positions, spec.hidden_size), partial=True))
    for index in (index for stage in stages for index in stage.layers):
        found.extend(_layer(spec, f"layers.{index}."))
    if last:
        found.extend(_norm(spec, "norm"))
        if not spec.tied_embeddings:
            found.append(ShardSpec("head.weight", (spec.vocab_size, spec.hidden_size), 0, vocab=True))
    return {one.name: one for one in found}


def _layer(spec: DecoderSpec, at: str) -> Iterator[ShardSpec]:
    hidden, heads = spec.hidden_size, spec.num_heads * spec.head_dim
    if spec.norm_placement != "post":
        yield from _norm(spec, f"{at}attn_norm")
    yield from _linear(f"{at}attn.qkv", hidden, spec.qkv.rows, spec.qkv_bias, 0, spec.qkv)
    if spec.qk_norm == "head":
        yield ShardSpec(f"{at}attn.q_norm.weight", (spec.head_dim,), partial=True)
        yield ShardSpec(f"{at}attn.k_norm.weight", (spec.head_dim,), partial=True)
    elif spec.qk_norm == "full":
        yield ShardSpec(f"{at}attn.q_norm.weight", (heads,), 0)
        yield ShardSpec(f"{at}attn.k_norm.weight", (spec.num_kv_heads * spec.head_dim,), 0)
    yield from _linear(f"{at}attn.out", heads, hidden, spec.attention_out_bias, 1)
    if spec.norm_placement != "pre":
        yield from _norm(spec, f"{at}attn_post_norm")
    if spec.norm_placement != "post":
        yield from _norm(spec, f"{at}mlp_norm")
    if spec.gated_mlp:
        yield from _linear(f"{at}mlp.gate_up", hidden, spec.gate_up.rows, spec.mlp_bias, 0, spec.gate_up)
    else:
        yield from _linear(f"{at}mlp.up", hidden, spec.mlp_size, spec.mlp_bias, 0)
    yield from _linear(f"{at}mlp.down", spec.mlp_size, hidden, spec.mlp_bias, 1)
    if spec.norm_placement != "pre":
        yield from _norm(spec, f"{at}mlp_post_norm")


def _linear(
    name: str, inputs: int, outputs: int, bias: bool, dim: int, fused: Fused | None = None
) -> Iterator[ShardSpec]:
    yield ShardSpec(f"{name}.weight", (outputs, inputs), dim, fused)
    if bias:
        yield ShardSpec(f"{name}.bias", (outputs,), 0 if dim == 0 else None, fused, partial=dim == 1)


def _norm(spec: DecoderSpec, name: str) -> Iterator[ShardSpec]:
    yield ShardSpec(f"{name}.weight", (spec.hidden_size,), partial=True)
    if spec.norm == "layer":
        yield ShardSpec(f"{name}.bias", (spec.hidden_size,), partial=True)


def count_parameters(spec: DecoderSpec) -> int:
    """All weights; tied embeddings once."""
    return sum(math.prod(one.shape) for one in shard_specs(spec).values())


def flops_per_token(spec: DecoderSpec, seq_length: int, *, frozen: bool = False) -> float:
    """Floating point operations a token of a training step needs, forward and backward; for MFU.

    Matrices: 2 N forward, 2 N for the gradients of activations, 2 N for those of weights unless they are `frozen`,
    where N counts the weights that tokens are multiplied with (the head, but not the embedding's lookup, and no
    norms): 6 N for full fine-tuning, 4 N for LoRA (its own small products are left out). Attention, causal, one
    document of `seq_length` tokens: 4 * heads * head_dim * keys forward (q k^T and the sum of values) in each layer,
    twice that backward, with `keys` the average number of keys that a query sees. Recomputed activations do not
    count.
    """
    matrices = sum(
        math.prod(one.shape)
        for one in shard_specs(spec).values()
        if len(one.shape) == 2 and one.name not in ("embed.weight", "positions.weight", "head.weight")
    )
    matrices += spec.vocab_size * spec.hidden_size
    keys = sum(_average_keys(seq_length, layer.window) for layer in spec.layers)
    return (4.0 if frozen else 6.0) * matrices + 12.0 * spec.num_heads * spec.head_dim * keys


def _average_keys(seq_length: int, window: int | None) -> float:
    """Mean over queries i = 1 .. seq_length of min(i, window)."""
    reach = min(window or seq_length, seq_length)
    return (reach * (reach + 1) / 2 + (seq_length - reach) * reach) / seq_length
