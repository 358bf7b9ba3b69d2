"""Weights that are quantised alike everywhere: sums of their scales are exact in any order."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

CASES = {
    "fp32": (96, 192, torch.float32),
    "bf16": (80, 256, torch.bfloat16),
    "fp16": (16, 64, torch.float16),
    "rows of one and a half blocks": (57, 96, torch.float32),
    "a part of a block": (7, 90, torch.bfloat16),
    "odd": (3, 33, torch.float32),
}


def golden_weight(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows, columns]: normal, multiples of 2**-14, so that 1000 magnitudes can be added without rounding; with a block
    of zeros and an outlier."""
    values = np.random.RandomState(rows * columns).standard_normal((rows, columns)) * 0.02
    weight = torch.from_numpy(np.round(values * 2**14) / 2**14).to(dtype)
    weight.view(-1)[:64] = 0.0
    weight[-1, -1] = 0.25
    return weight
