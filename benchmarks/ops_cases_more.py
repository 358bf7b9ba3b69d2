"""More cases of the op benchmark: loss, tables and routers, experts, 8 bits, optimizers, attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops_cases import Case, New, Other, Sizes, Tensors, Work, case
from megatune import ops
from megatune.ops import Segments, moe, quant
from megatune.ops.fp8_quantise import Quantised, quantise, quantise_glu, quantise_rms_norm


@case("llama-8b")
def cross_entropy(s: Sizes, new: New) -> Case:
    """Of given logits, which become their gradient: read once, written once."""
    labels = new.whole(s.V, s.T)
    return Case(
        "cross_entropy",
        f"{s.T} x {s.V}",
        lambda: (new.leaf(s.T, s.V),),
        lambda logits: ops.cross_entropy(logits.view_as(logits), labels),
        Other(lambda logits: F.cross_entropy(logits.float(), labels, reduction="sum")),
        Work(2 * s.T * s.V * new.width),
        joint=True,
        registry="linear_cross_entropy",
        facts={"labels": labels},
    )


@case("llama-8b")
def embedding(s: Sizes, new: New) -> Case:
    tokens = new.whole(s.V, s.T)
    rows = s.T * s.H * new.width
    return Case(
        "embedding",
        f"{s.T} of {s.V} x {s.H}",
        lambda: (new.leaf(s.V, s.H),),
        lambda weight: ops.embedding(tokens, weight),
        Other(lambda weight: F.embedding(tokens, weight)),
        Work(2 * rows),
        Work(rows + s.V * s.H * new.width),
    )


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


@case("qwen3-30b-a3b")
def grouped_linear(s: Sizes, new: New) -> Case:
    groups = _order(s, new).groups
    slices = groups.slices()

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([x[rows] @ weight[expert].t() for expert, rows in slices])

    return Case(
        "grouped_linear",
        f"{s.mlp_rows} x {s.H} x {2 * s.I}, {s.experts} experts",
        lambda: (new.normal(s.mlp_rows, s.H), new.normal(s.experts, 2 * s.I, s.H, scale=0.02)),
        lambda x, weight: moe.grouped_linear(x, weight, None, groups),
        Other(plain),
        Work(flops=4 * s.mlp_rows * s.H * s.I, products=(("NT", s.mlp_rows, 2 * s.I, s.H),)),
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
    )


def _copies(made: Quantised) -> Tensors:
    return made.codes, made.scales, made.codes_t, made.scales_t


def _fp8(
    name: str, rows: int, width: int, read: int, new: New, make: Any, run: Callable[..., Tensors]
) -> Case:
    """`read` numbers a result; both copies are written, a byte each."""
    size = rows * width * (read * new.width + 2)
    return Case(name, f"{rows} x {width}, rows and transposed", make, run, None, Work(size))


@case("llama-8b")
def fp8_quantise(s: Sizes, new: New) -> Case:
    def run(x: Tensor) -> Tensors:
        return _copies(quantise(x, "rowwise"))

    return _fp8("fp8_quantise", s.T, s.H, 1, new, lambda: (new.normal(s.T, s.H),), run)


@case("llama-8b")
def fp8_rms_norm(s: Sizes, new: New) -> Case:
    def run(x: Tensor, weight: Tensor) -> Tensors:
        made, rstd = quantise_rms_norm(x, weight, 1e-5, 0.0, "rowwise")
        return *_copies(made), rstd

    return _fp8("fp8_rms_norm", s.T, s.H, 1, new, lambda: (new.normal(s.T, s.H), new.normal(s.H)), run)


@case("llama-8b")
def fp8_glu(s: Sizes, new: New) -> Case:
    def run(gate_up: Tensor) -> Tensors:
        return _copies(quantise_glu(gate_up, "silu", "rowwise"))

    return _fp8("fp8_glu", s.T, s.I, 2, new, lambda: (new.normal(s.T, 2 * s.I),), run)


_STEP = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "step": 10}


@case("llama-8b")
def adamw(s: Sizes, new: New) -> Case:
    """fp32 gradients, moments and masters, the new weights in bf16, a clip factor on the device: 30 bytes."""
    count = len(s.trained)
    decays = [0.1] * count

    def make() -> Tensors:
        def lists(dtype: torch.dtype) -> list[Tensor]:
            return [new.normal(size, dtype=dtype, scale=0.1) for size in s.trained]

        masters, moments, grads = (lists(torch.float32) for _ in range(3))
        squares = [torch.rand(size, device=new.device) for size in s.trained]
        scale = torch.full((), 0.7, device=new.device)
        return (*masters, *moments, *squares, *grads, *lists(torch.bfloat16), scale)

    def run(*leaves: Tensor) -> list[Tensor]:
        parts = [list(leaves[i * count : (i + 1) * count]) for i in range(5)]
        ops.adamw_(*parts[:4], weights=parts[4], scale=leaves[-1], decays=decays, **_STEP)
        return [*parts[0], *parts[1], *parts[2], *parts[4]]

    def plain(*leaves: Tensor) -> list[Tensor]:
        """torch's fused kernel, with the clipping before and the copy after it."""
        masters, moments, squares, grads, weights = (
            list(leaves[i * count : (i + 1) * count]) for i in range(5)
        )
        torch._foreach_mul_(grads, leaves[-2])
        torch._fused_adamw_(
            masters, grads, moments, squares, [], [leaves[-1]] * count, lr=_STEP["lr"], beta1=0.9, beta2=0.95,
            weight_decay=0.1, eps=_STEP["eps"], amsgrad=False, maximize=False,
        )  # fmt: skip
        torch._foreach_copy_(weights, masters)
        return [*masters, *moments, *squares, *weights]

    steps = torch.full((), float(_STEP["step"]), device=new.device)
    return Case(
        "adamw",
        f"{sum(s.trained)} elements in {count} tensors",
        make,
        run,
        Other(plain, prepare=lambda leaves: (*leaves, steps)),
        Work(30 * sum(s.trained)),
        plain_name="torch fused, clip, copy",
        compiled=False,
    )


def _lists(s: Sizes, new: New, *dtypes: torch.dtype) -> list[Tensor]:
    """A list of tensors for each dtype, one after the other; codes of 8 bits stand for small numbers."""
    made: list[Tensor] = []
    for dtype in dtypes:
        for size in s.trained:
            codes = dtype == torch.uint8
            made.append(new.whole(128, size).to(dtype) if codes else new.normal(size, dtype=dtype, scale=0.1))
    return made


@case("llama-8b")
def adamw_8bit(s: Sizes, new: New) -> Case:
    """bf16 gradients, moments in 8 bits with a scale for each 256, masters in fp32, the new weights in bf16."""
    count = len(s.trained)

    def make() -> Tensors:
        low, single, codes = torch.bfloat16, torch.float32, torch.uint8
        scales = [torch.rand(-(-size // 256), device=new.device) for size in [*s.trained, *s.trained]]
        tensors = _lists(s, new, single, codes, codes, low, low)
        return (*tensors, *scales, torch.full((), 0.7, device=new.device))

    def run(*leaves: Tensor) -> list[Tensor]:
        p, m, v, grads, weights, m_scales, v_scales = (
            list(leaves[i * count : (i + 1) * count]) for i in range(7)
        )
        options = {"scale": leaves[-1], "decays": [0.1] * count, "weights": weights}
        ops.adamw_8bit_(p, m, m_scales, v, v_scales, grads, **options, **_STEP)
        return [*p, *m_scales, *v_scales, *weights]

    elements = sum(s.trained)
    size = elements * (2 + 8 + 4 + 2) + 16 * elements / 256
    return Case("adamw_8bit", f"{elements} elements in {count} tensors", make, run, None, Work(size))


@case("llama-8b")
def lion(s: Sizes, new: New) -> Case:
    """bf16 gradients, moments and masters in fp32, the new weights in bf16."""
    count = len(s.trained)

    def make() -> Tensors:
        low, single = torch.bfloat16, torch.float32
        return (*_lists(s, new, single, single, low, low), torch.full((), 0.7, device=new.device))

    def run(*leaves: Tensor) -> list[Tensor]:
        p, m, grads, weights = (list(leaves[i * count : (i + 1) * count]) for i in range(4))
        options = {"scale": leaves[-1], "decays": [0.1] * count, "weights": weights}
        ops.lion_(p, m, grads, lr=1e-3, betas=(0.9, 0.95), **options)
        return [*p, *m, *weights]

    elements = sum(s.trained)
    return Case("lion", f"{elements} elements in {count} tensors", make, run, None, Work(20 * elements))


@case("llama-8b")
def square_sum(s: Sizes, new: New) -> Case:
    def plain(*grads: Tensor) -> Tensor:
        return torch.nn.utils.get_total_norm(grads).square()

    return Case(
        "square_sum",
        f"{sum(s.trained)} elements in {len(s.trained)} tensors",
        lambda: tuple(new.normal(size, dtype=torch.float32) for size in s.trained),
        lambda *grads: ops.square_sum(grads)[0],
        Other(plain),
        Work(4 * sum(s.trained)),
        plain_name="torch foreach norm",
        compiled=False,
    )


@case("llama-8b")
def int8_dequantise(s: Sizes, new: New) -> Case:
    def plain(numbers: Tensor, scales: Tensor) -> Tensor:
        return (numbers * scales[:, None] * quant._INT8_STEP).to(new.dtype)

    rows, columns = 2 * s.I, s.H
    return Case(
        "int8_dequantise",
        f"{rows} x {columns}",
        lambda: quant.quantise_int8(new.normal(rows, columns, scale=0.02)),
        lambda numbers, scales: quant.dequantise_int8(numbers, scales, new.dtype),
        Other(plain),
        Work(rows * columns * (new.width + 1)),
    )


@case("llama-8b")
def nf4_dequantise(s: Sizes, new: New) -> Case:
    shape = (2 * s.I, s.H)
    code = torch.tensor(quant.NF4, device=new.device)

    def plain(packed: Tensor, scales: Tensor, nested: Tensor, offset: Tensor) -> Tensor:
        numbers = code[torch.stack((packed >> 4, packed & 15), -1).int()].view(-1, quant.BLOCK)
        return (numbers * quant.nf4_scales(scales, nested, offset)[:, None]).to(new.dtype).view(shape)

    elements = shape[0] * shape[1]
    return Case(
        "nf4_dequantise",
        f"{shape[0]} x {shape[1]}",
        lambda: quant.quantise_nf4(new.normal(*shape, scale=0.02)),
        lambda *parts: quant.dequantise_nf4(*parts, shape, new.dtype),
        Other(plain),
        Work(elements * (new.width + 0.5 + 1 / quant.BLOCK)),
        facts={"shape": shape, "dtype": new.dtype},
    )


@case("llama-8b", "qwen3-30b-a3b")
def attention(s: Sizes, new: New) -> Case:
    """Documents of one length, so that PyTorch can have them as a batch."""
    documents = s.T // s.document
    segments = Segments.from_lengths([s.document] * documents, new.device)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = (part.unflatten(0, (documents, s.document)).transpose(1, 2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    flops = 2 * documents * s.document**2 * s.Q * s.D
    return Case(
        "attention",
        f"{documents} x {s.document}, {s.Q} / {s.K} heads of {s.D}",
        lambda: (new.leaf(s.T, s.Q, s.D), new.leaf(s.T, s.K, s.D), new.leaf(s.T, s.K, s.D)),
        lambda q, k, v: ops.attention(q, k, v, segments, scale=s.D**-0.5),
        Other(plain),
        Work(flops=flops),
        Work(flops=2.5 * flops),
        plain_name="torch SDPA, one batch",
        compiled=False,
    )
