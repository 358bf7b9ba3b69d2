"""Rotary tables: cos and sin of every token's angles, for every kind of scaling; equal to transformers'."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from megatune.models.spec import RopeSpec


@dataclass(frozen=True)
class Rotary:
    """cos and sin, fp32 [T, dim/2], of one rotary embedding.

    An object rather than a pair, so that mixed-precision wrappers, which cast the tensors among a layer's inputs,
    leave it in fp32.
    """

    cos: Tensor
    sin: Tensor


def rotary(rope: RopeSpec, positions: Tensor, lengths: tuple[int, ...], rows: Tensor | None = None) -> Rotary:
    """Tables for tokens at `positions` (int64 [T]) of documents of `lengths` tokens; `rows`: which tokens of the whole
    stream these are (None: all of it).

    The lengths decide between LongRoPE's short and long factors, document by document, so that packing changes
    nothing.
    """
    angles = positions.float()[:, None] * _frequencies(rope, lengths, positions.device, rows)
    return Rotary(angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor)


def _frequencies(
    rope: RopeSpec, lengths: tuple[int, ...], device: torch.device, rows: Tensor | None
) -> Tensor:
    """fp32 [dim/2], or [T, dim/2] where documents differ."""
    is_long = [rope.scaling == "longrope" and length > rope.original_max_positions for length in lengths]
    if len(set(is_long)) < 2:
        frequencies = torch.tensor(inverse_frequencies(rope, any(is_long)))
    else:
        both = torch.tensor([inverse_frequencies(rope, False), inverse_frequencies(rope, True)])
        frequencies = both[torch.tensor(is_long).long().repeat_interleave(torch.tensor(lengths))]
    # non_blocking: a plain copy would make the host wait for all work that is queued on the device.
    frequencies = frequencies.to(device, non_blocking=True)
    return frequencies if rows is None or frequencies.dim() == 1 else frequencies.index_select(0, rows)


@lru_cache(maxsize=64)
def inverse_frequencies(rope: RopeSpec, long: bool = False) -> tuple[float, ...]:
    """Radians a position, for each rotated pair: fp32 values, computed on the CPU so that all devices agree.

    `long`: LongRoPE's long factors instead of the short ones.
    """
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.int64, device="cpu").float() / rope.dim
    wavelengths = rope.theta**exponents
    if rope.scaling == "longrope":
        factors = rope.long_factors if long else rope.short_factors
        frequencies = 1.0 / (torch.tensor(factors, dtype=torch.float32, device="cpu") * wavelengths)
    elif rope.scaling == "linear":
        frequencies = (1.0 / wavelengths) / rope.factor
    elif rope.scaling == "llama3":
        frequencies = _llama3(rope, 1.0 / wavelengths)
    elif rope.scaling == "yarn":
        frequencies = _yarn(rope, wavelengths)
    else:
        frequencies = 1.0 / wavelengths
    return tuple(frequencies.tolist())


def _llama3(rope: RopeSpec, frequencies: Tensor) -> Tensor:
    """Llama 3.1: high frequencies stay, low ones are divided by `factor`, those between are blended."""
    turns = rope.original_max_positions * frequencies / (2 * math.pi)  # within the original context
    share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    share = share.clamp(0, 1)
    return (1 - share) * frequencies / rope.factor + share * frequencies


def _yarn(rope: RopeSpec, wavelengths: Tensor) -> Tensor:
    """YaRN (arXiv:2309.00071), "NTK-by-parts": a ramp over dimensions from extrapolation to interpolation."""

    def dimension(turns: float) -> float:
        """The pair that makes this many turns within the original context."""
        ratio = rope.original_max_positions / (turns * 2 * math.pi)
        return rope.dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001  # a step, not a division by zero
    pairs = torch.arange(rope.dim // 2, dtype=torch.float32, device="cpu")
    interpolated = ((pairs - low) / (high - low)).clamp(0, 1)
    return (1.0 / (rope.factor * wavelengths)) * interpolated + (1.0 / wavelengths) * (1 - interpolated)
