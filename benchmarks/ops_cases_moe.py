"""Cases of the op benchmark: routers, tokens to their experts and back, experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.ops_cases import NO_TARGETS, Case, New, Other, Sizes, Tensors, Work, case, halves
from megatune import ops
from megatune.ops import moe


def _order(s: Sizes, new: New) -> moe.Order:
    experts = torch.rand(s.T, s.experts, device=new.device).topk(s.choices).indices
    return moe.sort_by_expert(experts, s.experts)


@case("qwen3-30b-a3b")
def moe_permute(s: Sizes, new: New) -> Case:
    order = _order(s, new)
    tokens = order.tokens
    size = s.T * s.H * new.width
    return Case(
        "moe_permute",
        f"{s.T} x {s.H}, {s.choices} of {s.experts} experts",
        lambda: (new.leaf(s.T, s.H),),
        lambda x: moe.permute(x, order),
        Other(lambda x: x.index_select(0, tokens)),
        Work((1 + s.choices) * size),
        Work((1 + s.choices) * size),
        registry="expert_rows",
    )


@case("qwen3-30b-a3b")
def moe_combine(s: Sizes, new: New) -> Case:
    order = _order(s, new)
    place = order.place

    def plain(rows: Tensor, weights: Tensor) -> Tensor:
        picked = rows.index_select(0, place.flatten()).view(s.T, s.choices, s.H)
        return (picked * weights[:, :, None]).sum(1).to(rows.dtype)

    size = s.T * s.H * new.width
    return Case(
        "moe_combine",
        f"{s.mlp_rows} x {s.H}, {s.choices} of {s.experts} experts",
        lambda: (
            new.leaf(s.mlp_rows, s.H),
            torch.rand(s.T, s.choices, device=new.device).requires_grad_(),
        ),
        lambda rows, weights: moe.combine(rows, weights, order),
        Other(plain),
        Work((1 + s.choices) * size),
        Work((1 + 2 * s.choices) * size),
        registry="expert_rows",
    )


Product = Callable[[Tensor, Tensor, moe.Groups], Tensor]
_PRODUCTS: dict[str, tuple[Product, Product, tuple[str, str, str]]] = {
    # op: (ours, plain, the shapes of both operands: rows x in, rows x out, experts x out x in)
    "grouped_linear": (
        lambda x, weight, groups: moe.grouped_linear(x, weight, None, groups),
        lambda x, weight, groups: torch.cat([x[rows] @ weight[e].t() for e, rows in groups.slices()]),
        ("x", "weight", "NT"),
    ),
    "grouped_input_grad": (
        moe.grouped_input_grad,
        lambda grad, weight, groups: torch.cat([grad[rows] @ weight[e] for e, rows in groups.slices()]),
        ("grad", "weight", "NN"),
    ),
    "grouped_weight_grad": (
        moe.grouped_weight_grad,
        lambda grad, x, groups: torch.stack([grad[rows].t() @ x[rows] for _, rows in groups.slices()]),
        ("grad", "x", "TN"),
    ),
}


@case("qwen3-30b-a3b", variants=_PRODUCTS)
def grouped_product(
    s: Sizes, new: New, op: str, run: Product, plain: Product, operands: tuple[str, str, str]
) -> Case:
    """Each expert's rows with its own matrix; the limit is one product of all rows with one matrix."""
    groups = _order(s, new).groups
    sizes = {"x": (s.mlp_rows, s.H), "grad": (s.mlp_rows, 2 * s.I), "weight": (s.experts, 2 * s.I, s.H)}
    first, second, kind = operands
    m, n, k = {
        "NT": (s.mlp_rows, 2 * s.I, s.H),
        "NN": (s.mlp_rows, s.H, 2 * s.I),
        "TN": (2 * s.I, s.H, s.mlp_rows),
    }[kind]
    return Case(
        op,
        f"{s.mlp_rows} x {s.H} x {2 * s.I}, {s.experts} experts",
        lambda: (new.normal(*sizes[first]), new.normal(*sizes[second], scale=0.02)),
        lambda a, b: run(a, b, groups),
        Other(lambda a, b: plain(a, b, groups)),
        Work(flops=4 * s.mlp_rows * s.H * s.I, products=((kind, m, n, k),)),
        registry="grouped_linear",
        targets=NO_TARGETS,
        compiled=False,
    )


@case("qwen3-30b-a3b")
def router(s: Sizes, new: New) -> Case:
    def plain(logits: Tensor) -> Tensors:
        probabilities = logits.softmax(1)
        weights, _ = probabilities.topk(s.choices, 1)
        return weights / weights.sum(1, keepdim=True), probabilities

    size = 4 * s.T * s.experts
    return Case(
        "router",
        f"{s.T} x {s.experts}, best {s.choices}",
        lambda: (new.normal(s.T, s.experts, dtype=torch.float32).requires_grad_(),),
        lambda logits: ops.route(logits, s.choices)[1:],
        Other(plain),
        Work(2 * size + 12 * s.T * s.choices),
        Work(3 * size + 12 * s.T * s.choices),
        dtype=torch.float32,
    )


@case("qwen3-30b-a3b")
def clamped_glu(s: Sizes, new: New) -> Case:
    """GPT-OSS's gate, at the size of these experts."""

    def plain(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)

    size = s.mlp_rows * s.I * new.width
    return Case(
        "clamped_glu",
        f"{s.mlp_rows} x {s.I}",
        lambda: (new.leaf(s.mlp_rows, 2 * s.I),),
        ops.clamped_glu,
        Other(plain, prepare=lambda leaves: (halves(*leaves),)),
        Work(3 * size),
        Work(5 * size),
    )
