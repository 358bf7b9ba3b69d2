"""Each op is as near to fp64 as plain PyTorch in the same dtype, outputs and gradients: the formulas of transformers'
models, which round between their steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatune import ops
from megatune.ops import moe
from megatune.ops.checks import accumulate_dtype
from tests.helpers.ops import need_body, relative_error
from tests.ops.bodies import DTYPES, bodies

ROWS, WIDTH, VOCAB, GROUPS, QUERIES, HEAD = 70, 512, 1600, 2, 3, 64
EXPERTS, CHOICES = 8, 4
# Two that round equally often differ by chance. Sums of fp32 numbers, made in another order than PyTorch's, may be four
# units in the last place off.
CHANCE, LAST_PLACES = 1.02, 2.0**-23
Function = Callable[..., tuple[Tensor, ...]]


class Case(NamedTuple):
    op: str  # of the registry
    inputs: tuple[Tensor, ...]
    ours: Function
    plain: Function  # in any dtype


def wide(x: Tensor) -> Tensor:
    return x.to(accumulate_dtype(x.dtype))


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    high = wide(x)
    return weight * (high * torch.rsqrt(high.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def plain_gemma_norm(x: Tensor, weight: Tensor) -> Tensor:
    high = wide(x)
    return (high * torch.rsqrt(high.square().mean(-1, keepdim=True) + 1e-5) * (1 + wide(weight))).to(x.dtype)


def norms() -> dict[str, Case]:
    x, weight, other = torch.randn(ROWS, WIDTH), torch.randn(WIDTH), torch.randn(ROWS, WIDTH)
    return {
        "rms_norm": Case(
            "rms_norm",
            (x, weight),
            lambda x, weight: (ops.rms_norm(x, weight, 1e-5),),
            lambda x, weight: (plain_norm(x, weight),),
        ),
        "rms_norm with 1 + weight": Case(
            "rms_norm",
            (x, weight),
            lambda x, weight: (ops.rms_norm(x, weight, 1e-5, 1.0),),
            lambda x, weight: (plain_gemma_norm(x, weight),),
        ),
        "add_rms_norm": Case(
            "add_rms_norm",
            (x, other, weight),
            lambda x, other, weight: ops.add_rms_norm(x, other, weight, 1e-5),
            lambda x, other, weight: (x + other, plain_norm(x + other, weight)),
        ),
    }


def rotations() -> dict[str, Case]:
    angle = torch.rand(ROWS, 1, HEAD // 2, dtype=torch.float64) * 100

    def turned(x: Tensor) -> Tensor:
        cos, sin = (torch.cat((part, part), -1).to(x) for part in (angle.cos(), angle.sin()))
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    def factors(x: Tensor) -> tuple[Tensor, Tensor]:
        return angle[:, 0].cos().float().to(x.device), angle[:, 0].sin().float().to(x.device)

    def plain(qkv: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        q, k = qkv[:, :, :QUERIES], qkv[:, :, QUERIES : QUERIES + 1]
        if weights:
            q, k = plain_norm(q, weights[0]), plain_norm(k, weights[1])
        q, k = (turned(x.flatten(1, 2)).unflatten(1, (GROUPS, -1)) for x in (q, k))
        return q, k[:, :, 0]

    qkv, q_weight, k_weight = (
        torch.randn(ROWS, GROUPS, QUERIES + 2, HEAD),
        torch.randn(HEAD),
        torch.randn(HEAD),
    )
    return {
        "rope": Case(
            "rope",
            (qkv,),
            lambda qkv: ops.rope(qkv[:, :, :QUERIES], qkv[:, :, QUERIES], *factors(qkv)),
            plain,
        ),
        "rope_qk with norms": Case(
            "rope_qk",
            (qkv, q_weight, k_weight),
            lambda qkv, *weights: ops.rope_qk(qkv, *factors(qkv), *weights, 1e-5)[:2],
            plain,
        ),
    }


def units() -> dict[str, Case]:
    def plain(x: Tensor, activation: str) -> tuple[Tensor]:
        gate, up = x[:, 0::2], x[:, 1::2]
        return ((F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up,)

    return {
        f"glu, {activation}": Case(
            "glu",
            (torch.randn(ROWS, 2 * WIDTH),),
            lambda x, activation=activation: (ops.glu(x, activation),),
            lambda x, activation=activation: plain(x, activation),
        )
        for activation in ("silu", "gelu_tanh")
    }


def heads() -> dict[str, Case]:
    labels = torch.randint(VOCAB, (ROWS,))

    def plain(logits: Tensor) -> tuple[Tensor]:
        return (F.cross_entropy(wide(logits), labels.to(logits.device), reduction="sum"),)

    def fused(hidden: Tensor, weight: Tensor) -> tuple[Tensor]:
        # On a CPU, PyTorch has no product of 16 bit numbers that is added to fp32: each chunk's is rounded.
        chunk = 32 if hidden.is_cuda else None
        return (ops.linear_cross_entropy(hidden, weight, labels.to(hidden.device), chunk=chunk),)

    return {
        "cross_entropy": Case(
            "linear_cross_entropy",
            (3 * torch.randn(ROWS, VOCAB),),
            lambda logits: (ops.cross_entropy(logits.view_as(logits), labels.to(logits.device)),),
            plain,
        ),
        "linear_cross_entropy": Case(
            "linear_cross_entropy",
            (torch.randn(ROWS, WIDTH), 0.05 * torch.randn(VOCAB, WIDTH)),
            fused,
            lambda hidden, weight: plain(hidden @ weight.t()),
        ),
    }


def rows_of_tables() -> dict[str, Case]:
    tokens = torch.randint(9, (ROWS,))  # each of them often
    chosen = torch.stack([torch.randperm(EXPERTS)[:CHOICES] for _ in range(ROWS)])

    def order(x: Tensor) -> moe.Order:
        return moe.sort_by_expert(chosen.to(x.device), EXPERTS)

    def plain_combine(rows: Tensor, weights: Tensor) -> tuple[Tensor]:
        picked = rows.index_select(0, order(rows).place.flatten()).view(ROWS, CHOICES, WIDTH)
        return ((picked * weights[:, :, None]).sum(1),)

    return {
        "embedding": Case(
            "embedding",
            (torch.randn(12, WIDTH),),
            lambda table: (ops.embedding(tokens.to(table.device), table),),
            lambda table: (F.embedding(tokens.to(table.device), table),),
        ),
        "permute": Case(
            "expert_rows",
            (torch.randn(ROWS, WIDTH),),
            lambda x: (moe.permute(x, order(x)),),
            lambda x: (x.index_select(0, order(x).tokens),),
        ),
        "combine": Case(
            "expert_rows",
            (torch.randn(ROWS * CHOICES, WIDTH), torch.rand(ROWS, CHOICES)),
            lambda rows, weights: (moe.combine(rows, weights.float(), order(rows)),),
            plain_combine,
        ),
    }


def all_cases() -> dict[str, Case]:
    torch.manual_seed(0)
    return {**norms(), **rotations(), **units(), **heads(), **rows_of_tables()}


NAMES = {name: case.op for name, case in all_cases().items()}


def results(function: Function, inputs: tuple[Tensor, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Outputs, and the inputs' gradients for numbers of 16 bits that are always the same (of a loss: 1)."""
    leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
    outputs = function(*leaves)
    seed = torch.Generator().manual_seed(1)
    grads = [
        torch.ones_like(y) if y.dim() == 0 else torch.randn(y.shape, generator=seed).bfloat16().to(y)
        for y in outputs
    ]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, grads)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "body", "device"),
    [
        pytest.param(name, *found.values, id=f"{name}-{found.id}", marks=found.marks)
        for name, op in NAMES.items()
        for found in bodies(op)
        if found.values[0] != "compiled"  # the same formulas as "reference"
    ],
)
def test_errors_are_at_most_those_of_plain_pytorch(
    name: str, body: str, device: str, dtype: torch.dtype
) -> None:
    case = all_cases()[name]
    need_body(case.op, body, dtype, device)
    inputs = tuple(x.to(dtype) for x in case.inputs)
    truth = results(case.plain, inputs, torch.float64, "cpu")
    plain = results(case.plain, inputs, dtype, device)
    ops.configure({case.op: body}, device)
    found = results(case.ours, inputs, dtype, device)
    for number, (mine, other, exact) in enumerate(zip(found, plain, truth, strict=True)):
        mine_off, other_off = relative_error(mine, exact), relative_error(other, exact)
        assert mine_off <= CHANCE * other_off + LAST_PLACES, f"result {number}: {mine_off}, plain {other_off}"
