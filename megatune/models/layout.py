"""Every parameter of a model by its global name, from the spec alone; what follows from that: counts and FLOPs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from megatune.errors import ParallelError
from megatune.models.spec import DecoderSpec
from megatune.parallel.shard import Fused, ShardSpec, vocab_rows
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
        found.extend(_layer(spec, index, f"layers.{index}."))
    if last:
        found.extend(_norm(spec, "norm"))
        if not spec.tied_embeddings:
            found.append(ShardSpec("head.weight", (spec.vocab_size, spec.hidden_size), 0, vocab=True))
    return {one.name: one for one in found}


def _layer(spec: DecoderSpec, index: int, at: str) -> Iterator[ShardSpec]:
    if spec.norm_placement != "post":
        yield from _norm(spec, f"{at}attn_norm")
    yield from _attention(spec, f"{at}attn.") if spec.mla is None else _latent_attention(spec, f"{at}attn.")
    if spec.norm_placement != "pre":
        yield from _norm(spec, f"{at}attn_post_norm")
    if spec.norm_placement != "post":
        yield from _norm(spec, f"{at}mlp_norm")
    if spec.layers[index].moe:
        yield from _experts(spec, f"{at}mlp.")
    else:
        if spec.gated_mlp:
            yield from _linear(
                f"{at}mlp.gate_up", spec.hidden_size, spec.gate_up.rows, spec.mlp_bias, 0, spec.gate_up
            )
        else:
            yield from _linear(f"{at}mlp.up", spec.hidden_size, spec.mlp_size, spec.mlp_bias, 0)
        yield from _linear(f"{at}mlp.down", spec.mlp_size, spec.hidden_size, spec.mlp_bias, 1)
    if spec.norm_placement != "pre":
        yield from _norm(spec, f"{at}mlp_post_norm")


def _attention(spec: DecoderSpec, at: str) -> Iterator[ShardSpec]:
    hidden, heads = spec.hidden_size, spec.num_heads * spec.head_dim
    if spec.sinks:
        yield ShardSpec(f"{at}sinks", (spec.num_heads,), 0)
    yield from _linear(f"{at}qkv", hidden, spec.qkv.rows, spec.qkv_bias, 0, spec.qkv)
    if spec.qk_norm == "head":
        yield ShardSpec(f"{at}q_norm.weight", (spec.head_dim,), partial=True)
        yield ShardSpec(f"{at}k_norm.weight", (spec.head_dim,), partial=True)
    elif spec.qk_norm == "full":
        yield ShardSpec(f"{at}q_norm.weight", (heads,), 0)
        yield ShardSpec(f"{at}k_norm.weight", (spec.num_kv_heads * spec.head_dim,), 0)
    yield from _linear(f"{at}out", heads, hidden, spec.attention_out_bias, 1)


def _latent_attention(spec: DecoderSpec, at: str) -> Iterator[ShardSpec]:
    """The latents are replicated, what expands them is cut by heads."""
    mla, hidden = spec.mla, spec.hidden_size
    queries = spec.num_heads * mla.query_dim
    if mla.q_rank is None:
        yield from _linear(f"{at}q", hidden, queries, False, 0)
    else:
        yield from _linear(f"{at}q_a", hidden, mla.q_rank, spec.qkv_bias, None)
        yield ShardSpec(f"{at}q_a_norm.weight", (mla.q_rank,), partial=True)
        yield from _linear(f"{at}q_b", mla.q_rank, queries, False, 0)
    yield from _linear(f"{at}kv_a", hidden, mla.kv_rank + mla.rope_dim, spec.qkv_bias, None)
    yield ShardSpec(f"{at}kv_a_norm.weight", (mla.kv_rank,), partial=True)
    yield from _linear(f"{at}kv_b", mla.kv_rank, spec.num_heads * (mla.nope_dim + mla.value_dim), False, 0)
    yield from _linear(f"{at}out", spec.num_heads * mla.value_dim, hidden, spec.attention_out_bias, 1)


def _experts(spec: DecoderSpec, at: str) -> Iterator[ShardSpec]:
    moe, hidden = spec.moe, spec.hidden_size
    count, inner = moe.num_experts, moe.expert_size
    yield ShardSpec(f"{at}router.weight", (count, hidden), partial=True)
    if moe.router_bias:
        yield ShardSpec(f"{at}router.bias", (count,), partial=True)
    if moe.correction:
        yield ShardSpec(f"{at}router.correction", (count,), partial=True)
    yield ShardSpec(f"{at}experts.gate_up.weight", (count, 2 * inner, hidden), 1, moe.gate_up, expert=True)
    if moe.expert_bias:
        yield ShardSpec(f"{at}experts.gate_up.bias", (count, 2 * inner), 1, moe.gate_up, expert=True)
    yield ShardSpec(f"{at}experts.down.weight", (count, hidden, inner), 2, expert=True)
    if moe.expert_bias:
        yield ShardSpec(f"{at}experts.down.bias", (count, hidden), partial=True, expert=True)
    if moe.shared_size:
        fused = moe.shared_gate_up
        yield from _linear(f"{at}shared.gate_up", hidden, fused.rows, False, 0, fused)
        yield from _linear(f"{at}shared.down", moe.shared_size, hidden, False, 1)


def _linear(
    name: str, inputs: int, outputs: int, bias: bool, dim: int | None, fused: Fused | None = None
) -> Iterator[ShardSpec]:
    yield ShardSpec(f"{name}.weight", (outputs, inputs), dim, fused, partial=dim is None)
    if bias:
        yield ShardSpec(f"{name}.bias", (outputs,), 0 if dim == 0 else None, fused, partial=dim != 0)


def _norm(spec: DecoderSpec, name: str) -> Iterator[ShardSpec]:
    yield ShardSpec(f"{name}.weight", (spec.hidden_size,), partial=True)
    if spec.norm == "layer":
        yield ShardSpec(f"{name}.bias", (spec.hidden_size,), partial=True)


def check_tensor(spec: DecoderSpec, tp: int) -> None:
    """ParallelError where the model cannot be cut over `tp` tensor parallel processes; needs none of them."""
    problem = _tensor_problem(spec, tp)
    if problem is not None:
        legal = [str(n) for n in range(1, spec.num_heads + 1) if _tensor_problem(spec, n) is None]
        raise ParallelError(f"parallel.tensor: {tp} {problem}; use {' or '.join(legal)}")


def _tensor_problem(spec: DecoderSpec, tp: int) -> str | None:
    if spec.num_heads % tp:
        return f"does not divide the model's {spec.num_heads} attention heads"
    if spec.mla is None and not spec.qkv.can_split(tp):
        if spec.num_kv_heads % tp and tp % spec.num_kv_heads:
            return (
                f"neither divides the model's {spec.num_kv_heads} key/value heads nor is a multiple of them"
            )
        return f"is {tp // spec.num_kv_heads} processes a key/value head, which do not divide its {spec.head_dim} rows"
    if spec.mlp_size % tp and not all(layer.moe for layer in spec.layers):
        return f"does not divide the feed-forward block's inner size {spec.mlp_size}"
    if spec.moe is not None and spec.moe.shared_size % tp:
        return f"does not divide the shared experts' inner size {spec.moe.shared_size}"
    if not vocab_rows(spec.vocab_size, tp - 1, tp)[1]:
        return f"processes cannot each have a part of a vocabulary of {spec.vocab_size} tokens"
    return None


_LOOKED_UP = ("embed.weight", "positions.weight", "head.weight")


def count_parameters(spec: DecoderSpec) -> int:
    """All weights; tied embeddings once."""
    return sum(math.prod(one.shape) for one in shard_specs(spec).values())


def flops_per_token(spec: DecoderSpec, seq_length: int, *, frozen: bool = False) -> float:
    """Floating point operations a token of a training step needs, forward and backward; for MFU.

    Matrices: 2 N forward, 2 N for the gradients of activations, 2 N for those of weights unless they are `frozen`,
    where N counts the weights that a token is multiplied with (the head, but not the embedding's lookup, and no norms;
    of the experts those that it goes to): 6 N for full fine-tuning, 4 N for LoRA (its own small products are left out).
    Attention, causal, one document of `seq_length` tokens: 2 * heads * (width of q and k + width of v) * keys forward
    (q k^T and the sum of values) in each layer, twice that backward, with `keys` the average number of keys that a
    query sees. Recomputed activations do not count.
    """
    matrices = float(spec.vocab_size * spec.hidden_size)
    matrices += sum(
        _multiplied(one, spec) for one in shard_specs(spec).values() if one.name not in _LOOKED_UP
    )
    keys = sum(_average_keys(seq_length, layer.window) for layer in spec.layers)
    value_dim = spec.head_dim if spec.mla is None else spec.mla.value_dim
    return (4.0 if frozen else 6.0) * matrices + 6.0 * spec.num_heads * (spec.head_dim + value_dim) * keys


def stage_costs(spec: DecoderSpec, seq_length: int) -> tuple[list[float], float, float]:
    """Floating point operations a token of each layer, of the embedding and of norm and head: what pipeline stages are
    balanced by. The embedding's lookup costs no product; it counts as one pass over its output."""
    value_dim = spec.head_dim if spec.mla is None else spec.mla.value_dim
    layers = []
    for index, layer in enumerate(spec.layers):
        matrices = sum(_multiplied(one, spec) for one in _layer(spec, index, ""))
        keys = _average_keys(seq_length, layer.window)
        layers.append(6.0 * matrices + 6.0 * spec.num_heads * (spec.head_dim + value_dim) * keys)
    return layers, 6.0 * spec.hidden_size, 6.0 * spec.vocab_size * spec.hidden_size


def _multiplied(one: ShardSpec, spec: DecoderSpec) -> float:
    """Weights of a layer's parameter that one token is multiplied with."""
    if one.name.endswith("weight") and len(one.shape) == 3:
        return math.prod(one.shape) * spec.moe.top_k / spec.moe.num_experts
    return math.prod(one.shape) if len(one.shape) == 2 and not one.expert else 0.0


def _average_keys(seq_length: int, window: int | None) -> float:
    """Mean over queries i = 1 .. seq_length of min(i, window)."""
    reach = min(window or seq_length, seq_length)
    return (reach * (reach + 1) / 2 + (seq_length - reach) * reach) / seq_length
