"""Hugging Face tensors to ours and back: a permutation of rows, a stack of experts, and nothing more.

These helpers work on whole tensors; the checkpoint room streams slices with `fuse_parts` and `split_parts`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatune.errors import CheckpointError
from megatune.models.families.base import Family, Piece
from megatune.models.layout import shard_specs
from megatune.models.spec import DecoderSpec
from megatune.parallel.shard import Fused


def fuse_parts(fused: Fused, parts: Mapping[str, Tensor]) -> Tensor:
    """Whole groups of a fused tensor from its parts: each [groups * part_rows, ...] -> [groups * group_rows, ...].

    Any number of groups (all parts the same): contiguous slices of the parts give a contiguous slice of the whole.
    """
    grouped = [parts[name].unflatten(0, (-1, rows)) for name, rows in fused.parts]
    return torch.cat(grouped, 1).flatten(0, 1)


def split_parts(fused: Fused, tensor: Tensor) -> dict[str, Tensor]:
    """The inverse of `fuse_parts`."""
    grouped = tensor.unflatten(0, (-1, fused.group_rows))
    return {name: grouped[:, start : start + rows].flatten(0, 1) for name, start, rows in fused.offsets()}


def from_hf_state(spec: DecoderSpec, family: Family, hf: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from a Hugging Face one, dtypes kept. Raises CheckpointError for a missing or odd tensor."""
    specs, ours = shard_specs(spec), {}
    for name, pieces in family.name_map(spec).items():
        one = specs[name]
        if pieces[0].expert is None:
            ours[name] = _matrix(hf, pieces, one.fused, one.shape, one.expert)
        else:
            experts = _by_expert(pieces)
            ours[name] = torch.stack(
                [_matrix(hf, experts[expert], one.fused, one.shape[1:]) for expert in range(one.shape[0])]
            )
        if tuple(ours[name].shape) != one.shape:
            raise CheckpointError(
                f"{pieces[0].hf_name}: shape does not fit config.json (as {name} it has {tuple(ours[name].shape)}, "
                f"{one.shape} is expected); take weights and config from one model"
            )
    return ours


def to_hf_state(spec: DecoderSpec, family: Family, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The Hugging Face state dict of ours, dtypes kept; a tied head is left out, as its files leave it out."""
    specs, rows = shard_specs(spec), {}
    for name, pieces in family.name_map(spec).items():
        fused = specs[name].fused
        for expert, found in _by_expert(pieces).items():
            tensor = ours[name] if expert is None else ours[name][expert]
            parts = {None: tensor} if found[0].part is None else split_parts(fused, tensor)
            for piece in found:
                at = rows.setdefault((piece.hf_name, piece.transpose), [])
                at.append((piece.first_row, parts[piece.part]))
    state = {}
    for (hf_name, transpose), found in rows.items():
        whole = torch.cat([part for _, part in sorted(found, key=lambda item: item[0])])
        state[hf_name] = whole.transpose(-1, -2).contiguous() if transpose else whole
    return state


def _by_expert(pieces: Sequence[Piece]) -> dict[int | None, list[Piece]]:
    found: dict[int | None, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(piece.expert, []).append(piece)
    return found


def _matrix(
    hf: Mapping[str, Tensor],
    pieces: Sequence[Piece],
    fused: Fused | None,
    shape: tuple[int, ...],
    stacked: bool = False,
) -> Tensor:
    """One tensor of ours, or one expert of it, from its pieces; a `stacked` one comes from one piece."""
    if stacked or pieces[0].part is None:
        return _rows(hf, pieces[0], None, shape[0])
    return fuse_parts(fused, {piece.part: _rows(hf, piece, fused, shape[0]) for piece in pieces})


def _rows(hf: Mapping[str, Tensor], piece: Piece, fused: Fused | None, rows: int) -> Tensor:
    if piece.hf_name not in hf:
        raise CheckpointError(
            f"tensor {piece.hf_name} is missing; the checkpoint is incomplete or of another model"
        )
    tensor = hf[piece.hf_name]
    tensor = tensor.transpose(-1, -2) if piece.transpose else tensor
    if piece.part is not None:
        rows = fused.groups * fused.part_rows(piece.part)
    if tensor.shape[0] < piece.first_row + rows:
        raise CheckpointError(
            f"tensor {piece.hf_name} has {tensor.shape[0]} rows, {piece.first_row + rows} are needed; take weights "
            "and config from one model"
        )
    return tensor[piece.first_row : piece.first_row + rows] if piece.part is not None else tensor
