"""Call every CUDA operator of megatune once on small odd sizes, and compare with the same operator on the CPU.

    python tools/cuda_once.py [--list]

For compute-sanitizer (tools/sanitize.py), which slows everything down: no torch.compile, no random numbers made on the
GPU, inputs copied to it so that whatever was not written is known. The arguments are those of tools/cuda_examples.py;
operators with a CUDA kernel that have none there are named. Exit code 1 where values differ.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from megatune import ops
from megatune.ops import _load
from tools.cuda_examples import examples

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


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


def outputs(operator: Any, result: Any, arguments: tuple[Any, ...]) -> list[Tensor]:
    """What an operator gives, and what it changes."""
    found = [result] if isinstance(result, Tensor) else list(result or ())
    for argument, value in zip(operator._schema.arguments, arguments, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += [value] if isinstance(value, Tensor) else value
    return found


def difference(name: str, arguments: tuple[Any, ...], device: str = "cuda") -> float:
    """The largest relative difference (of norms) between the operator on the device and on the CPU."""
    operator = getattr(torch.ops.megatune, name).default
    here, there = (tuple(to(value, place) for value in arguments) for place in ("cpu", device))
    expected, found = (outputs(operator, operator(*values), values) for values in (here, there))
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
        print(f"no example in tools/cuda_examples.py: {', '.join(missing)}")
    print("\n".join(wrong) or "values as on the CPU")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
