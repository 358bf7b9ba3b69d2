"""Where folders of torch.distributed.checkpoint keep the tensors of a Hugging Face model: under its own names, or under
torchtitan's.

A tensor is looked for in every place that a version of these programs has for it. torchtitan's Llama rotates
neighbouring rows of q and k where Hugging Face's rotates the halves of a head, so their rows are put in order; its
experts are stacked. Sources: torchtitan/models/{llama3,qwen3,deepseek_v3}/state_dict_adapter.py; transformers 5, whose
models hold experts in one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatune.checkpoint.convert.dcp_files import DcpFolder
from megatune.errors import CheckpointError
from megatune.models.families.base import Family
from megatune.models.spec import DecoderSpec

_OUTSIDE = {
    "embed_tokens.weight": ("tok_embeddings.weight",),
    "norm.weight": ("norm.weight",),
    "lm_head.weight": ("output.weight", "lm_head.weight"),
}
# Within a layer: Hugging Face's name -> torchtitan's, of all its versions.
_LAYER = {
    "self_attn.q_proj.weight": ("attention.wq.weight", "attention.qkv_linear.wq.weight"),
    "self_attn.k_proj.weight": ("attention.wk.weight", "attention.qkv_linear.wk.weight"),
    "self_attn.v_proj.weight": ("attention.wv.weight", "attention.qkv_linear.wv.weight"),
    "self_attn.q_proj.bias": ("attention.wq.bias", "attention.qkv_linear.wq.bias"),
    "self_attn.k_proj.bias": ("attention.wk.bias", "attention.qkv_linear.wk.bias"),
    "self_attn.v_proj.bias": ("attention.wv.bias", "attention.qkv_linear.wv.bias"),
    "self_attn.o_proj.weight": ("attention.wo.weight",),
    "self_attn.q_norm.weight": ("attention.q_norm.weight",),
    "self_attn.k_norm.weight": ("attention.k_norm.weight",),
    "self_attn.q_a_proj.weight": ("attention.wq_a.weight",),
    "self_attn.q_a_layernorm.weight": ("attention.q_norm.weight",),
    "self_attn.q_b_proj.weight": ("attention.wq_b.weight",),
    "self_attn.kv_a_proj_with_mqa.weight": ("attention.wkv_a.weight",),
    "self_attn.kv_a_layernorm.weight": ("attention.kv_norm.weight",),
    "self_attn.kv_b_proj.weight": ("attention.wkv_b.weight",),
    "mlp.gate_proj.weight": ("feed_forward.w1.weight",),
    "mlp.up_proj.weight": ("feed_forward.w3.weight",),
    "mlp.down_proj.weight": ("feed_forward.w2.weight",),
    "mlp.gate.weight": ("moe.router.gate.weight",),
    "mlp.gate.e_score_correction_bias": ("moe.expert_bias", "moe.expert_bias_E"),
    "mlp.shared_experts.gate_proj.weight": ("moe.shared_experts.w1.weight",),
    "mlp.shared_experts.up_proj.weight": ("moe.shared_experts.w3.weight",),
    "mlp.shared_experts.down_proj.weight": ("moe.shared_experts.w2.weight",),
    "input_layernorm.weight": ("attention_norm.weight",),
    "post_attention_layernorm.weight": ("ffn_norm.weight",),
}
_EXPERT = {"gate_proj": ("w1", "w1_EFD"), "up_proj": ("w3", "w3_EFD"), "down_proj": ("w2", "w2_EDF")}
# Families that torchtitan has, and those whose q and k it rotates in neighbouring rows.
_TITAN, _PAIRED = ("llama", "qwen3", "qwen3_moe", "deepseek_v3"), ("llama",)
_IN_EXPERTS = re.compile(r"^(.*)\.(mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight$")
# An expert's matrix: rows of which tensor of transformers' model, which share of them.
_STACKED = {
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "w1": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "down_proj": ("down_proj", None),
    "w2": ("down_proj", None),
}
TITAN_EMBEDDING = "tok_embeddings.weight"


@dataclass(frozen=True)
class Place:
    """Where a Hugging Face tensor stands: tensor `key`, its matrix `expert` where it is stacked, and of that the first
    or second `half` of the rows, or all. `pairs`: heads whose rows stand in rotated pairs (0: none)."""

    key: str
    expert: int | None = None
    half: int | None = None
    pairs: int = 0


def places(family: Family, spec: DecoderSpec, name: str) -> Iterator[Place]:
    """Everywhere that the tensor of a Hugging Face name may be, without what stands before all keys."""
    yield Place(name)
    yield Place(name.replace(".block_sparse_moe.", ".mlp."))
    experts = _IN_EXPERTS.match(name)
    if experts:
        layer, _, expert, matrix = experts.groups()
        stacked, half = _STACKED[matrix]
        yield Place(f"{layer}.mlp.experts.{stacked}", int(expert), half)
    if family.name not in _TITAN:
        return
    inner = name.removeprefix(family.prefix)
    for key in _OUTSIDE.get(inner, ()):
        yield Place(key)
    match = re.match(r"^layers\.(\d+)\.(.*)$", inner)
    if not match:
        return
    layer, within = match.groups()
    if experts:
        _, _, expert, matrix = experts.groups()
        yield from (Place(f"layers.{layer}.moe.experts.{key}", int(expert)) for key in _EXPERT[matrix])
        return
    heads = {"self_attn.q_proj": spec.num_heads, "self_attn.k_proj": spec.num_kv_heads}
    pairs = heads.get(within.rpartition(".")[0], 0) if family.name in _PAIRED else 0
    yield from (Place(f"layers.{layer}.{key}", pairs=pairs) for key in _LAYER.get(within, ()))


class DcpModel:
    """The tensors of a model out of a folder: a `TensorSource` under Hugging Face names. It has what the folder has.

    `shapes`: of all tensors of the model. `before`, `after`: what stands around the keys (`optimizer.state.`,
    `.exp_avg`). `dtype`: of all tensors, default their own. `keys`: what of the folder it uses.
    """

    def __init__(
        self,
        folder: DcpFolder,
        family: Family,
        spec: DecoderSpec,
        shapes: Mapping[str, tuple[int, ...]],
        before: str,
        after: str = "",
        dtype: torch.dtype | None = None,
    ) -> None:
        self._folder, self._before, self._after, self._dtype = folder, before, after, dtype
        self._shapes = shapes
        there = folder.names()
        self._places: dict[str, Place] = {}
        for name in self._shapes:
            for place in places(family, spec, name):
                if self._key(place) in there:
                    self._places[name] = place
                    self._check(name, place)
                    break
        self.keys = {self._key(place) for place in self._places.values()}

    def __str__(self) -> str:
        return str(self._folder)

    def names(self) -> set[str]:
        return set(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype or self._folder.dtype(self._key(self._places[name]))

    def kin(self, name: str) -> str:
        """The tensor of the folder."""
        return self._places[name].key

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        place = self._places[name]
        if not place.pairs:
            return self._read(place, name, start, stop)
        # Whole heads, whose rows 0 2 4 .. 1 3 5 .. are Hugging Face's.
        size = self._shapes[name][0] // place.pairs
        first, last = start // size, -(-stop // size)
        heads = self._read(place, name, first * size, last * size)
        ordered = heads.unflatten(0, (last - first, size // 2, 2)).transpose(1, 2).flatten(0, 2)
        return ordered[start - first * size : stop - first * size].contiguous()

    def _key(self, place: Place) -> str:
        return f"{self._before}{place.key}{self._after}"

    def _read(self, place: Place, name: str, start: int, stop: int) -> Tensor:
        key, shape = self._key(place), self._shapes[name]
        shift = shape[0] if place.half == 1 else 0
        inner = shape[1:]
        if place.expert is None:
            found = self._folder.box(key, (start, *(0 for _ in inner)), (stop - start, *inner))
        else:
            offsets = (place.expert, start + shift, *(0 for _ in inner))
            found = self._folder.box(key, offsets, (1, stop - start, *inner))[0]
        return found.to(self._dtype or found.dtype)

    def _check(self, name: str, place: Place) -> None:
        found, wanted = self._folder.shape(self._key(place)), self._shapes[name]
        if place.expert is not None:
            wanted = (wanted[0] * (1 if place.half is None else 2), *wanted[1:])
        if (found if place.expert is None else found[1:]) != wanted or (
            place.expert is not None and (len(found) != len(wanted) + 1 or place.expert >= found[0])
        ):
            raise CheckpointError(
                f"{self._folder}: {self._key(place)} has shape {list(found)}, which does not fit {name} {list(wanted)} "
                "of the config; they do not belong together"
            )
