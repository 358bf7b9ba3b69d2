"""Cases of the op benchmark: 8 bit floating point, the quantising and the linear layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops_cases import Case, New, Other, Sizes, Tensors, Work, case
from megatune import ops
from megatune.ops import Fp8Recipe
from megatune.ops.fp8_quantise import (
    BOTH,
    ROWS,
    Quantised,
    Scaling,
    quantise,
    quantise_glu,
    quantise_rms_norm,
)

QUANTISING = (0.80, None)
_SCALES = {
    "rowwise": "a scale a row",
    "blocks": "a scale for 128",
    "tiles": "a scale for 128 x 128",
    "mixed": "a scale for 128, transposed for 128 x 128",
}


def _parts(made: Quantised) -> Tensors:
    return tuple(x for x in (made.codes, made.scales, made.codes_t, made.scales_t) if x.numel())


def _work(rows: int, width: int, read: int, scaling: Scaling, copies: int, new: New) -> Work:
    """`read` numbers for each result; a byte for each code, 4 for each scale, in each copy.

    Two row-wise copies are read for twice: no code can be written before the scales of all rows and columns are known,
    and a matrix of these sizes does not stay on the chip.
    """
    elements, count = rows * width, 2 if copies == BOTH else 1
    read *= 2 if scaling == "rowwise" and copies == BOTH else 1
    scales = {
        "rowwise": rows + (width if copies == BOTH else 0),
        "blocks": count * elements // 128,
        "tiles": count * elements // 128**2,
        "mixed": elements // 128 + elements // 128**2,
    }[scaling]
    return Work(elements * (read * new.width + count) + 4 * scales)


def _shape(rows: int, width: int, scaling: Scaling, copies: int) -> str:
    both = "two copies" if copies == BOTH else "one copy"
    return f"{rows} x {width}, {both}, {_SCALES[scaling]}"


def _make(
    op: str, registry: str, rows: int, width: int, scaling: Scaling, copies: int, new: New,
    make: Callable[[], Tensors], run: Callable[..., Quantised],
) -> Case:  # fmt: skip
    return Case(
        op,
        _shape(rows, width, scaling, copies),
        make,
        lambda *leaves: _parts(run(*leaves)),
        None,
        _work(rows, width, 2 if registry == "fp8_glu" else 1, scaling, copies, new),
        registry=registry,
        targets=QUANTISING,
    )


_KINDS: dict[str, tuple[Any, ...]] = {
    "": ("rowwise", BOTH),
    "_rows": ("rowwise", ROWS),
    "_blocks": ("blocks", BOTH),
    "_blocks_rows": ("blocks", ROWS),
}


@case(
    variants={f"fp8_quantise{kind}": how for kind, how in _KINDS.items()}
    | {"fp8_quantise_mixed": ("mixed", BOTH)}
)
def fp8_quantise(s: Sizes, new: New, op: str, scaling: Scaling, copies: int) -> Case:
    return _make(
        op, "fp8_quantise", s.T, s.H, scaling, copies, new,
        lambda: (new.normal(s.T, s.H),),
        lambda x: quantise(x, scaling, copies=copies),
    )  # fmt: skip


@case(
    "qwen3-30b-a3b",
    "llama-70b-tp8",
    variants={"fp8_quantise_heads": ("rowwise", BOTH), "fp8_quantise_heads_blocks": ("blocks", BOTH)},
)
def fp8_quantise_heads(s: Sizes, new: New, op: str, scaling: Scaling, copies: int) -> Case:
    """What attention gives, the input of its output projection."""
    width = s.Q * s.D
    return _make(
        op, "fp8_quantise", s.T, width, scaling, copies, new,
        lambda: (new.normal(s.T, width),),
        lambda x: quantise(x, scaling, copies=copies),
    )  # fmt: skip


@case(
    "llama-8b",
    "llama-70b-tp8",
    variants={"fp8_quantise_weight": ("rowwise",), "fp8_quantise_weight_tiles": ("tiles",)},
)
def fp8_quantise_weight(s: Sizes, new: New, op: str, scaling: Scaling) -> Case:
    return _make(
        op, "fp8_quantise", 2 * s.I, s.H, scaling, BOTH, new,
        lambda: (new.normal(2 * s.I, s.H, scale=0.02),),
        lambda x: quantise(x, scaling),
    )  # fmt: skip


@case(variants={f"fp8_rms_norm{kind}": how for kind, how in _KINDS.items() if how[1] == BOTH})
def fp8_rms_norm(s: Sizes, new: New, op: str, scaling: Scaling, copies: int) -> Case:
    return _make(
        op, "fp8_rms_norm", s.stream, s.H, scaling, copies, new,
        lambda: (new.normal(s.stream, s.H), new.normal(s.H)),
        lambda x, weight: quantise_rms_norm(x, weight, 1e-5, 0.0, scaling, copies=copies)[0],
    )  # fmt: skip


@case(
    "llama-8b", "llama-70b-tp8", variants={f"fp8_glu{k}": how for k, how in _KINDS.items() if how[1] == BOTH}
)
def fp8_glu(s: Sizes, new: New, op: str, scaling: Scaling, copies: int) -> Case:
    return _make(
        op, "fp8_glu", s.T, s.I, scaling, copies, new,
        lambda: (new.normal(s.T, 2 * s.I),),
        lambda gate_up: quantise_glu(gate_up, "silu", scaling, copies=copies),
    )  # fmt: skip


@case("llama-8b", "llama-70b-tp8", variants={"fp8_linear": ("rowwise",), "fp8_linear_blocks": ("blockwise",)})
def fp8_linear(s: Sizes, new: New, op: str, scaling: str) -> Case:
    """A layer's four, forward and backward with both gradients, weights quantised each time; the limit is the same
    products in bf16, so that a share above one is a gain."""
    recipe = Fp8Recipe(scaling)
    sizes = [(s.H, s.qkv), (s.Q * s.D, s.H), (s.H, 2 * s.I), (s.I, s.H)]

    def all_of(one: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensors]:
        return lambda *leaves: tuple(one(leaves[i], leaves[i + 1]) for i in range(0, len(leaves), 2))

    def make() -> Tensors:
        pairs = [(new.leaf(s.T, inner), new.leaf(outer, inner, scale=inner**-0.5)) for inner, outer in sizes]
        return tuple(x for pair in pairs for x in pair)

    products = [
        product
        for inner, outer in sizes
        for product in (("NT", s.T, outer, inner), ("NN", s.T, inner, outer), ("TN", outer, inner, s.T))
    ]
    return Case(
        op,
        f"{s.T} x " + ", ".join(f"{inner} x {outer}" for inner, outer in sizes),
        make,
        all_of(lambda x, weight: ops.fp8_linear(x, weight, recipe=recipe)),
        Other(all_of(F.linear)),
        Work(flops=sum(6 * s.T * inner * outer for inner, outer in sizes), products=tuple(products)),
        joint=True,
        registry="fp8_mm",
        targets=(1.45, None),
        plain_name="torch eager, bf16",
        compiled=False,
    )
