"""Weights into a model: each process reads only the rows that it keeps."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatune.checkpoint.filling import fill
from megatune.checkpoint.mapping import Mapped, check_source, strip_prefix
from megatune.checkpoint.resolve import ModelFolder
from megatune.checkpoint.sources import TensorSource
from megatune.errors import CheckpointError
from megatune.models.families.base import Family, Piece
from megatune.models.layout import shard_specs
from megatune.models.quantise import FrozenParts
from megatune.models.registry import family_named
from megatune.models.spec import DecoderSpec
from megatune.parallel.shard import Box, Parts

# Buffers that old versions of transformers saved beside the weights.
IGNORED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
_COMPARED_ROWS = 4096


def base_map(spec: DecoderSpec) -> dict[str, Mapped]:
    """Each parameter of a base model in a Hugging Face checkpoint."""
    pieces = family_named(spec.family).name_map(spec)
    return {
        name: Mapped(one.shape, tuple(pieces[name]), one.fused) for name, one in shard_specs(spec).items()
    }


def load_pretrained(
    weights: Mapping[str, Parts],
    spec: DecoderSpec,
    folder: ModelFolder,
    *,
    seed: int = 0,
    quantised: FrozenParts | None = None,
) -> None:
    """Fill what this process holds of a model, in place.

    Values are cast to the dtypes that the parts have. Every process calls it, without communication, and reads the rows
    that it keeps, in portions: beside the model, host memory holds tens of megabytes. Adapters start as in PEFT (A
    Kaiming uniform, B zero) from `seed` and the parameter's name alone, so they are the same under every layout.
    `quantised`: weights that are kept in few bits; one at a time is read as it was. Raises CheckpointError before
    anything is filled where the weights are incomplete or do not fit the model.
    """
    source = folder.tensors()
    mapped = _resolve(weights, spec, source, folder.family)
    for name, parts in weights.items():
        if ".adapter." in name:
            init_adapter(name, parts, seed)
        else:
            fill(name, parts, mapped[name], source)
    if quantised is not None:
        quantised.fill(lambda name, parts: fill(name, parts, mapped[name], source))


@torch.no_grad()
def init_adapter(name: str, parts: Parts, seed: int) -> None:
    """Initial value of one adapter parameter: uniform in +-1/sqrt(in) for lora_a (Kaiming uniform with a = sqrt(5)),
    zero for lora_b. Drawn for the global matrix, of each expert where there are some, then sliced."""
    if not name.endswith("lora_a"):
        for _, tensor in parts.parts:
            tensor.zero_()
        return
    if len(parts.shape) == 2:
        _draw(f"{seed}:{name}", parts.shape, parts.parts)
        return
    experts: dict[int, list[tuple[Box, Tensor]]] = {}
    for box, tensor in parts.parts:
        for place in range(box.shape[0]):
            inner = Box(box.offset[1:], box.shape[1:])
            experts.setdefault(box.offset[0] + place, []).append((inner, tensor[place]))
    for expert, found in experts.items():
        _draw(f"{seed}:{name}:{expert}", parts.shape[1:], found)


def _draw(key: str, shape: tuple[int, ...], parts: Sequence[tuple[Box, Tensor]]) -> None:
    if not parts:
        return
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = shape[-1] ** -0.5
    whole = torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
    for box, tensor in parts:
        tensor.copy_(box.of(whole))


def _resolve(
    weights: Mapping[str, Parts], spec: DecoderSpec, source: TensorSource, family: Family
) -> dict[str, Mapped]:
    """The map for this file's names, checked for the whole model, so that all processes find the same: names without
    the prefix and either name of a tied embedding are fine."""
    mapped = base_map(spec)
    untied = family.name_map(replace(spec, tied_embeddings=False))
    known = {piece.hf_name for pieces in untied.values() for piece in pieces}
    names = source.names()
    if family.prefix and not any(name.startswith(family.prefix) for name in names):
        mapped = strip_prefix(mapped, family.prefix)
        known = {name.removeprefix(family.prefix) for name in known}
    head = untied["head.weight"][0].hf_name
    embed = mapped["embed.weight"].pieces[0].hf_name
    tied = spec.tied_embeddings and {embed, head} <= names and embed != head
    if spec.tied_embeddings and embed not in names and head in names:
        mapped["embed.weight"] = replace(mapped["embed.weight"], pieces=(Piece(head),))
    known |= {name for name in names if family.is_unused(spec, name)}
    check_source(source, mapped.values(), known, IGNORED)
    if tied and "embed.weight" in weights:
        _check_tied(source, embed, head, weights["embed.weight"])
    return mapped


def _check_tied(source: TensorSource, embed: str, head: str, parts: Parts) -> None:
    """Raise where a file has both tensors of a tied pair and they differ (in this process's rows)."""
    same = source.shape(embed) == source.shape(head)
    for box, _ in parts.parts:
        first, last = box.offset[0], box.offset[0] + box.shape[0]
        for start in range(first, last, _COMPARED_ROWS):
            stop = min(start + _COMPARED_ROWS, last)
            same = same and torch.equal(source.rows(embed, start, stop), source.rows(head, start, stop))
    if not same:
        raise CheckpointError(
            f"{source}: config.json says tie_word_embeddings but {embed} and {head} differ; set it to false there"
        )
