"""LoRA (arXiv:2106.09685) on the experts of a mixture: every expert has low-rank matrices of its own.

| layer | lora_a [E, modules * r, in] | lora_b [E, adapted rows, r] |
| --- | --- | --- |
| gate_up, cut by outputs | replicated over etp, gradient partial | cut along the rows |
| down, cut by inputs | cut along `in` | replicated over etp, gradient partial |

Both are cut along the experts by expert parallelism, as the weight is.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatune import ops
from megatune.ops.moe import Groups
from megatune.parallel.expert import GroupedLinear, GroupedLowRank
from megatune.parallel.shard import Fused, ShardSpec, local_shape

if TYPE_CHECKING:
    from megatune.adapters.lora import HfModule

_MASK = 2**31 - 1


class ExpertLora(nn.Module):
    """scale * B[e] A[e] beside each expert's weight of a `GroupedLinear`, which calls it in place of its own product.

    Parameters, always fp32: `lora_a` [experts, parts * rank, in], for each expert the A matrices of its parts one
    after the other; `lora_b` [experts, rows of the parts, rank] in the weight's own row order; of both this process's
    slices. `hf_modules`: the Hugging Face modules that have an adapter: one for each expert and part, or one for all
    experts. `parts`: those of the fused weight that have one, in order, or (None,) for the whole weight. `dropout`
    acts on the adapter's input; the mask depends on the token, the expert and the column, not on the layout.
    """

    def __init__(
        self,
        linear: GroupedLinear,
        name: str,
        modules: tuple[HfModule, ...],
        rank: int,
        scale: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.hf_modules, self.rank, self.scale, self.dropout = modules, rank, scale, dropout
        self.shard, self.cut, self.experts = linear.shard, linear.cut, linear.experts
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.parts = tuple(dict.fromkeys(part for module in modules for part in module.parts))
        self.fused = _of_parts(linear.fused, self.parts)
        # lora_b has the weight's own rows in their order where one module is all of it.
        self._rows = linear.fused if self.fused is None else self.fused
        self.layout = self._layout(linear.fused, linear.out_features)
        self.local_layout = self._layout(linear.local_fused, linear.weight.shape[1])
        self.key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
        options = {"dtype": torch.float32, "device": linear.weight.device}
        a, b = (local_shape(spec, self.cut) for spec in self.shard_specs(""))
        self.lora_a = nn.Parameter(torch.empty(a, **options))
        self.lora_b = nn.Parameter(torch.empty(b, **options))

    def forward(self, x: Tensor, linear: GroupedLinear, groups: Groups) -> Tensor:
        """x [R, in] -> linear(x) + scale * dropout(x) A[e]^T B[e]^T for each row's expert e, [R, out]."""
        dropped = self._drop(x, groups) if self.training and self.dropout else None
        change = GroupedLowRank(self.lora_a, self.lora_b, self.local_layout, self.scale, dropped)
        return linear.product(x, groups, change)

    def _drop(self, x: Tensor, groups: Groups) -> Tensor:
        first_expert = self.cut.ep[0] * self.lora_a.shape[0]
        experts = (groups.expert_of_row + first_expert + 1) * 0x2545F491
        first_column = self.cut.etp[0] * x.shape[1] if self.shard == "row" else 0
        return ops.keyed_dropout(x, self.dropout, self.key, (groups.keys ^ experts) & _MASK, first_column)

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        """The weights' change [n, out, in] in fp32, from whole values of lora_a and lora_b of any n experts."""
        return torch.stack([self.layout.scatter(one_b) for one_b in b.float()]) @ a.float() * self.scale

    def shard_specs(self, name: str) -> list[ShardSpec]:
        """Global shape and slicing of lora_a and lora_b; `name`: the adapter's global name."""
        is_column = self.shard == "column"
        a = (self.experts, self.layout.adapters * self.rank, self.in_features)
        b = (self.experts, self.layout.adapted_rows, self.rank)
        return [
            ShardSpec(f"{name}.lora_a", a, None if is_column else 2, partial=is_column, expert=True),
            ShardSpec(
                f"{name}.lora_b",
                b,
                1 if is_column else None,
                self._rows if is_column else None,
                partial=not is_column,
                expert=True,
            ),
        ]

    def _layout(self, fused: Fused | None, rows: int) -> ops.LoraLayout:
        if self.fused is None:
            return ops.LoraLayout.whole(rows)
        return ops.LoraLayout.of(fused.parts, fused.groups, self.parts)

    def extra_repr(self) -> str:
        targets = ", ".join(dict.fromkeys(module.target for module in self.hf_modules))
        return f"{self.experts} experts, {targets}, rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"


def attach_expert_lora(
    linear: GroupedLinear,
    name: str,
    modules: tuple[HfModule, ...],
    *,
    rank: int,
    scale: float,
    dropout: float,
) -> None:
    """Give the experts' layer `linear`, `name` in the model, adapters for these modules, in place."""
    linear.adapter = ExpertLora(linear, name, modules, rank, scale, dropout)


def _of_parts(fused: Fused | None, parts: tuple[str | None, ...]) -> Fused | None:
    """Row order of one expert's lora_b: the weight's own with only the adapted parts; None: the whole weight is one
    matrix."""
    if fused is None or parts == (None,):
        return None
    return Fused(tuple(item for item in fused.parts if item[0] in parts), fused.groups)
