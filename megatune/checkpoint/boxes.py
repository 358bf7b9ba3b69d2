"""Which part of a global tensor a process holds: boxes of any number of dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from megatune.errors import CheckpointError
from megatune.parallel.shard import Box


@dataclass(frozen=True)
class Local:
    """What this process holds of a global tensor: `tensor` fills `box`. `is_first_replica`: of the processes that
    hold the same box, this one writes it. `is_shared`: a plain tensor, the same on all processes."""

    tensor: Tensor
    box: Box
    global_shape: tuple[int, ...]
    is_first_replica: bool
    is_shared: bool


def local_part(name: str, tensor: Tensor) -> Local | None:
    """This process's part of `tensor`; None where it is not in the tensor's mesh.

    Several mesh dimensions may cut one tensor dimension (outer first), unevenly, to empty parts even: each cut is
    torch.chunk's, ceil(n / parts) rows a part. Raises CheckpointError for a partial sum or an interleaved sharding.
    """
    if not isinstance(tensor, DTensor):
        whole = Box((0,) * tensor.ndim, tuple(tensor.shape))
        return Local(tensor.detach(), whole, tuple(tensor.shape), True, True)
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    offset, shape, is_first = [0] * tensor.ndim, list(tensor.shape), True
    for mesh_dim, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            is_first = is_first and coordinate[mesh_dim] == 0
        elif type(placement) is Shard:
            dim = placement.dim % max(1, tensor.ndim)
            part = -(-shape[dim] // mesh.size(mesh_dim))
            start = min(coordinate[mesh_dim] * part, shape[dim])
            offset[dim] += start
            shape[dim] = min(part, shape[dim] - start)
        else:
            raise CheckpointError(
                f"{name}: placement {placement} cannot be saved or loaded; use Shard or Replicate"
            )
    local = tensor.detach().to_local()
    box = Box(tuple(offset), tuple(shape))
    if box.numel != local.numel() or (box.numel and box.shape != tuple(local.shape)):
        raise CheckpointError(
            f"{name}: this process holds {tuple(local.shape)} where its placement {tensor.placements} says {box.shape}"
        )
    return Local(local, box, tuple(tensor.shape), is_first, False)


def tile_exactly(boxes: Sequence[Box], shape: tuple[int, ...]) -> bool:
    """Whether the boxes cover every element of a tensor of this shape once (empty boxes count for nothing)."""
    boxes = [box for box in boxes if box.numel]
    if sum(box.numel for box in boxes) != math.prod(shape):
        return False
    if any(o < 0 or o + n > s for box in boxes for o, n, s in zip(box.offset, box.shape, shape, strict=True)):
        return False
    # A grid (each dimension cut at the same places everywhere) is proved in linear time; anything else pairwise.
    cuts = [sorted({(box.offset[d], box.shape[d]) for box in boxes}) for d in range(len(shape))]
    is_grid = all(a + n == b for dim in cuts for (a, n), (b, _) in pairwise(dim))
    if is_grid and len(set(boxes)) == len(boxes) == math.prod(len(dim) for dim in cuts):
        return True
    return all(a & b is None for a, b in combinations(boxes, 2))
