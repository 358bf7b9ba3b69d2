"""Each op is as near to fp64 as plain PyTorch in the same dtype, outputs and gradients: the formulas of transformers'
models, which round between their steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from megatune import ops
from megatune.ops import moe
from megatune.ops.checks import accumulate_dtype
from megatune.ops.cross_entropy_rows import SPLIT_OP
from megatune.ops.router import SCORES
from megatune.parallel.expert import GroupedLinear
from tests.helpers.ops import need_body, relative_error
from tests.ops.bodies import DTYPES, bodies

ROWS, WIDTH, VOCAB, GROUPS, QUERIES, HEAD = 70, 512, 1600, 2, 3, 64
EXPERTS, CHOICES = 8, 4
# Two that round equally often differ by chance; and in fp32, where sums are made in another order than PyTorch's, by as
# much as one correctly rounded number is off at most: half a unit in the last place.
CHANCE, HALF_UNIT = 1.02, 2.0**-24
# A loss of logits of 16 bits, of which a product in chunks rounds some otherwise than one product of all: that is one
# number, in which chance has nothing to average over. (What rounds logits to 16 bits costs more.)
CHANCE_OF_ONE = 5e-7
MANY = 16384  # rows: of sums over them, the longest here
# Ops whose body "compiled" is not the formulas of "reference", which have a turn here.
OWN_FORMULAS = ("linear_cross_entropy", "glu", "rope")
Function = Callable[..., tuple[Tensor, ...]]


class Case(NamedTuple):
    op: str | None  # of the registry; None: it has one body, made of PyTorch's operations
    inputs: tuple[Tensor, ...]
    ours: Function
    plain: Function  # in any dtype
    dtypes: Sequence[torch.dtype] = DTYPES
    alone: float = HALF_UNIT  # what a loss, one fp32 number, may be off beside, of numbers of 16 bits


class SplitCrossEntropy(torch.autograd.Function):
    """What two processes with a part of the vocabulary each compute."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor) -> Tensor:
        sums, join, grad = SPLIT_OP.pick(logits.device.type, logits.dtype).run
        cut, size = logits.shape[1] // 3, logits.shape[1]
        parts = {0: logits[:, :cut].clone(), cut: logits[:, cut:].clone()}
        both = torch.stack([sums(part, labels, first, size, 0.0) for first, part in parts.items()])
        losses, joined = join(both, labels, size)
        for first, part in parts.items():
            grad(part, labels, first, size, 0.0, joined)
        ctx.save_for_backward(torch.cat(tuple(parts.values()), 1))
        return losses.double().sum().to(losses.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * grad, None


def wide(x: Tensor) -> Tensor:
    return x.to(accumulate_dtype(x.dtype))


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    high = wide(x)
    return weight * (high * torch.rsqrt(high.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def plain_gemma_norm(x: Tensor, weight: Tensor) -> Tensor:
    high = wide(x)
    return (high * torch.rsqrt(high.square().mean(-1, keepdim=True) + 1e-5) * (1 + wide(weight))).to(x.dtype)


def norms(rows: int = ROWS, width: int = WIDTH) -> dict[str, Case]:
    x, weight, other = torch.randn(rows, width), torch.randn(width), torch.randn(rows, width)
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


def rotations(rows: int = ROWS) -> dict[str, Case]:
    angle = torch.rand(rows, 1, HEAD // 2, dtype=torch.float64) * 100

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
        torch.randn(rows, GROUPS, QUERIES + 2, HEAD),
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

    def plain_clamped(x: Tensor) -> tuple[Tensor]:
        gate, up = x[:, 0::2].clamp(max=7.0), x[:, 1::2].clamp(-7.0, 7.0)
        return ((up + 1) * (gate * torch.sigmoid(gate * 1.702)),)

    clamped = Case(
        "clamped_glu", (3 * torch.randn(ROWS, 2 * WIDTH),), lambda x: (ops.clamped_glu(x),), plain_clamped
    )
    return {
        "clamped_glu": clamped,
        **{
            f"glu, {activation}": Case(
                "glu",
                (torch.randn(ROWS, 2 * WIDTH),),
                lambda x, activation=activation: (ops.glu(x, activation),),
                lambda x, activation=activation: plain(x, activation),
            )
            for activation in ("silu", "gelu_tanh")
        },
    }


def losses() -> dict[str, Case]:
    labels, few = torch.randint(VOCAB, (ROWS,)), 16

    def capped(x: Tensor) -> Tensor:
        return 30 * torch.tanh(x / 30)

    def plain(
        logits: Tensor, cap: bool = False, z_loss: float = 0.0, smoothing: float = 0.0
    ) -> tuple[Tensor]:
        scores, target = wide(logits), labels[: logits.shape[0]].to(logits.device)
        if cap:
            scores = capped(scores)
        loss = F.cross_entropy(scores, target, reduction="sum", label_smoothing=smoothing)
        return (loss + z_loss * scores.logsumexp(1).square().sum() if z_loss else loss,)

    def case(logits: Tensor, cap: bool = False, z_loss: float = 0.0, smoothing: float = 0.0) -> Case:
        def ours(logits: Tensor) -> tuple[Tensor]:
            target = labels[: logits.shape[0]].to(logits.device)
            more = {"softcap": 30.0 if cap else None, "z_loss": z_loss, "label_smoothing": smoothing}
            return (ops.cross_entropy(logits.view_as(logits), target, **more),)

        return Case(
            "linear_cross_entropy", (logits,), ours, lambda logits: plain(logits, cap, z_loss, smoothing)
        )

    def split(logits: Tensor) -> Case:
        return Case(
            "split_cross_entropy",
            (logits,),
            lambda logits: (SplitCrossEntropy.apply(logits, labels.to(logits.device)),),
            plain,
        )

    logits = torch.randn(ROWS, VOCAB)
    return {
        "cross_entropy": case(3 * logits),
        "cross_entropy, far apart": case(10 * logits),
        "cross_entropy, far from 0": case(3 * logits + 50),
        "cross_entropy, capped": case(10 * logits, cap=True),
        "cross_entropy, capped all": case(logits + 100, cap=True),
        "cross_entropy, smoothing": case(3 * logits, smoothing=0.1),
        "cross_entropy, z-loss": case(5 * torch.randn(few, 2**15), z_loss=1e-2),
        "split_cross_entropy": split(3 * logits),
        "split_cross_entropy, far apart": split(10 * logits),
        "split_cross_entropy, far from 0": split(3 * logits + 50),
    }


def heads(rows: int = ROWS, width: int = WIDTH, vocab: int = VOCAB, chunk: int = 32) -> dict[str, Case]:
    labels = torch.randint(vocab, (rows,))

    def plain(hidden: Tensor, weight: Tensor) -> tuple[Tensor]:
        return (F.cross_entropy(wide(hidden @ weight.t()), labels.to(hidden.device), reduction="sum"),)

    def fused(hidden: Tensor, weight: Tensor) -> tuple[Tensor]:
        # On a CPU, PyTorch has no product of 16 bit numbers that is added to fp32: each chunk's is rounded.
        part = chunk if hidden.is_cuda or hidden.dtype == torch.float32 else None
        return (ops.linear_cross_entropy(hidden, weight, labels.to(hidden.device), chunk=part),)

    inputs = torch.randn(rows, width), 0.05 * torch.randn(vocab, width)
    return {"linear_cross_entropy": Case("linear_cross_entropy", inputs, fused, plain, alone=CHANCE_OF_ONE)}


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


def routers() -> dict[str, Case]:
    """Logits are fp32 whatever the model's dtype."""

    def plain(logits: Tensor, score: str) -> tuple[Tensor]:
        chosen = logits.topk(CHOICES, 1).indices
        if score == "topk_softmax":
            return (logits.gather(1, chosen).softmax(1),)
        found = (logits.sigmoid() if score == "sigmoid" else logits.softmax(1)).gather(1, chosen)
        return (found / found.sum(1, keepdim=True),)

    return {
        f"router, {score}": Case(
            "router",
            (2 * torch.randn(ROWS, 16 * EXPERTS),),
            lambda logits, score=score: (ops.route(logits, CHOICES, score=score)[1],),
            lambda logits, score=score: plain(logits, score),
            [torch.float32],
        )
        for score in SCORES
    }


def products(rows: int = ROWS, width: int = WIDTH) -> dict[str, Case]:
    rank, scale, layer = 8, 1.5, GroupedLinear(EXPERTS, width, 256, shard="column")
    groups = moe.Groups(torch.bincount(torch.randint(EXPERTS, (rows,)), minlength=EXPERTS), rows)

    def adapted(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor]:
        return (ops.lora_linear(x, weight, None, a, b, ops.LoraLayout.whole(width), scale),)

    def plain_adapted(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor]:
        return (F.linear(x, weight) + F.linear(F.linear(x, a), b) * scale,)

    def grouped(x: Tensor, weight: Tensor) -> tuple[Tensor]:
        here = moe.Groups(groups.counts.to(x.device), rows)
        return (functional_call(layer, {"weight": weight}, (x, here)),)

    def plain_grouped(x: Tensor, weight: Tensor) -> tuple[Tensor]:
        return (torch.cat([F.linear(x[part], weight[expert]) for expert, part in groups.slices()]),)

    x, low = torch.randn(rows, width), (torch.randn(rank, width) / 20, torch.randn(width, rank) / 20)
    return {
        "lora_linear": Case(None, (x, torch.randn(width, width) / 20, *low), adapted, plain_adapted),
        "grouped_linear": Case(
            "grouped_linear", (x, torch.randn(EXPERTS, 256, width) / 20), grouped, plain_grouped
        ),
    }


def all_cases() -> dict[str, Case]:
    torch.manual_seed(0)
    parts = norms, rotations, units, losses, heads, rows_of_tables, routers, products
    return {name: case for part in parts for name, case in part().items()}


def cases_of_many_rows() -> dict[str, Case]:
    torch.manual_seed(0)
    cases = {**norms(MANY), **rotations(MANY // 4), **heads(MANY, 64, 256, 128)}
    few = "rms_norm", "add_rms_norm", "rope_qk with norms", "linear_cross_entropy"
    return {name: cases[name] for name in few}


def each_body(cases: dict[str, Case]) -> list:
    """(case, body, device, dtype)."""
    plain = [pytest.param("", "cpu", id="cpu"), pytest.param("", "cuda", id="cuda", marks=pytest.mark.gpu)]
    return [
        pytest.param(name, body, device, dtype, id=f"{name}-{found.id}-{str(dtype)[6:]}", marks=found.marks)
        for name, case in cases.items()
        for found in (plain if case.op is None else bodies(case.op))
        for body, device in [found.values]
        if body != "compiled" or case.op in OWN_FORMULAS
        for dtype in case.dtypes
    ]


def results(function: Function, inputs: tuple[Tensor, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Outputs, and the inputs' gradients for numbers of 16 bits that are always the same (of a loss: 1)."""
    leaves = [x.to(device, dtype, copy=True).requires_grad_() for x in inputs]
    outputs = function(*leaves)
    seed = torch.Generator().manual_seed(1)
    grads = [
        torch.ones_like(y) if y.dim() == 0 else torch.randn(y.shape, generator=seed).bfloat16().to(y)
        for y in outputs
    ]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, grads)]


def compare(case: Case, body: str, device: str, dtype: torch.dtype, sums: bool = False) -> None:
    """sums: what is added up over rows, the gradients of weights, has nothing allowed beside."""
    if case.op is not None:
        need_body(case.op, body, dtype, device)
        ops.configure({case.op: body}, device)
    inputs = tuple(x.to(device, dtype) for x in case.inputs)
    truth = results(case.plain, inputs, torch.float64, device)
    plain = results(case.plain, inputs, dtype, device)
    found = results(case.ours, inputs, dtype, device)
    for number, (mine, other, exact) in enumerate(zip(found, plain, truth, strict=True)):
        mine_off, other_off = relative_error(mine, exact), relative_error(other, exact)
        more = HALF_UNIT if dtype == torch.float32 else case.alone if mine.dim() == 0 else 0.0
        if sums and mine.dim() == 1:
            more = 0.0
        most = CHANCE * other_off + more
        assert mine_off <= most, f"result {number}: {mine_off}, plain {other_off}"


@pytest.mark.parametrize(("name", "body", "device", "dtype"), each_body(all_cases()))
def test_errors_are_at_most_those_of_plain_pytorch(
    name: str, body: str, device: str, dtype: torch.dtype
) -> None:
    compare(all_cases()[name], body, device, dtype)


@pytest.mark.parametrize(("name", "body", "device", "dtype"), each_body(cases_of_many_rows()))
def test_sums_of_many_rows(name: str, body: str, device: str, dtype: torch.dtype) -> None:
    compare(cases_of_many_rows()[name], body, device, dtype, sums=True)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "width"),
    [
        # Rows that come as bulk copies, and those that threads do not keep: their sums are in memory.
        *(("rms_norm", width) for width in (4096, 4099, 12288)),
        *(("add_rms_norm", width) for width in (4096, 4099)),
        ("lora_linear", 4096),
    ],
)
def test_sums_of_many_long_rows(name: str, width: int) -> None:
    torch.manual_seed(0)
    case = (products(MANY, width) if name == "lora_linear" else norms(MANY, width))[name]
    compare(case, "cuda", "cuda", torch.float32, sums=True)
