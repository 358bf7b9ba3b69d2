"""A linear layer with a low-rank adapter (LoRA, arXiv:2106.09685), also on fused weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LoraLayout:
    """Which rows of a (fused) weight the adapter changes.

    The rows are `groups` equal groups; in a group `parts` follow one after the other: (rows in one group, index of
    that part's adapter, or None where the part has none). Adapters are numbered 0, 1, .. in the order of the parts.
    A weight that is not fused is one group with one part: `LoraLayout.whole(rows)`.
    """

    parts: tuple[tuple[int, int | None], ...]
    groups: int = 1

    @classmethod
    def whole(cls, rows: int) -> LoraLayout:
        return cls(((rows, 0),))

    @classmethod
    def of(cls, parts: Iterable[tuple[str, int]], groups: int, targets: Iterable[str]) -> LoraLayout:
        """From `Fused.parts` and `Fused.groups`, with adapters on the parts named in `targets`."""
        parts, targets = tuple(parts), set(targets)
        unknown = targets - {name for name, _ in parts}
        if unknown or not targets:
            raise ValueError(
                f"LoraLayout: targets {sorted(targets)} must be some of {[name for name, _ in parts]}"
            )
        chosen, numbered = 0, []
        for name, rows in parts:
            numbered.append((rows, chosen if name in targets else None))
            chosen += name in targets
        return cls(tuple(numbered), groups)

    @property
    def adapters(self) -> int:
        """Number of parts with an adapter; lora_a is [adapters * r, in]."""
        return sum(index is not None for _, index in self.parts)

    @property
    def rows(self) -> int:
        """Rows of the weight."""
        return self.groups * sum(rows for rows, _ in self.parts)

    @property
    def adapted_rows(self) -> int:
        """Rows of the parts with an adapter; lora_b is [adapted_rows, r]."""
        return self.groups * sum(rows for rows, index in self.parts if index is not None)

    def scatter(self, b: Tensor) -> Tensor:
        """b [adapted_rows, r] -> block matrix [rows, adapters * r] whose product with lora_a is the weight's change."""
        if len(self.parts) == 1:
            return b
        rank = b.shape[1]
        compact = b.view(self.groups, -1, rank)
        block = b.new_zeros(self.groups, self.rows // self.groups, self.adapters, rank)
        for row, source, rows, index in self._slices():
            block[:, row : row + rows, index] = compact[:, source : source + rows]
        return block.view(self.rows, -1)

    def gather(self, block: Tensor) -> Tensor:
        """The reverse of `scatter`: [rows, adapters * r] -> [adapted_rows, r]; entries outside the blocks are dropped."""
        if len(self.parts) == 1:
            return block
        rank = block.shape[1] // self.adapters
        wide = block.view(self.groups, -1, self.adapters, rank)
        pieces = [wide[:, row : row + rows, index] for row, _, rows, index in self._slices()]
        return torch.cat(pieces, 1).reshape(self.adapted_rows, rank)

    def _slices(self) -> list[tuple[int, int, int, int]]:
        """(first row in a group, first row in a group of b, rows, adapter) of each part with an adapter."""
        slices, row, source = [], 0, 0
        for rows, index in self.parts:
            if index is not None:
                slices.append((row, source, rows, index))
                source += rows
            row += rows
        return slices


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    layout: LoraLayout,
    scale: float,
    x_dropped: Tensor | None = None,
) -> Tensor:
    """x @ weight^T + bias + scale * x_dropped @ a^T @ scatter(b)^T.

    x [T, in], weight [out, in], bias [out] or None, a [adapters * r, in], b [adapted_rows, r] -> [T, out] of x's
    dtype. `x_dropped`: x after the adapter's dropout, where there is one (None: x itself). a and b may be fp32 beside
    a bf16 x; products are in x's dtype. ValueError where the shapes do not fit.
    """
    if weight.shape != (layout.rows, x.shape[-1]):
        raise ValueError(
            f"lora_linear: weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}, layout rows {layout.rows}"
        )
    if a.shape[0] % layout.adapters or a.shape[1] != x.shape[-1]:
        raise ValueError(f"lora_linear: a {tuple(a.shape)} must be [{layout.adapters} * rank, {x.shape[-1]}]")
    if b.shape != (layout.adapted_rows, a.shape[0] // layout.adapters):
        raise ValueError(
            f"lora_linear: b {tuple(b.shape)} must be [{layout.adapted_rows}, {a.shape[0] // layout.adapters}]"
        )
    base = F.linear(x, weight, bias)
    low = F.linear(x if x_dropped is None else x_dropped, a.to(x.dtype))
    return base + F.linear(low, layout.scatter(b.to(x.dtype))) * scale
