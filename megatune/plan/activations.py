"""What one layer keeps of one micro-batch for backward, from the shape of the model and the layout alone."""

from __future__ import annotations

from dataclasses import dataclass

from megatune.config.layout import Layout
from megatune.models.spec import DecoderSpec


@dataclass(frozen=True)
class Kept:
    """Bytes of a layer's activations. `always`: kept in any case; `given_up`: what selective recompute gives up as
    well; `again`: what a block's backward then needs of that at a time; `passing`: more that a backward pass through
    the layer needs for a moment."""

    always: int
    given_up: int
    again: int
    passing: int

    @property
    def whole(self) -> int:
        return self.always + self.given_up


def layer_input(spec: DecoderSpec, layout: Layout, tokens: int, width: int) -> int:
    """Bytes of the hidden states between layers. `tokens`: of a micro-batch; `width`: bytes of an element."""
    return tokens // (layout.cp * layout.tp) * spec.hidden_size * width


def layer_activations(spec: DecoderSpec, index: int, layout: Layout, tokens: int, width: int) -> Kept:
    """Of layer `index`, for a micro-batch of `tokens`, in elements of `width` bytes.

    Inputs of matrix products and norms, what attention and gates save; not what is small beside these.
    """
    here = tokens // layout.cp  # tokens of this process inside a block, with a share of heads and inner sizes
    hidden = layer_input(spec, layout, tokens, 1)
    norms = {"pre": 1, "post": 1, "both": 2}[spec.norm_placement]
    heads, given_up = _attention(spec, index, layout, here)
    inner, gates, passing = _feed_forward(spec, index, layout, here)
    always = 2 * (1 + norms) * hidden + heads + inner
    if layout.cp > 1:  # attention that communicates is kept
        always, given_up = always + given_up, 0
    # Of the block that is computed again its result is there twice for a moment.
    again = 2 * max(given_up, gates)
    # The gradients of what is widest in a block, of its gathered input and of its output.
    passing = max(passing, heads) + 2 * here * spec.hidden_size
    return Kept(always * width, (given_up + gates) * width, again * width, passing * width)


def _attention(spec: DecoderSpec, index: int, layout: Layout, here: int) -> tuple[int, int]:
    """(elements between the blocks' products that are always kept, those given up by selective recompute)."""
    heads = spec.num_heads // layout.tp
    if spec.mla is not None:
        mla = spec.mla
        latents = 2 * mla.kv_rank + mla.rope_dim + 2 * (mla.q_rank or 0)
        expanded = heads * (mla.query_dim + mla.nope_dim + mla.value_dim)
        kept = here // layout.tp * latents + here * (expanded + mla.rope_dim)
        # q and k joined from their parts, and the output; q's product is then kept by nobody else.
        return kept, here * heads * (mla.query_dim + mla.value_dim)
    kv_heads = max(1, spec.num_kv_heads // layout.tp)
    rows = spec.qkv.rows // layout.tp
    turned = 0 if spec.layers[index].rope is None else heads + kv_heads
    return here * rows, here * (turned + heads) * spec.head_dim


def _feed_forward(spec: DecoderSpec, index: int, layout: Layout, here: int) -> tuple[int, int, int]:
    """(elements always kept, given up by selective recompute, needed for a moment)."""
    if not spec.layers[index].moe:
        inner = here * spec.mlp_size // layout.tp
        wide = 2 * inner if spec.gated_mlp else inner
        return wide, inner, max(wide, inner + spec.hidden_size * spec.mlp_size // layout.tp)
    moe = spec.moe
    own = here // layout.tp * layout.etp  # tokens whose choices this process sends off; as many rows come
    rows = own * moe.top_k
    inner = rows * moe.expert_size // layout.etp
    shared = here * moe.shared_size // layout.tp
    # Rows as they come and as they go back, router's scores in fp32 (probabilities and what they are made of).
    scores = 3 * here // layout.tp * moe.num_experts * 2
    etp_input = own * spec.hidden_size if layout.etp > 1 else 0
    always = 2 * rows * spec.hidden_size + 2 * inner + 2 * shared + scores + etp_input
    return always, inner + shared, 2 * inner + 2 * rows * spec.hidden_size
