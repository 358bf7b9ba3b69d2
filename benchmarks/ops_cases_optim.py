"""Cases of the op benchmark: optimizers and the norm of gradients, over the tensors of one layer."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ops_cases import NO_TARGETS, Case, New, Other, Sizes, Tensors, Work, case
from megatune import ops
from megatune.optim.muon import STEPS, orthogonalise

_STEP = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "step": 10}


@case()
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


@case()
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
    what = f"{elements} elements in {count} tensors"
    return Case("adamw_8bit", what, make, run, None, Work(size), facts={"tensors": count})


@case()
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


@case()
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


@case()
def adamw_bf16(s: Sizes, new: New) -> Case:
    """bf16 gradients and weights without masters, rounded at random, moments in fp32."""
    count = len(s.trained)

    def make() -> Tensors:
        low, single = torch.bfloat16, torch.float32
        squares = [torch.rand(size, device=new.device) for size in s.trained]
        return (
            *_lists(s, new, low, single),
            *squares,
            *_lists(s, new, low),
            torch.full((), 0.7, device=new.device),
        )

    def run(*leaves: Tensor) -> list[Tensor]:
        p, m, v, grads = (list(leaves[i * count : (i + 1) * count]) for i in range(4))
        options = {"scale": leaves[-1], "decays": [0.1] * count, "keys": list(range(count))}
        ops.adamw_bf16_(p, m, v, grads, **options, **_STEP)
        return [*p, *m, *v]

    elements = sum(s.trained)
    return Case("adamw_bf16", f"{elements} elements in {count} tensors", make, run, None, Work(22 * elements))


@case("llama-8b")
def muon(s: Sizes, new: New) -> Case:
    """Newton-Schulz iterations of one layer's down projection."""
    rows, columns = s.H, s.I
    step = 4 * rows**2 * columns + 2 * rows**3
    return Case(
        "muon",
        f"{rows} x {columns}, {STEPS} iterations",
        lambda: (new.normal(rows, columns, dtype=torch.float32),),
        orthogonalise,
        None,
        Work(flops=STEPS * step),
        targets=NO_TARGETS,
    )
