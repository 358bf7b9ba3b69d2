"""More cases of the op benchmark: losses of logits, what stands around attention and experts in one pass, 8 bits, and
the other optimizers. `ops_cases` says how a case is written."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops_cases import Case, New, Other, Sizes, Tensors, Work, case, halves, plain_norm
from megatune import ops
from megatune.ops import Segments, fp8_quantise, quant
from megatune.ops.optim import BLOCK as STATE_BLOCK

LOGIT_ROWS = 4096  # logits of a chunk of tokens: nobody has those of all
STEP = {"lr": 1e-3, "betas": (0.9, 0.95)}


@case("llama-8b", "qwen3-30b-a3b")
def cross_entropy(s: Sizes, new: New) -> Case:
    """From logits to the loss and their gradient, which takes their place here; a rival may write it beside them."""
    rows = min(s.T, LOGIT_ROWS)
    labels = new.whole(s.V, rows)
    return Case(
        "cross_entropy",
        f"{rows} x {s.V}",
        lambda: (new.leaf(rows, s.V),),
        lambda logits: ops.cross_entropy(logits.view_as(logits), labels),
        Other(lambda logits: F.cross_entropy(logits.float(), labels, reduction="sum")),
        Work(2 * rows * s.V * new.width),
        joint=True,
        registry="linear_cross_entropy",
        facts={"labels": labels},
    )


@case()
def rope_qk(s: Sizes, new: New) -> Case:
    """All of a packed product's heads; those of Qwen3 have norms."""
    group, normed = s.Q // s.K, s.experts > 0
    segments = Segments.from_lengths([s.document] * (s.T // s.document), new.device)
    angle = segments.positions[:, None] / 10000 ** (torch.arange(s.D // 2, device=new.device) * 2 / s.D)
    cos, sin = angle.cos().float(), angle.sin().float()
    whole_cos, whole_sin = (torch.cat((part, part), -1).to(new.dtype) for part in (cos, sin))

    def turned(x: Tensor) -> Tensor:
        shape = (s.T, *(1,) * (x.dim() - 2), s.D)
        first, second = x.chunk(2, -1)
        return x * whole_cos.view(shape) + torch.cat((-second, first), -1) * whole_sin.view(shape)

    def plain(qkv: Tensor, *weights: Tensor) -> Tensors:
        q, k, v = qkv.split((group, 1, 1), 2)
        if weights:
            q, k = (plain_norm(x, weight) for x, weight in zip((q, k), weights, strict=True))
        return turned(q), turned(k).squeeze(2), v.squeeze(2)

    head = s.T * s.D * new.width
    turned_heads, angles = (s.Q + s.K) * head, cos.nbytes + sin.nbytes
    return Case(
        "rope_qk",
        f"{s.T} x {s.K} x ({group} + 2) heads of {s.D}{', with norms' if normed else ''}",
        lambda: (new.leaf(s.T, s.K, group + 2, s.D), *(new.leaf(s.D) for _ in range(2 if normed else 0))),
        lambda qkv, *weights: ops.rope_qk(qkv, cos, sin, *weights, eps=1e-5),
        Other(plain),
        Work(2 * turned_heads + angles),
        Work((3 if normed else 2) * turned_heads + 2 * s.K * head + angles),
    )


@case("qwen3-30b-a3b")
def router(s: Sizes, new: New) -> Case:
    def plain(logits: Tensor) -> Tensors:
        probabilities = logits.softmax(1)
        weights, _ = probabilities.topk(s.choices, 1)
        return weights / weights.sum(1, keepdim=True), probabilities

    all_of, chosen = 4 * s.T * s.experts, 4 * s.T * s.choices
    return Case(
        "router",
        f"{s.T} x {s.experts}, {s.choices} chosen",
        lambda: (new.normal(s.T, s.experts, dtype=torch.float32).requires_grad_(),),
        lambda logits: ops.route(logits, s.choices)[1:],
        Other(plain),
        Work(2 * all_of + 3 * chosen),  # int64 numbers of the chosen
        Work(3 * all_of + 3 * chosen),
    )


def _eight(values: Tensor) -> Tensors:
    """(e4m3 [rows, inner], scales): a scale for each 128 numbers of a row."""
    parts = values.float().unflatten(1, (-1, fp8_quantise.BLOCK))
    scales = parts.abs().amax(2, keepdim=True) * (1 / 448)
    codes = (parts * scales.reciprocal()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.flatten(1), scales.squeeze(2).t().contiguous()


def _both(values: Tensor) -> Tensors:
    return *_eight(values), *_eight(values.t().contiguous())


def _as_e4m3(made: fp8_quantise.Quantised) -> Tensors:
    first, second = (codes.view(torch.float8_e4m3fn) for codes in (made.codes, made.codes_t))
    return first, made.scales, second, made.scales_t


def _fp8_sizes(s: Sizes, width: int) -> tuple[int, ...]:
    """(rows, width), whole blocks of both."""
    block = fp8_quantise.BLOCK
    return tuple(max(size, block) // block * block for size in (s.T, width))


_SCALES = 4 / fp8_quantise.BLOCK  # bytes of scales for each code


@case("llama-8b")
def fp8_quantise_both(s: Sizes, new: New) -> Case:
    """In blocks, as it is and transposed."""
    rows, width = _fp8_sizes(s, s.H)
    return Case(
        "fp8_quantise_both",
        f"{rows} x {width}, blocks, both copies",
        lambda: (new.normal(rows, width),),
        lambda x: _as_e4m3(fp8_quantise.quantise(x, "blocks")),
        Other(_both),
        Work(rows * width * (new.width + 2 * (1 + _SCALES))),
        registry="fp8_quantise",
    )


@case("llama-8b")
def fp8_rms_norm(s: Sizes, new: New) -> Case:
    rows, width = _fp8_sizes(s, s.H)
    return Case(
        "fp8_rms_norm",
        f"{rows} x {width}, blocks, both copies",
        lambda: (new.normal(rows, width), new.normal(width)),
        lambda x, weight: _as_e4m3(fp8_quantise.quantise_rms_norm(x, weight, 1e-5, 0.0, "blocks")[0]),
        Other(lambda x, weight: _both(plain_norm(x, weight))),
        Work(rows * width * (new.width + 2 * (1 + _SCALES))),
    )


@case("llama-8b")
def fp8_glu(s: Sizes, new: New) -> Case:
    rows, width = _fp8_sizes(s, s.I)

    def plain(gate_up: Tensor) -> Tensors:
        gate, up = gate_up.chunk(2, -1)
        return _both(F.silu(gate) * up)

    return Case(
        "fp8_glu",
        f"{rows} x {width}, blocks, both copies",
        lambda: (new.normal(rows, 2 * width),),
        lambda gate_up: _as_e4m3(fp8_quantise.quantise_glu(gate_up, "silu", "blocks")),
        Other(plain, prepare=lambda leaves: (halves(*leaves),)),
        Work(rows * width * (2 * new.width + 2 * (1 + _SCALES))),
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


def _lists(s: Sizes, leaves: Tensors, count: int) -> list[list[Tensor]]:
    each = len(s.trained)
    return [list(leaves[i * each : (i + 1) * each]) for i in range(count)]


@case("llama-8b")
def lion(s: Sizes, new: New) -> Case:
    """fp32 gradients, moments and masters, the new weights in bf16, a clip factor on the device: 22 bytes."""
    decays = [0.1] * len(s.trained)

    def make() -> Tensors:
        wide = [new.normal(n, dtype=torch.float32, scale=0.1) for _ in range(3) for n in s.trained]
        weights = [new.normal(n, dtype=torch.bfloat16) for n in s.trained]
        return (*wide, *weights, torch.full((), 0.7, device=new.device))

    def run(*leaves: Tensor) -> Tensors:
        masters, moments, grads, weights = _lists(s, leaves, 4)
        ops.lion_(masters, moments, grads, weights=weights, scale=leaves[-1], decays=decays, **STEP)
        return (*masters, *moments, *weights)

    def plain(*leaves: Tensor) -> Tensors:
        masters, moments, grads, weights = _lists(s, leaves, 4)
        lr, (beta1, beta2) = STEP["lr"], STEP["betas"]
        grads = torch._foreach_mul(grads, leaves[-1])
        signs = torch._foreach_mul(moments, beta1)
        torch._foreach_add_(signs, grads, alpha=1 - beta1)
        torch._foreach_sign_(signs)
        torch._foreach_mul_(moments, beta2)
        torch._foreach_add_(moments, grads, alpha=1 - beta2)
        torch._foreach_mul_(masters, 1 - lr * decays[0])
        torch._foreach_add_(masters, signs, alpha=-lr)
        torch._foreach_copy_(weights, masters)
        return (*masters, *moments, *weights)

    return Case(
        "lion",
        f"{sum(s.trained)} elements in {len(s.trained)} tensors",
        make,
        run,
        Other(plain),
        Work(22 * sum(s.trained)),
        plain_name="torch foreach",
        compiled=False,
    )


@case("llama-8b")
def adamw_8bit(s: Sizes, new: New) -> Case:
    """fp32 gradients and masters, moments in 8 bits, the new weights in bf16: 18 bytes and the scales."""
    decays = [0.1] * len(s.trained)

    def make() -> Tensors:
        masters, grads = (
            [new.normal(n, dtype=torch.float32, scale=0.1) for n in s.trained] for _ in range(2)
        )
        codes = [new.whole(256, n).to(torch.uint8) for _ in range(2) for n in s.trained]
        scales = [torch.rand(-(-n // STATE_BLOCK), device=new.device) for _ in range(2) for n in s.trained]
        weights = [new.normal(n, dtype=torch.bfloat16) for n in s.trained]
        return (*masters, *codes, *scales, *grads, *weights, torch.full((), 0.7, device=new.device))

    def run(*leaves: Tensor) -> Tensors:
        masters, m, v, m_scales, v_scales, grads, weights = _lists(s, leaves, 7)
        states = m, m_scales, v, v_scales, grads
        more = {"weights": weights, "scale": leaves[-1], "decays": decays, "eps": 1e-8, "step": 10}
        ops.adamw_8bit_(masters, *states, **more, **STEP)
        return (*masters, *weights)

    return Case(
        "adamw_8bit",
        f"{sum(s.trained)} elements in {len(s.trained)} tensors",
        make,
        run,
        None,  # PyTorch has no such states
        Work((18 + 4 * 4 / STATE_BLOCK) * sum(s.trained)),
        facts={"tensors": len(s.trained)},
    )
