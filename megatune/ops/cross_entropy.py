"""Head projection and cross-entropy in one op: the logits of all tokens never exist at once."""

from __future__ import annotations

import torch
from torch import Tensor

from megatune.ops.norm import accumulate_dtype


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, softcap: float | None = None, chunk: int = 1024
) -> Tensor:
    """Sum over rows of -log softmax(cap(hidden @ weight^T))[label].

    hidden [S, H] (the scored rows only), weight [V, H], labels int64 [S] -> scalar, fp32 (fp64 for fp64 inputs).
    Products in hidden's dtype, softmax in fp32. `softcap`: logits become cap * tanh(logit / cap).
    `chunk`: rows whose logits exist at the same time. ValueError where shapes or dtypes do not fit.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [S, H], [V, H]"
        )
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"linear_cross_entropy: labels must be int64 [{hidden.shape[0]}], got {labels.dtype} {tuple(labels.shape)}"
        )
    wide = accumulate_dtype(hidden.dtype)
    loss = hidden.new_zeros((), dtype=wide)
    weight = weight.to(hidden.dtype)
    for rows, row_labels in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        logits = (rows @ weight.t()).to(wide)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        target = logits.gather(1, row_labels[:, None]).squeeze(1)
        loss = loss + (torch.logsumexp(logits, 1) - target).sum()
    return loss
