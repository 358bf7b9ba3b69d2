"""Rotary position embedding (RoFormer, arXiv:2104.09864), half-split as in Hugging Face."""

from __future__ import annotations

import torch
from torch import Tensor

from megatune.ops.norm import accumulate_dtype


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + dim/2]) of each head by the angle of its token.

    x [T, .., D] with any number of head dimensions and any strides, cos and sin fp32 [T, dim/2] with dim <= D
    (the other D - dim dimensions pass through) -> contiguous [T, .., D] of x's dtype; computed in fp32.
    ValueError where the shapes do not fit.
    """
    half = cos.shape[-1]
    if cos.shape != sin.shape or cos.dim() != 2:
        raise ValueError(
            f"rope: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must both be [tokens, dim/2]"
        )
    if x.shape[0] != cos.shape[0] or 2 * half > x.shape[-1]:
        raise ValueError(f"rope: cos {tuple(cos.shape)} does not fit x {tuple(x.shape)}")
    wide = accumulate_dtype(x.dtype)
    shape = (cos.shape[0],) + (1,) * (x.dim() - 2) + (half,)
    cos, sin = cos.view(shape).to(wide), sin.view(shape).to(wide)
    first, second = x[..., :half].to(wide), x[..., half : 2 * half].to(wide)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
    return rotated if 2 * half == x.shape[-1] else torch.cat((rotated, x[..., 2 * half :]), -1)
