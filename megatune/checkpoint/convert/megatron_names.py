"""Hugging Face tensors and those of a Megatron-Core GPT model: one table for every Megatron format.

A model's table has one `MegatronTensor` for each parameter of the whole model: what it is called (with Transformer
Engine and with Megatron's own layers), which rows of which Hugging Face tensors it is made of and how tensor
parallelism cuts it. Rows of q, k and v stand grouped by KV head, as in our own tensors; gate and up one after another.
Gemma's norms are those of its files: Megatron adds 1 where `apply_layernorm_1p` is set. Formats read and write tensors
of the whole model under these names; `FromMegatron` and `ToMegatron` turn the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from megatune.checkpoint.pretrained import IGNORED
from megatune.checkpoint.sources import TensorSource
from megatune.errors import CheckpointError, ConfigError
from megatune.models.families.base import Piece
from megatune.models.layout import shard_specs
from megatune.models.registry import family_named
from megatune.models.spec import DecoderSpec
from megatune.parallel.shard import Fused, ShardSpec

Backend = Literal["te", "local"]

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
ROUTER_BIAS = "mlp.router.expert_bias"  # fp32, also in models of 16 bits

# Our name of a parameter outside of the layers -> Megatron's.
_OUTSIDE = {"embed.weight": EMBEDDING, "norm.weight": "decoder.final_layernorm.weight", "head.weight": HEAD}
# Our name within a layer -> Megatron's with Transformer Engine, where norms are part of the matrix that follows.
_ATTENTION = {
    "attn_norm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "attn.qkv.weight": "self_attention.linear_qkv.weight",
    "attn.qkv.bias": "self_attention.linear_qkv.bias",
    "attn.q_norm.weight": "self_attention.q_layernorm.weight",
    "attn.k_norm.weight": "self_attention.k_layernorm.weight",
    "attn.out.weight": "self_attention.linear_proj.weight",
    "attn.out.bias": "self_attention.linear_proj.bias",
    "attn_post_norm.weight": "self_attention.linear_proj.post_layernorm.weight",
}
_LATENT_ATTENTION = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn.q.weight": "self_attention.linear_q_proj.weight",
    "attn.q_a.weight": "self_attention.linear_q_down_proj.weight",
    "attn.q_a_norm.weight": "self_attention.linear_q_up_proj.layer_norm_weight",
    "attn.q_b.weight": "self_attention.linear_q_up_proj.weight",
    "attn.kv_a.weight": "self_attention.linear_kv_down_proj.weight",
    "attn.kv_a_norm.weight": "self_attention.linear_kv_up_proj.layer_norm_weight",
    "attn.kv_b.weight": "self_attention.linear_kv_up_proj.weight",
    "attn.out.weight": "self_attention.linear_proj.weight",
}
_DENSE = {
    "mlp_norm.weight": "mlp.linear_fc1.layer_norm_weight",
    "mlp.gate_up.weight": "mlp.linear_fc1.weight",
    "mlp.gate_up.bias": "mlp.linear_fc1.bias",
    "mlp.down.weight": "mlp.linear_fc2.weight",
    "mlp.down.bias": "mlp.linear_fc2.bias",
    "mlp_post_norm.weight": "mlp.linear_fc2.post_layernorm.weight",
}
_EXPERTS = {
    "mlp_norm.weight": "pre_mlp_layernorm.weight",
    "mlp.router.weight": "mlp.router.weight",
    "mlp.router.correction": ROUTER_BIAS,
    "mlp.experts.gate_up.weight": "mlp.experts.linear_fc1.weight",
    "mlp.experts.down.weight": "mlp.experts.linear_fc2.weight",
    "mlp.shared.gate_up.weight": "mlp.shared_experts.linear_fc1.weight",
    "mlp.shared.down.weight": "mlp.shared_experts.linear_fc2.weight",
}
# What is called otherwise without Transformer Engine.
_LOCAL = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
}


@dataclass(frozen=True)
class MegatronTensor:
    """One parameter of the whole model, `layer` and `expert` counted over the whole model (None: not in one).

    `within`: its name in its layer (outside of them: its name), as with Transformer Engine, without the expert's
    number. `shape`: with the model's true vocabulary. `pieces`, `fused`: the Hugging Face rows that its rows are, as in
    `checkpoint.mapping.Mapped`. `cut`: the dimension that tensor parallelism cuts (experts: expert tensor parallelism);
    where `halves`, each process has its share of the first half of the rows (gate) above that of the second (up).
    `vocab`: dimension 0 counts tokens and is padded in files.
    """

    within: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    fused: Fused | None = None
    cut: int | None = None
    halves: bool = False
    vocab: bool = False
    layer: int | None = None
    expert: int | None = None

    @property
    def name(self) -> str:
        """Its name in the whole model: `decoder.layers.3.mlp.experts.linear_fc1.weight7`."""
        return self.key(self.layer, self.expert)

    def key(self, layer: int | None, expert: int | None = None, backend: Backend = "te") -> str:
        """Its name in a module whose layers and experts have these numbers, in Megatron's state dicts."""
        within = self.within if backend == "te" else _LOCAL.get(self.within, self.within)
        if expert is not None:
            within = f"{within}{expert}" if backend == "te" else _local_expert(within, expert)
        return within if layer is None else f"decoder.layers.{layer}.{within}"

    def cut_with(self, backend: Backend) -> int | None:
        """`cut`; Megatron's own layers also cut the projections to the latents."""
        latent = self.within.endswith("_down_proj.weight")
        return 0 if latent and backend == "local" else self.cut

    @property
    def fp32(self) -> bool:
        """Whether it is stored in fp32 whatever the model's dtype."""
        return self.within == ROUTER_BIAS

    def runs(self, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """(Hugging Face name, first row there, rows) that rows [start, stop) are, one after the other."""
        if self.fused is None:
            yield self.pieces[0].hf_name, self.pieces[0].first_row + start, stop - start
            return
        pieces = {piece.part: piece for piece in self.pieces}
        size = self.fused.group_rows
        for group in range(start // size, -(-stop // size)):
            for part, offset, rows in self.fused.offsets():
                at = group * size + offset
                first, last = max(start, at), min(stop, at + rows)
                if first < last:
                    base = pieces[part].first_row + group * rows
                    yield pieces[part].hf_name, base + first - at, last - first

    def spans(self) -> Iterator[tuple[str, int, int, Piece]]:
        """(Hugging Face name, its first row here, its rows here, the piece) of each piece, in the file's order."""
        for piece in self.pieces:
            groups, rows = (1, self.shape[0]) if self.fused is None else self._part(piece)
            yield piece.hf_name, piece.first_row, groups * rows, piece

    def places(self, piece: Piece, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """(row here, rows) of rows [start, stop) of one piece, counted from the piece's first."""
        if self.fused is None:
            yield start, stop - start
            return
        _, rows = self._part(piece)
        offset = next(at for part, at, _ in self.fused.offsets() if part == piece.part)
        for group in range(start // rows, -(-stop // rows)):
            first, last = max(start, group * rows), min(stop, (group + 1) * rows)
            yield group * self.fused.group_rows + offset + first - group * rows, last - first

    def _part(self, piece: Piece) -> tuple[int, int]:
        return self.fused.groups, self.fused.part_rows(piece.part)


def _local_expert(within: str, expert: int) -> str:
    return within.replace("mlp.experts.", f"mlp.experts.local_experts.{expert}.")


class MegatronTable:
    """All parameters of one model, both ways. ConfigError for a model that Megatron-Core's GPT has no names for."""

    def __init__(self, spec: DecoderSpec) -> None:
        self.spec = spec
        self.family = family_named(spec.family)
        _check(spec)
        self.tensors: dict[str, MegatronTensor] = {tensor.name: tensor for tensor in _tensors(spec)}

    @cached_property
    def by_hf(self) -> dict[str, list[tuple[MegatronTensor, int, int, Piece]]]:
        """Hugging Face name -> (tensor, first row in the Hugging Face tensor, rows, piece), in the order of rows."""
        found: dict[str, list[tuple[MegatronTensor, int, int, Piece]]] = {}
        for tensor in self.tensors.values():
            for name, first, rows, piece in tensor.spans():
                found.setdefault(name, []).append((tensor, first, rows, piece))
        for places in found.values():
            places.sort(key=lambda place: place[1])
        return found

    @property
    def hf_names(self) -> set[str]:
        """All Hugging Face names that the model has."""
        return set(self.by_hf)

    def hf_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a Hugging Face tensor."""
        places = self.by_hf[name]
        return (sum(rows for _, _, rows, _ in places), *places[0][0].shape[1:])

    def check(self, source: TensorSource) -> None:
        """CheckpointError unless `source` (Hugging Face names) has exactly this model's tensors, with their shapes.
        A second copy of a tied embedding and buffers that old files hold are fine."""
        names, wanted = source.names(), self.by_hf
        tied = {"lm_head.weight"} if self.spec.tied_embeddings else set()
        for name in sorted(names - wanted.keys() - tied):
            if not name.endswith(IGNORED) and not self.family.is_unused(self.spec, name):
                raise CheckpointError(
                    f"{source}: tensor {name} has no place in a Megatron-Core model; does the config belong to it?"
                )
        for name in wanted:
            if name not in names:
                raise CheckpointError(f"{source}: tensor {name} is missing; is the checkpoint complete?")
            if source.shape(name) != self.hf_shape(name):
                raise CheckpointError(
                    f"{source}: {name} has shape {list(source.shape(name))} but the config asks for "
                    f"{list(self.hf_shape(name))}; they do not belong together"
                )


class FromMegatron:
    """Hugging Face tensors out of `source`, whose names are those of `MegatronTensor.name`, padded or not: a
    `TensorSource`. It has the tensors that `source` has all parts of."""

    def __init__(self, table: MegatronTable, source: TensorSource) -> None:
        self._table, self._source = table, source
        there = source.names()
        self._names = {
            name for name, places in table.by_hf.items() if all(tensor.name in there for tensor, *_ in places)
        }

    def __str__(self) -> str:
        return str(self._source)

    def names(self) -> set[str]:
        return set(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._table.hf_shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._table.by_hf[name][0][0].name)

    def kin(self, name: str) -> str:
        """The Megatron tensor that its rows stand in."""
        return self._table.by_hf[name][0][0].name

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        places = self._table.by_hf[name]
        parts = []
        for tensor, first, rows, piece in places:
            low, high = max(start, first), min(stop, first + rows)
            if low < high:
                runs = tensor.places(piece, low - first, high - first)
                parts.extend(self._source.rows(tensor.name, at, at + count) for at, count in runs)
        return _joined(parts, lambda: self._source.rows(places[0][0].name, 0, 0))


class ToMegatron:
    """Tensors of the whole Megatron model, without padding, out of `source` with Hugging Face names: a
    `TensorSource`. It has the tensors that `source` has all parts of."""

    def __init__(self, table: MegatronTable, source: TensorSource) -> None:
        self._table, self._source = table, source
        there = source.names()
        self._names = {
            name
            for name, tensor in table.tensors.items()
            if all(piece.hf_name in there for piece in tensor.pieces)
        }

    def __str__(self) -> str:
        return str(self._source)

    def names(self) -> set[str]:
        return set(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._table.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._table.tensors[name].pieces[0].hf_name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        tensor = self._table.tensors[name]
        parts = [self._source.rows(hf, first, first + count) for hf, first, count in tensor.runs(start, stop)]
        return _joined(parts, lambda: self._source.rows(tensor.pieces[0].hf_name, 0, 0))


def _joined(parts: list[Tensor], empty: Callable[[], Tensor]) -> Tensor:
    if not parts:
        return empty()
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _tensors(spec: DecoderSpec) -> Iterator[MegatronTensor]:
    pieces = family_named(spec.family).name_map(spec)
    for name, one in shard_specs(spec).items():
        made = tuple(pieces[name])
        if not name.startswith("layers."):
            yield MegatronTensor(_OUTSIDE[name], one.shape, made, cut=one.tensor_dim, vocab=one.vocab)
            continue
        _, index, ours = name.split(".", 2)
        layer = int(index)
        names = (_LATENT_ATTENTION if spec.mla else _ATTENTION) | (
            _EXPERTS if spec.layers[layer].moe else _DENSE
        )
        whole = _in_layer(names[ours], one, made, layer)
        yield from _experts(whole, one) if one.expert else (whole,)


def _in_layer(within: str, one: ShardSpec, pieces: tuple[Piece, ...], layer: int) -> MegatronTensor:
    fused, halves = one.fused, False
    if fused is not None and fused.names == ("gate", "up"):
        # Ours stand row by row in turns.
        fused, halves = Fused((("gate", fused.groups), ("up", fused.groups)), 1), True
    return MegatronTensor(within, one.shape, pieces, fused, one.tensor_dim, halves, layer=layer)


def _experts(whole: MegatronTensor, one: ShardSpec) -> Iterator[MegatronTensor]:
    """A tensor for each expert; ours are stacked."""
    by_expert: dict[int | None, list[Piece]] = {}
    for piece in whole.pieces:
        by_expert.setdefault(piece.expert, []).append(piece)
    for expert in range(one.shape[0]):
        yield replace(
            whole,
            shape=one.shape[1:],
            pieces=tuple(by_expert[expert]),
            cut=None if one.tensor_dim is None else one.tensor_dim - 1,
            expert=expert,
        )


def _check(spec: DecoderSpec) -> None:
    """ConfigError where Megatron-Core's GPT cannot be the same model."""
    moe, mla = spec.moe, spec.mla
    problems = {
        "its norms are no RMSNorm": spec.norm != "rms",
        "its positions are learned": spec.positions != "rope",
        "its feed-forward blocks have no gate": not spec.gated_mlp,
        "it has norms only after its blocks": spec.norm_placement == "post",
        "its norms on q and k are over all heads at once": spec.qk_norm == "full",
        "its attention has sinks": spec.sinks,
        "its experts have biases": moe is not None and (moe.expert_bias or moe.router_bias or moe.clamped),
        "it has biases on latent attention": mla is not None and (spec.qkv_bias or spec.attention_out_bias),
        "rotated pairs of its latent attention are not next to each other (rope_interleave is false)": (
            mla is not None and not mla.interleaved
        ),
        "its sigmoid router does not normalise (norm_topk_prob is false)": (
            moe is not None and moe.score == "sigmoid" and not moe.normalise and moe.top_k > 1
        ),
    }
    for problem, is_so in problems.items():
        if is_so:
            raise ConfigError(
                f"a {spec.family} model cannot be converted to or from Megatron: {problem}; use another format"
            )
