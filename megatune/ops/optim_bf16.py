"""AdamW on parameters that are bf16 and have no fp32 master: rounded up or down at random, so that steps smaller than
bf16's spacing count on average (arXiv:2010.06192).

The random bits are Philox4x32-10 (Salmon and others, SC11), and a function of a parameter's key, the step and the
element's place in the whole parameter: neither the layout nor a resumed run changes them. Element e of a parameter has
16 bits of block e // 8: the lower half (e even) or the upper one of word e // 2 % 4 of the four that counter
(block, step), 64 bits each, gives under the key. They are added to the lower half of the fp32 result, and what does not
fit into bf16 is cut off.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from megatune.ops.optim import _PIECE, _adamw_reference, check_lists
from megatune.ops.registry import Body, add_op, cpu_body, cuda_body, define, nothing

_WORD = 2**32 - 1
_BF16 = (torch.bfloat16,)
MOST_OF_ROWS = 2**32  # elements of a tensor that is no single run of its parameter


def parameter_key(seed: int, name: str) -> int:
    """The key (63 bits) of a parameter's random numbers: a function of the run's seed and its global name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1


def philox(blocks: Tensor, step: int, key: int) -> Tensor:
    """Philox4x32-10 of counters (block, step): int64 [n] -> int64 [n, 4], words of 32 bits."""
    a, b = blocks & _WORD, blocks >> 32 & _WORD
    c, d = torch.full_like(a, step & _WORD), torch.full_like(a, step >> 32 & _WORD)
    low, high = key & _WORD, key >> 32 & _WORD
    for _ in range(10):
        # Products of 64 bits: int64 holds them as they are, but for the sign.
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (
            (second >> 32 & _WORD) ^ b ^ low,
            second & _WORD,
            (first >> 32 & _WORD) ^ d ^ high,
            first & _WORD,
        )
        low, high = low + 0x9E3779B9 & _WORD, high + 0xBB67AE85 & _WORD
    return torch.stack((a, b, c, d), -1)


def bits_of_run(first: int, count: int, step: int, key: int, device: torch.device) -> Tensor:
    """int64 [count]: the 16 bits of elements first .. first + count of a parameter."""
    blocks = torch.arange(first // 8, (first + count + 7) // 8, device=device)
    words = philox(blocks, step, key)
    halves = torch.stack((words & 0xFFFF, words >> 16), -1).view(-1)
    return halves[first % 8 : first % 8 + count]


def bits_of(elements: Tensor, step: int, key: int) -> Tensor:
    """int64 [n]: the 16 bits of any elements of a parameter, by their places in it (int64 [n])."""
    words = philox(elements // 8, step, key)
    word = words.gather(-1, (elements // 2 % 4).unsqueeze(-1)).squeeze(-1)
    return word >> elements % 2 * 16 & 0xFFFF


def round_by(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 -> bf16 by random bits (int64, 16 of them). What bf16 can hold stays as it is, infinities too."""
    whole = x.view(torch.int32).long() & _WORD
    rounded = (torch.where(x.isfinite(), whole + bits, whole) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isnan(), torch.full_like(rounded, float("nan")), rounded)


def _reference(
    masters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    grads: Sequence[Tensor],
    scale: Tensor,
    decays: Sequence[float],
    keys: Sequence[int],
    firsts: Sequence[int],
    widths: Sequence[int],
    strides: Sequence[int],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
) -> None:
    lists = (masters, exp_avgs, exp_avg_sqs, grads, decays, keys, firsts, widths, strides)
    for master, m, v, grad, decay, key, first, width, stride in zip(*lists, strict=True):
        flat, m, v, grad = master.view(-1), m.view(-1), v.view(-1), grad.view(-1)
        for start in range(0, flat.numel(), _PIECE):
            here = slice(start, start + _PIECE)
            p = flat[here].float()
            args = ([p], [m[here]], [v[here]], [grad[here]], [p.new_empty(0)], scale, [decay])
            _adamw_reference(*args, lr, beta1, beta2, eps, step)
            if width >= flat.numel():
                bits = bits_of_run(first + start, p.numel(), step, key, p.device)
            else:
                at = torch.arange(start, start + p.numel(), device=p.device)
                bits = bits_of(first + at // width * stride + at % width, step, key)
            flat[here] = round_by(p, bits)


_ADAMW_BF16 = define(
    "adamw_bf16_(Tensor(a!)[] masters, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor[] grads, Tensor scale, "
    "float[] decays, int[] keys, int[] firsts, int[] widths, int[] strides, float lr, float beta1, float beta2, "
    "float eps, int step) -> ()",
    _reference,
    nothing,
)
_OP = add_op("adamw_bf16", [cpu_body(_ADAMW_BF16), cuda_body(_ADAMW_BF16), Body("reference", (_reference,))])


def adamw_bf16_(
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
    keys: Sequence[int],
    firsts: Sequence[int] | None = None,
    widths: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> None:
    """`adamw_` on bf16 masters, which are the weights: computed in fp32 with fp32 moments, then rounded at random.

    `keys`: of each tensor's parameter (`parameter_key`). Element i of a tensor is element first + i // width * stride +
    i % width of its parameter, in row-major order: `firsts` None: 0; `widths` and `strides` None: each is a contiguous
    run; else each holds, of rows `stride` elements long, `width` elements, fewer than 2^32 in all. All bodies draw the
    same bits; the fp32 results that they round differ between the reference and the compiled ones by fp32 rounding, as
    those of `adamw_` do. ValueError where lengths, dtypes, sizes, devices or strides do not fit.
    """
    firsts = [0] * len(masters) if firsts is None else firsts
    widths = [max(1, master.numel()) for master in masters] if widths is None else widths
    strides = widths if strides is None else strides
    lists = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "grads": grads}
    check_lists("adamw_bf16", masters, lists, decays, scale, _BF16)
    places = {"keys": keys, "firsts": firsts, "widths": widths, "strides": strides}
    for what, found in places.items():
        if len(found) != len(masters):
            raise ValueError(f"adamw_bf16: {len(masters)} masters, but {len(found)} {what}")
    for what, lowest in (("firsts", 0), ("widths", 1), ("strides", 0)):
        if any(one < lowest for one in places[what]):
            raise ValueError(f"adamw_bf16: {what} must be at least {lowest}, but one is {min(places[what])}")
    if any(width < master.numel() >= MOST_OF_ROWS for master, width in zip(masters, widths, strict=True)):
        raise ValueError("adamw_bf16: tensors of more than one row must have fewer than 2^32 elements")
    if masters:
        run = _OP.pick(masters[0].device.type, masters[0].dtype).run[0]
        run(masters, *lists.values(), scale, decays, *places.values(), lr, *betas, eps, step)
