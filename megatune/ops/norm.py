"""Root-mean-square norm (arXiv:1910.07467) and layer norm (arXiv:1607.06450)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and functions are computed in for tensors of `dtype`: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * (offset + weight) over the last dimension, computed in fp32.

    x [.., H], weight [H] -> [.., H] of x's dtype. With offset 0 the normalised x is rounded to x's dtype before it is
    multiplied by the weight (Llama's order of casts); with another offset it is rounded after (Gemma's).
    ValueError where the shapes do not fit.
    """
    if x.shape[-1:] != weight.shape:
        raise ValueError(
            f"rms_norm: weight has shape {tuple(weight.shape)}, x has last dimension {x.shape[-1]}"
        )
    wide = x.to(accumulate_dtype(x.dtype))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if offset == 0.0:
        return (normed.to(x.dtype) * weight).to(x.dtype)
    return (normed * (offset + weight.to(wide.dtype))).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) * rsqrt(var + eps) * weight + bias over the last dimension, computed in fp32.

    x [.., H], weight and bias [H] -> [.., H] of x's dtype. ValueError where the shapes do not fit.
    """
    if x.shape[-1:] != weight.shape:
        raise ValueError(
            f"layer_norm: weight has shape {tuple(weight.shape)}, x has last dimension {x.shape[-1]}"
        )
    if bias is not None and bias.shape != weight.shape:
        raise ValueError(f"layer_norm: bias has shape {tuple(bias.shape)}, weight {tuple(weight.shape)}")
    bias = None if bias is None else bias.to(x.dtype)
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias, eps)
