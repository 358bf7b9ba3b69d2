"""Collectives of one tensor in and one out. torch 2.13 has given them other names and warns about those of 2.11."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


def all_gather(
    out: Tensor, x: Tensor, *, group: dist.ProcessGroup | None, async_op: bool = False
) -> dist.Work | None:
    """out [n * rows, ..]: every process's x [rows, ..], in order."""
    return getattr(dist, _GATHER)(out, x, group=group, async_op=async_op)


def reduce_scatter(
    out: Tensor, x: Tensor, *, group: dist.ProcessGroup | None, async_op: bool = False
) -> dist.Work | None:
    """out [rows, ..]: this process's rows of the sum of every process's x [n * rows, ..]."""
    return getattr(dist, _SCATTER)(out, x, group=group, async_op=async_op)
