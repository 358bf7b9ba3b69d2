"""Checks that ops share: each raises ValueError naming the op and the argument."""

from __future__ import annotations

import torch
from torch import Tensor


def same_device(op: str, x: Tensor, **others: Tensor | None) -> None:
    """Every tensor must be where the first one is."""
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise ValueError(f"{op}: {name} is on {other.device}, the first argument on {x.device}")


def floating(op: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{op}: {name} must be floating point, got {tensor.dtype}")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and functions are computed in for tensors of `dtype`: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
