"""Weights into a model: each rank reads only the rows that it keeps."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
from torch import Tensor, nn

from megatune.checkpoint.boxes import local_part
from megatune.checkpoint.mapping import Mapped, check_source, fill, strip_prefix
from megatune.checkpoint.resolve import ModelFolder
from megatune.checkpoint.sources import TensorSource
from megatune.errors import CheckpointError
from megatune.models.families.base import Family, Piece
from megatune.models.layout import shard_specs
from megatune.models.registry import family_named
from megatune.models.spec import DecoderSpec

# Buffers that old versions of transformers saved beside the weights.
IGNORED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
_COMPARED_ROWS = 4096


def base_map(model: nn.Module) -> dict[str, Mapped]:
    """Each base parameter that `model` (a `Decoder`, whole or a pipeline stage) has, in a Hugging Face checkpoint."""
    pieces, specs = family_named(model.spec.family).name_map(model.spec), shard_specs(model.spec)
    names = [name for name, _ in model.named_parameters() if ".adapter." not in name]
    return {name: Mapped(specs[name].shape, tuple(pieces[name]), specs[name].fused) for name in names}


def load_pretrained(
    model: nn.Module, folder: ModelFolder, *, device: torch.device | str, seed: int = 0
) -> None:
    """Give `model`, which is on meta and may be sharded, memory on `device` and its weights, in place.

    Parameters keep their dtypes. Every rank calls it and reads the rows that it keeps, in portions: beside the model,
    host memory holds tens of megabytes. Adapters start as in PEFT (A Kaiming uniform, B zero) from `seed` and the
    parameter's name alone, so they are the same under every layout. Raises CheckpointError before anything is loaded
    where the weights are incomplete or do not fit the model.
    """
    source = folder.tensors()
    mapped = _resolve(model, source, folder.family)
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            init_adapter(name, parameter, seed)
        else:
            fill(name, parameter, mapped[name], source)


@torch.no_grad()
def init_adapter(name: str, parameter: Tensor, seed: int) -> None:
    """Initial value of one adapter parameter: uniform in +-1/sqrt(in) for lora_a (Kaiming uniform with a = sqrt(5)),
    zero for lora_b. Drawn for the global tensor, then sliced."""
    part = local_part(name, parameter)
    if part is None or part.box.numel == 0:
        return
    if not name.endswith("lora_a"):
        part.tensor.zero_()
        return
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    bound = parameter.shape[1] ** -0.5
    whole = torch.empty(parameter.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
    held = tuple(slice(o, o + n) for o, n in zip(part.box.offset, part.box.shape, strict=True))
    part.tensor.copy_(whole[held])


def _resolve(model: nn.Module, source: TensorSource, family: Family) -> dict[str, Mapped]:
    """The map for this file's names, checked: names without the prefix and either name of a tied embedding are fine."""
    mapped = base_map(model)
    spec: DecoderSpec = model.spec
    untied = family.name_map(replace(spec, tied_embeddings=False))
    known = {piece.hf_name for pieces in untied.values() for piece in pieces}
    names = source.names()
    if family.prefix and not any(name.startswith(family.prefix) for name in names):
        mapped = strip_prefix(mapped, family.prefix)
        known = {name.removeprefix(family.prefix) for name in known}
    head = untied["head.weight"][0].hf_name
    embed = mapped["embed.weight"].pieces[0].hf_name if "embed.weight" in mapped else head
    tied = spec.tied_embeddings and {embed, head} <= names and embed != head
    if spec.tied_embeddings and embed not in names and head in names:
        mapped["embed.weight"] = replace(mapped["embed.weight"], pieces=(Piece(head),))
    check_source(source, mapped.values(), known, IGNORED)
    if tied:
        _check_tied(source, embed, head, model.get_parameter("embed.weight"))
    return mapped


def _check_tied(source: TensorSource, embed: str, head: str, parameter: Tensor) -> None:
    """Raise where a file has both tensors of a tied pair and they differ (in this rank's rows)."""
    part = local_part("embed.weight", parameter)
    same, first, last = source.shape(embed) == source.shape(head), 0, 0
    if part is not None:
        first, last = part.box.offset[0], part.box.offset[0] + part.box.shape[0]
    for start in range(first, last, _COMPARED_ROWS):
        stop = min(start + _COMPARED_ROWS, last)
        same = same and torch.equal(source.rows(embed, start, stop), source.rows(head, start, stop))
    if not same:
        raise CheckpointError(
            f"{source}: config.json says tie_word_embeddings but {embed} and {head} differ; set it to false there"
        )
