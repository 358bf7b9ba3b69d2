"""Call every CUDA operator of megatune once on small odd sizes, and compare with the same operator on the CPU.

    python tools/cuda_once.py [--list]

For compute-sanitizer (tools/sanitize.py), which slows everything down: no torch.compile, no random numbers made on the
GPU, inputs copied to it so that whatever was not written is known. Each kernel of an operator is reached: all dtypes,
rows that are whole vectors and rows that are not, one row and none, strided views. Exit code 1 where values differ.
Operators with a CUDA kernel that have no example here are named.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from megatune import ops
from megatune.ops import _load

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
Example = tuple[str, tuple[Any, ...], torch.dtype]  # operator, arguments on the CPU, what it computes in


def examples() -> Iterator[Example]:
    torch.manual_seed(0)
    for dtype in DTYPES:
        yield from norms(dtype)
        yield from rotations(dtype)
        yield from gates(dtype)
    yield from optimizers()


def norms(dtype: torch.dtype) -> Iterator[Example]:
    """Rows of some lanes of a warp, of a block, longer than what a block keeps in registers; views; two offsets."""
    sizes = ((5, 7, 0.0), (37, 64, 1.0), (1, 129, 0.0), (3, 2056, 0.0), (2, 33001, 1.0), (0, 16, 0.0))
    for rows, width, offset in sizes:
        x, residual, grad, grad_sum = (torch.randn(rows, width).to(dtype) for _ in range(4))
        weight = torch.randn(width).to(dtype if rows % 2 else torch.float32)
        rstd = torch.rand(rows) + 0.5
        yield "rms_norm", (x, weight, 1e-5, offset), dtype
        yield "add_rms_norm", (x, residual, weight, 1e-5, offset), dtype
        for weight_grad in (True, False):
            yield "rms_norm_backward", (grad, x, weight, rstd, offset, weight_grad), dtype
            yield "add_rms_norm_backward", (grad, grad_sum, x, weight, rstd, offset, weight_grad), dtype
    heads = torch.randn(9, 3, 5, 40).to(dtype)[:, :, 1:3]
    yield "rms_norm", (heads, torch.randn(40), 1e-5, 0.0), dtype


def rotations(dtype: torch.dtype) -> Iterator[Example]:
    """Whole vectors and single elements; some dimensions that are not turned; a view of a fused projection."""
    for shape, half in (((9, 3, 64), 32), ((7, 2, 10), 3), ((1, 1, 128), 64), ((5, 2, 40), 16)):
        angle = torch.randn(shape[0], half)
        for inverse in (False, True):
            yield "rope", (torch.randn(shape).to(dtype), angle.cos(), angle.sin(), inverse), dtype
    angle = torch.randn(9, 16)
    qkv = torch.randn(9, 3, 5, 32).to(dtype)
    yield "rope", (qkv[:, :, 1:4], angle.cos(), angle.sin(), False), dtype


def gates(dtype: torch.dtype) -> Iterator[Example]:
    for activation in range(3):
        for rows, width in ((3, 7), (5, 64), (1, 1), (130, 24), (0, 8)):
            x, grad = torch.randn(rows, 2 * width).to(dtype), torch.randn(rows, width).to(dtype)
            yield "glu", (x, activation), dtype
            yield "glu_backward", (grad, x, activation), dtype
        yield "glu", (torch.randn(4, 36).to(dtype)[:, :20], activation), dtype


def optimizers() -> Iterator[Example]:
    """More tensors than one launch takes, of odd sizes, longer than a chunk; bf16 and fp32 beside each other."""
    sizes = [1, 3, 4096, 9001, 17, *[5] * 150]

    def lists(dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.randn(size).to(dtype) for size in sizes]

    low = torch.bfloat16
    for grad_type, weight_type in ((low, low), (torch.float32, low), (low, torch.float32)):
        squares = [x.square() for x in lists()]
        step = (0.01, 0.9, 0.95, 1e-8, 3)
        weights = lists(weight_type)
        weights[2] = torch.empty(0)  # not wanted
        arguments = (
            lists(),
            lists(),
            squares,
            lists(grad_type),
            weights,
            torch.tensor(0.7),
            [0.1] * len(sizes),
        )
        yield "adamw_", (*arguments, *step), weight_type
        yield "square_sum", (lists(grad_type),), torch.float32


def to(value: Any, device: str) -> Any:
    """The same on a device, views as views; on the CPU fp16, which its kernels do not take, as fp32."""
    if isinstance(value, list):
        return [to(one, device) for one in value]
    if not isinstance(value, Tensor):
        return value
    if device == "cpu" and value.dtype == torch.float16:
        return value.float()
    if value.is_contiguous():
        return value.clone().to(device)
    whole = torch.empty(value.untyped_storage().nbytes() // value.itemsize, dtype=value.dtype)
    whole.set_(value.untyped_storage())
    return whole.clone().to(device).as_strided(value.shape, value.stride(), value.storage_offset())


def outputs(result: Any, arguments: tuple[Any, ...]) -> list[Tensor]:
    """What an operator gives or, where that is nothing, what it changes."""
    if result is None:
        return [
            tensor
            for value in arguments
            if isinstance(value, list)
            for tensor in value
            if torch.is_tensor(tensor)
        ]
    return [result] if isinstance(result, Tensor) else list(result)


def difference(name: str, arguments: tuple[Any, ...], device: str = "cuda") -> float:
    """The largest relative difference (of norms) between the operator on the device and on the CPU."""
    operator = getattr(torch.ops.megatune, name).default
    here, there = (tuple(to(value, place) for value in arguments) for place in ("cpu", device))
    expected, found = (outputs(operator(*values), values) for values in (here, there))
    worst = 0.0
    for one, two in zip(found, expected, strict=True):
        one, two = one.cpu().double(), two.double()
        assert one.shape == two.shape, f"{name}: {tuple(one.shape)} on the GPU, {tuple(two.shape)} on the CPU"
        worst = max(worst, ((one - two).norm() / two.norm().clamp(min=1e-30)).item() if one.numel() else 0.0)
    return worst


def operators_on_cuda() -> list[str]:
    """Names of the operators with a CUDA kernel."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    names = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    ours = [name for name in names if name.startswith("megatune::") and has_kernel(name, "CUDA")]
    return sorted(name.removeprefix("megatune::") for name in ours)


def main() -> int:
    assert ops.OPS  # the operators are defined
    if "--list" in sys.argv:
        for name in sorted({name for name, _, _ in examples()}):
            print(name)
        return 0
    problem = _load.cuda_problem()
    if problem is not None:
        print(f"nothing to call: {problem}")
        return 1
    wrong: list[str] = []
    called: dict[str, int] = {}
    for name, arguments, dtype in examples():
        called[name] = called.get(name, 0) + 1
        error = difference(name, arguments)
        if not error <= TOLERANCE[dtype]:
            wrong.append(f"{name} in {str(dtype)[6:]}: differs from the CPU by {error:.1e}")
    for name, count in sorted(called.items()):
        print(f"{name}: {count} calls")
    missing = [name for name in operators_on_cuda() if name not in called]
    if missing:
        print(f"no example in tools/cuda_once.py: {', '.join(missing)}")
    print("\n".join(wrong) or "values as on the CPU")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
