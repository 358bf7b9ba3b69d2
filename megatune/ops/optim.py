"""Updates of optimizers, in place, over lists of tensors: one call for all that a process trains.

Masters and moments are float32 (references also take float64), contiguous; gradients and weights float32 or bfloat16.
`scale`, one float32 on the masters' device, multiplies the gradients: a clip factor need never come to the host. Every
element is computed by itself (8-bit states: every block of 256), so results do not depend on how elements are dealt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from megatune.ops.registry import LOW_AND_SINGLE, Body, add_op, cpu_body, cuda_body, define, nothing

BLOCK = 256  # elements that share one scale in 8-bit states
_PIECE = 2**20  # elements that the reference has in fp32 at a time

_LISTS = "Tensor[] grads, Tensor(z!)[] weights, Tensor scale, float[] decays, float lr"
_ADAM = "float beta1, float beta2, float eps, int step"


def _adamw_reference(
    masters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    scale: Tensor,
    decays: Sequence[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
) -> None:
    root, size = math.sqrt(1 - beta2**step), lr / (1 - beta1**step)
    for p, m, v, grad, weight, decay in zip(
        masters, exp_avgs, exp_avg_sqs, grads, weights, decays, strict=True
    ):
        grad = grad.to(p.dtype) * scale
        m.mul_(beta1).add_(grad, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        p.mul_(1 - lr * decay).addcdiv_(m, v.sqrt().div_(root).add_(eps), value=-size)
        if weight.numel():
            weight.copy_(p)


def _adamw_torch(
    masters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    scale: Tensor,
    decays: Sequence[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
) -> None:
    """torch's fused kernel, which takes gradients of the masters' dtype: one call for each weight decay."""
    grads = [
        (grad.to(p.dtype) if grad.dtype != p.dtype else grad) for p, grad in zip(masters, grads, strict=True)
    ]
    grads = torch._foreach_mul(grads, scale)
    count = torch.full((), float(step), dtype=torch.float32, device=scale.device)
    for decay in sorted(set(decays)):
        picked = [i for i, one in enumerate(decays) if one == decay]
        lists = [[some[i] for i in picked] for some in (masters, grads, exp_avgs, exp_avg_sqs)]
        torch._fused_adamw_(
            *lists, [], [count] * len(picked), lr=lr, beta1=beta1, beta2=beta2, weight_decay=decay, eps=eps,
            amsgrad=False, maximize=False,
        )  # fmt: skip
    wanted = [(weight, p) for weight, p in zip(weights, masters, strict=True) if weight.numel()]
    if wanted:
        torch._foreach_copy_([weight for weight, _ in wanted], [p for _, p in wanted])


def _lion_reference(
    masters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    scale: Tensor,
    decays: Sequence[float],
    lr: float,
    beta1: float,
    beta2: float,
) -> None:
    for p, m, grad, weight, decay in zip(masters, exp_avgs, grads, weights, decays, strict=True):
        grad = grad.to(p.dtype) * scale
        sign = (m * beta1).add_(grad, alpha=1 - beta1).sign_()
        m.mul_(beta2).add_(grad, alpha=1 - beta2)
        p.mul_(1 - lr * decay).add_(sign, alpha=-lr)
        if weight.numel():
            weight.copy_(p)


@cache
def _table(signed: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(the 256 values of an 8-bit code, rising; the 255 borders between them, as float32 numbers).

    The dynamic map of arXiv:2110.02861: 0, 1, and in each of seven decades below 1 twice as many values as in the next
    lower one, the middles of equal parts of [0.1, 1]; half of them negative where signed.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        parts = 2 ** (decade if signed else decade + 1)
        middles = [0.1 + 0.9 * (i + 0.5) / parts for i in range(parts)]
        found = [middle * 10.0 ** (decade - 6) for middle in middles]
        values += found + ([-value for value in found] if signed else [])
    single = torch.tensor(sorted(values), dtype=torch.float64).float().double()
    borders = ((single[1:] + single[:-1]) / 2).float()
    return tuple(single.tolist()), tuple(borders.tolist())


def code_values(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """(values [256], borders [255]) of 8-bit codes, fp32, on `device`; code i stands for values[i] times its block's
    scale, and a number for the code between whose borders it lies (on a border: the lower one)."""
    values, borders = _table(signed)
    return torch.tensor(values, device=device), torch.tensor(borders, device=device)


def dequantise(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """codes [n] uint8, scales [ceil(n / 256)] fp32 -> fp32 [n]."""
    values = code_values(signed, codes.device)[0][codes.long()]
    return values * scales.repeat_interleave(BLOCK)[: codes.numel()]


def quantise(x: Tensor, codes: Tensor, scales: Tensor, signed: bool) -> None:
    """fp32 [n] into codes [n] and scales [ceil(n / 256)], the largest absolute value of each block."""
    rows = torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    torch.amax(rows.abs(), 1, out=scales)
    safe = torch.where(scales > 0, scales, torch.ones_like(scales))
    share = (rows / safe.unsqueeze(1)).view(-1)[: x.numel()]
    codes.copy_(torch.bucketize(share, code_values(signed, x.device)[1]))


def _adamw_8bit_reference(
    masters: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    sq_codes: Sequence[Tensor],
    sq_scales: Sequence[Tensor],
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    scale: Tensor,
    decays: Sequence[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
) -> None:
    lists = (masters, codes, scales, sq_codes, sq_scales, grads, weights, decays)
    for p, m_codes, m_scales, v_codes, v_scales, grad, weight, decay in zip(*lists, strict=True):
        p, grad, weight = p.view(-1), grad.view(-1), weight.view(-1)
        for start in range(0, p.numel(), _PIECE):
            here, blocks = slice(start, start + _PIECE), slice(start // BLOCK, (start + _PIECE) // BLOCK)
            m = dequantise(m_codes[here], m_scales[blocks], True)
            v = dequantise(v_codes[here], v_scales[blocks], False)
            args = ([p[here]], [m], [v], [grad[here]], [weight[here]], scale, [decay])
            _adamw_reference(*args, lr, beta1, beta2, eps, step)
            quantise(m, m_codes[here], m_scales[blocks], True)
            quantise(v, v_codes[here], v_scales[blocks], False)


def _square_sum_reference(tensors: Sequence[Tensor]) -> Tensor:
    # In fp64: on a CPU torch's norm of 50 million fp32 numbers is 0.4 % off, and any sum in fp32 depends on how the
    # numbers are cut into tensors, that is on the layout.
    return _total([torch.linalg.vector_norm(one, dtype=torch.float64) for one in tensors])


def _square_sum_torch(tensors: Sequence[Tensor]) -> Tensor:
    """With torch's multi-tensor kernel, which adds up in fp32; norms of bf16 would be rounded to it."""
    return _total(torch._foreach_norm([one.float() if one.dtype.itemsize < 4 else one for one in tensors]))


def _total(norms: Sequence[Tensor]) -> Tensor:
    total = torch.stack(list(norms)).double().square().sum()
    return torch.stack([total, (~total.isfinite()).double()])


def _two(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].new_empty(2, dtype=torch.float64)


_ADAMW = define(
    "adamw_(Tensor(a!)[] masters, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    + f"{_LISTS}, {_ADAM}) -> ()",
    _adamw_reference,
    nothing,
)
_LION = define(
    f"lion_(Tensor(a!)[] masters, Tensor(b!)[] exp_avgs, {_LISTS}, float beta1, float beta2) -> ()",
    _lion_reference,
    nothing,
)
_ADAMW_8BIT = define(
    "adamw_8bit_(Tensor(a!)[] masters, Tensor(b!)[] exp_avg_codes, Tensor(c!)[] exp_avg_scales, "
    f"Tensor(d!)[] exp_avg_sq_codes, Tensor(e!)[] exp_avg_sq_scales, {_LISTS}, {_ADAM}) -> ()",
    _adamw_8bit_reference,
    nothing,
)
_SQUARE_SUM = define("square_sum(Tensor[] tensors) -> Tensor", _square_sum_reference, _two)
_OP_NORM = add_op(
    "square_sum",
    [
        cpu_body(_SQUARE_SUM),
        cuda_body(_SQUARE_SUM),
        Body("torch", (_square_sum_torch,), ("cuda",), LOW_AND_SINGLE),
        Body("reference", (_square_sum_reference,)),
    ],
)
_OP = add_op(
    "adamw",
    [
        cpu_body(_ADAMW),
        cuda_body(_ADAMW),
        Body("torch", (_adamw_torch,), ("cuda",), LOW_AND_SINGLE),
        Body("reference", (_adamw_reference,)),
    ],
)
_OP_LION = add_op("lion", [cpu_body(_LION), cuda_body(_LION), Body("reference", (_lion_reference,))])
_OP_8BIT = add_op(
    "adamw_8bit",
    [cpu_body(_ADAMW_8BIT), cuda_body(_ADAMW_8BIT), Body("reference", (_adamw_8bit_reference,))],
)


def _dtypes(name: str, master_dtypes: Sequence[torch.dtype], master: Tensor) -> set[torch.dtype]:
    """What the tensors of a list may be."""
    if name == "masters":
        return set(master_dtypes)
    if name.endswith("codes"):
        return {torch.uint8}
    if name in ("grads", "weights"):
        return {torch.float32, torch.bfloat16, master.dtype}
    return {torch.float32, master.dtype} - {torch.bfloat16}


def check_lists(
    op: str,
    masters: Sequence[Tensor],
    lists: dict[str, Sequence[Tensor]],
    decays: Sequence[float],
    scale: Tensor,
    master_dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64),
) -> None:
    """ValueError where a list is not as long as `masters`, or a tensor not as its master."""
    for name, tensors in ({"masters": masters} | lists).items():
        if len(tensors) != len(masters):
            raise ValueError(f"{op}: {len(masters)} masters, but {len(tensors)} {name}")
        for i, (tensor, master) in enumerate(zip(tensors, masters, strict=True)):
            at = f"{op}: {name}[{i}]"
            wanted = _dtypes(name, master_dtypes, master)
            if tensor.dtype not in wanted:
                names = " or ".join(sorted(str(dtype)[6:] for dtype in wanted))
                raise ValueError(f"{at} is {str(tensor.dtype)[6:]}, must be {names}")
            numel = -(-master.numel() // BLOCK) if name.endswith("scales") else master.numel()
            if tensor.numel() != numel and not (name == "weights" and not tensor.numel()):
                raise ValueError(f"{at} has {tensor.numel()} elements, must have {numel}")
            if tensor.device != master.device or not tensor.is_contiguous():
                raise ValueError(f"{at} must be contiguous and on the masters' device, {master.device}")
    if len(decays) != len(masters):
        raise ValueError(f"{op}: {len(masters)} masters, but {len(decays)} decays")
    if scale.dtype != torch.float32 or scale.numel() != 1 or (masters and scale.device != masters[0].device):
        raise ValueError(f"{op}: scale must be one float32 on the masters' device")


def square_sum(tensors: Sequence[Tensor]) -> Tensor:
    """fp64 [2], on their device: the sum of the squares of all elements, and 1 where it is not finite, else 0.

    At least one contiguous tensor, all on one device; ValueError otherwise."""
    if not tensors:
        raise ValueError("square_sum: there must be a tensor")
    for i, tensor in enumerate(tensors):
        if not tensor.is_contiguous() or tensor.device != tensors[0].device or not tensor.is_floating_point():
            raise ValueError(
                f"square_sum: tensors[{i}] must be contiguous floating point on {tensors[0].device}"
            )
    return _OP_NORM.pick(tensors[0].device.type, tensors[0].dtype).run[0](tensors)


def _no_weights(masters: Sequence[Tensor], weights: Sequence[Tensor] | None) -> Sequence[Tensor]:
    return [p.new_empty(0) for p in masters] if weights is None else weights


def adamw_(
    masters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    scale: Tensor,
    decays: Sequence[float],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: int,
    weights: Sequence[Tensor] | None = None,
) -> None:
    """One step, number `step` (from 1 on), of AdamW (arXiv:1711.05101): decoupled weight decay, one for each tensor.

    `weights`: where the new masters go as float32 or bfloat16 too (an empty tensor: not wanted). Everything else as the
    module says. ValueError where lengths, dtypes, sizes, devices or strides do not fit.
    """
    weights = _no_weights(masters, weights)
    lists = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "grads": grads, "weights": weights}
    check_lists("adamw", masters, lists, decays, scale)
    if masters:
        body = _OP.pick(masters[0].device.type, masters[0].dtype)
        body.run[0](masters, *lists.values(), scale, decays, lr, *betas, eps, step)


def lion_(
    masters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    scale: Tensor,
    decays: Sequence[float],
    lr: float,
    betas: tuple[float, float],
    weights: Sequence[Tensor] | None = None,
) -> None:
    """One step of Lion (arXiv:2302.06675): lr times the sign of beta1 * exp_avg + (1 - beta1) * grad. See `adamw_`."""
    weights = _no_weights(masters, weights)
    lists = {"exp_avgs": exp_avgs, "grads": grads, "weights": weights}
    check_lists("lion", masters, lists, decays, scale)
    if masters:
        body = _OP_LION.pick(masters[0].device.type, masters[0].dtype)
        body.run[0](masters, *lists.values(), scale, decays, lr, *betas)


def adamw_8bit_(
    masters: Sequence[Tensor],
    exp_avg_codes: Sequence[Tensor],
    exp_avg_scales: Sequence[Tensor],
    exp_avg_sq_codes: Sequence[Tensor],
    exp_avg_sq_scales: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    scale: Tensor,
    decays: Sequence[float],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: int,
    weights: Sequence[Tensor] | None = None,
) -> None:
    """`adamw_` with moments in 8 bits (arXiv:2110.02861): codes [n] uint8 (`code_values`, signed and unsigned) and one
    fp32 scale for each block of 256 elements in row-major order, the last one shorter."""
    weights = _no_weights(masters, weights)
    lists = {
        "exp_avg_codes": exp_avg_codes,
        "exp_avg_scales": exp_avg_scales,
        "exp_avg_sq_codes": exp_avg_sq_codes,
        "exp_avg_sq_scales": exp_avg_sq_scales,
        "grads": grads,
        "weights": weights,
    }
    check_lists("adamw_8bit", masters, lists, decays, scale)
    if masters:
        body = _OP_8BIT.pick(masters[0].device.type, masters[0].dtype)
        body.run[0](masters, *lists.values(), scale, decays, lr, *betas, eps, step)
