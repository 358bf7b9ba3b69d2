"""The decoder-only transformer that every family is an instance of. Reads as single-device code.

There is no batch dimension: tokens are one flat stream of packed documents. Shapes: T tokens, H hidden size,
V vocabulary, S scored tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatune import ops
from megatune.models.attention import Attention
from megatune.models.cache import KVCache
from megatune.models.layout import shard_specs
from megatune.models.mlp import MLP, GatedMLP
from megatune.models.norm import Norm
from megatune.models.recompute import Recompute, drops_layer, selective, whole_layer
from megatune.models.rope import Rotary, inverse_frequencies, rotary
from megatune.models.spec import DecoderSpec
from megatune.ops import Segments, Targets
from megatune.parallel.offload import Offload
from megatune.parallel.shard import ShardSpec, vocab_rows
from megatune.parallel.stages import Stage, whole
from megatune.parallel.tensor import Embedding, Linear, gather_columns, gather_tokens, own_tokens
from megatune.parallel.world import World


class Layer(nn.Module):
    """Attention and feed-forward block with their residual connections and norms: x [T, H] -> [T, H]."""

    def __init__(self, spec: DecoderSpec, index: int, world: World | None = None) -> None:
        super().__init__()
        before, after = spec.norm_placement != "post", spec.norm_placement != "pre"

        def norm(wanted: bool) -> Norm | None:
            return Norm(spec, spec.hidden_size) if wanted else None

        self.attn_norm = norm(before)
        self.attn = _attention(spec, index, world)
        self.attn_post_norm = norm(after)
        self.mlp_norm = norm(before)
        self.mlp = _mlp(spec, index, world)
        self.mlp_post_norm = norm(after)
        self.joined = False

    def join_norms(self) -> None:
        """Let the products behind RMS norms, whose linear layers are in fp8, take these along where that is faster: one
        reading gives blocks, while scales of whole rows and columns take two, better of a norm that is there."""
        norms = (self.attn_norm, self.mlp_norm)
        blocks = isinstance(self.mlp, GatedMLP) and self.mlp.gate_up.fp8.scaling == "blockwise"
        self.joined = blocks and all(norm is not None and norm.kind == "rms" for norm in norms)

    def forward(
        self, x: Tensor, segments: Segments, rotary: Rotary | None, cache: KVCache | None = None
    ) -> Tensor:
        if self.joined:
            return self._joined(x, segments, rotary, cache)
        y = self.attn_norm(x) if self.attn_norm is not None else x
        y = self.attn(y, segments, rotary, cache)
        y = self.attn_post_norm(y) if self.attn_post_norm is not None else y
        if self.mlp_norm is not None:
            x, y = self.mlp_norm.of_sum(x, y)
        else:
            x = y = x + y
        y = self.mlp(y, segments)
        return x + (self.mlp_post_norm(y) if self.mlp_post_norm is not None else y)

    def _joined(self, x: Tensor, segments: Segments, rotary: Rotary | None, cache: KVCache | None) -> Tensor:
        qkv = self.attn.qkv.of_norm(x, self.attn_norm.weight, self.attn_norm.eps, self.attn_norm.offset)
        y = self.attn.from_qkv(qkv, segments, rotary, cache)
        y = self.attn_post_norm(y) if self.attn_post_norm is not None else y
        norm = self.mlp_norm
        x, gate_up = self.mlp.gate_up.of_sum_norm(x, y, norm.weight, norm.eps, norm.offset)
        y = self.mlp.from_gate_up(gate_up, segments)
        return x + (self.mlp_post_norm(y) if self.mlp_post_norm is not None else y)


def _attention(spec: DecoderSpec, index: int, world: World | None) -> nn.Module:
    if spec.mla is None:
        return Attention(spec, index, world)
    from megatune.models.mla import MLA

    return MLA(spec, index, world)


def _mlp(spec: DecoderSpec, index: int, world: World | None) -> nn.Module:
    if spec.layers[index].moe:
        from megatune.models.moe import MoE

        return MoE(spec, index, world)
    return GatedMLP(spec, world) if spec.gated_mlp else MLP(spec, world)


class Decoder(nn.Module):
    """Embedding, layers, final norm and head.

    `world`: the layout whose slices of the weights this process holds; default: all. `stages`: the pipeline stages
    that it holds, in order; default: the one there is. Modules and parameters keep their global names.
    `recompute`: which activations are computed again in backward (`models.recompute`). `offload`: activations of the
    layers wait for backward in host memory. `z_loss`, `label_smoothing`: of the loss in training mode
    (`ops.linear_cross_entropy`); in evaluation it is the plain cross-entropy.
    """

    def __init__(
        self, spec: DecoderSpec, world: World | None = None, stages: Sequence[Stage] | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.world = world or World.alone()
        self.stages = tuple(stages) if stages is not None else whole(spec.num_layers)
        self.recompute: Recompute = "none"
        self.offload = False
        self.offloader: Offload | None = None
        self.z_loss = self.label_smoothing = 0.0
        has_first, has_last = self.stages[0].is_first, self.stages[-1].is_last
        if has_first or (has_last and spec.tied_embeddings):
            self.embed = Embedding(spec.vocab_size, spec.hidden_size, vocab=True, world=self.world)
        if has_first and spec.positions == "learned":
            self.positions = Embedding(spec.max_positions, spec.hidden_size, vocab=False)
        held = (index for stage in self.stages for index in stage.layers)
        self.layers = nn.ModuleDict({str(index): Layer(spec, index, self.world) for index in held})
        if has_last:
            self.norm = Norm(spec, spec.hidden_size)
            if not spec.tied_embeddings:
                self.head = Linear(
                    spec.hidden_size, spec.vocab_size, shard="column", vocab=True, world=self.world
                )
        for rope in spec.ropes:
            # Computed here, where tensors are real, for forward passes where they are not.
            for long in (False, True):
                inverse_frequencies(rope, long)

    def forward(
        self,
        tokens: Tensor,
        segments: Segments,
        targets: Targets | None = None,
        cache: KVCache | None = None,
        stage: int = 0,
    ) -> Tensor:
        """Logits [T, V] in compute dtype, or with `targets` the fp32 sum of the cross-entropy over them.

        `tokens`: int64 [T]; for a later pipeline stage the hidden states [T, H] of the stage before. `stage`: which of
        `self.stages`; one that is not the model's last gives its hidden states. `cache`: for generation; `tokens` then
        continue the one document in it, and are added to it.
        """
        part = self.stages[stage]
        seen = 0 if cache is None else cache.length
        positions = segments.positions + seen
        lengths = tuple(length + seen for length in segments.lengths)
        rotaries = [rotary(rope, positions, lengths, segments.rows) for rope in self.spec.ropes]
        x = self._embed(tokens, positions) if part.is_first else tokens
        trains = torch.is_grad_enabled()
        away = self._away(x.device, segments, rotaries) if self.offload and trains else None
        with selective(self.recompute == "selective"):
            for index in part.layers:
                layer = self.layers[str(index)]
                rope = self.spec.layers[index].rope
                inputs = (x, segments, None if rope is None else rotaries[rope])
                with nullcontext() if away is None else away.layer():
                    if trains and drops_layer(self.recompute, index):
                        x = whole_layer(layer, *inputs)
                    else:
                        x = layer(*inputs, cache)
        if cache is not None and part.number == self.stages[-1].number:
            cache.advance(tokens.shape[0])
        return self._head(x, targets) if part.is_last else x

    def _away(self, device: torch.device, segments: Segments, rotaries: Sequence[Rotary]) -> Offload:
        """Where the layers' activations go; what all layers use stays."""
        if self.offloader is None:
            self.offloader = Offload(device)
        tables = [table for one in rotaries for table in (one.cos, one.sin)]
        rows = [] if segments.rows is None else [segments.rows]
        self.offloader.begin((segments.positions, segments.cu_seqlens, *rows, *tables))
        return self.offloader

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.spec.embedding_scale != 1.0:
            # The factor is rounded to x's dtype, as in Gemma.
            x = x * x.new_full((), self.spec.embedding_scale)
        if self.spec.positions == "learned":
            x = x + self.positions(own_tokens(positions, self.world.tp))
        return x

    def _head(self, x: Tensor, targets: Targets | None) -> Tensor:
        """Norm, projection to the vocabulary, loss. A tied head uses the embedding's weight, which is why weights
        are taken here, in the root's forward, where a sharding wrapper has made them whole."""
        weight = self.embed.weight if self.spec.tied_embeddings else self.head.weight
        cap, tp = self.spec.logit_softcap, self.world.tp
        if targets is None:
            logits_TV = gather_columns(
                F.linear(gather_tokens(self.norm(x), tp), weight), self.spec.vocab_size, tp
            )
            return logits_TV if cap is None else cap * torch.tanh(logits_TV / cap)
        if tp.size == 1:
            scored_SH, cut = self.norm(x.index_select(0, targets.index)), None
        else:
            scored_SH = gather_tokens(self.norm(x), tp).index_select(0, targets.index)
            first, _ = vocab_rows(self.spec.vocab_size, tp.rank, tp.size)
            cut = ops.VocabCut(first, self.spec.vocab_size, tp.group)
        return ops.linear_cross_entropy(
            scored_SH,
            weight,
            targets.labels,
            softcap=cap,
            z_loss=self.z_loss if self.training else 0.0,
            label_smoothing=self.label_smoothing if self.training else 0.0,
            cut=cut,
        )

    def shard_specs(self) -> dict[str, ShardSpec]:
        """Global shape and slicing of each parameter that is held, the adapters' too, by global name."""
        found = shard_specs(self.spec, self.stages)
        for name, module in self.named_modules():
            adapter = getattr(module, "adapter", None)
            if adapter is not None:
                found |= {one.name: one for one in adapter.shard_specs(f"{name}.adapter")}
        return found
