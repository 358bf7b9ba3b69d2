"""Install a wheel into an empty folder and run a training step's ops from there, in this interpreter and its torch.

    python tools/try_wheel.py megatune-*.whl

What a wheel must show wherever it goes (see setup.py): nothing of a source tree is on the path, the libraries that fit
are loaded, and each op gives what its reference gives, forward and backward, on the CPU and on a GPU if there is one.
Prints what it ran on and the body of each op; exit code 1 where something is wrong.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def install(wheel: Path, folder: Path) -> None:
    """The wheel alone: what it depends on is this interpreter's."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*command, "--target", str(folder), str(wheel)], check=True)


def calls(device: str) -> Iterator[tuple[str, list[Any], Callable[..., Any]]]:
    """(op in the registry, tensors with a gradient, a call of it)."""
    import torch

    from megatune import ops
    from megatune.ops import Segments, moe

    torch.manual_seed(0)

    def leaf(*shape: int) -> Any:
        return torch.randn(shape).to(device, torch.bfloat16).requires_grad_()

    weight, angle = leaf(64), torch.randn(9, 16, device=device)
    labels = torch.randint(40, (9,), device=device)
    segments = Segments.from_lengths([4, 5], device)
    order = moe.sort_by_expert(torch.randint(3, (9, 2), device=device), 3)
    yield "rms_norm", [leaf(9, 64), weight], lambda x, w: ops.rms_norm(x, w, 1e-5)
    yield (
        "add_rms_norm",
        [leaf(9, 64), leaf(9, 64), weight],
        lambda x, r, w: ops.add_rms_norm(x, r, w, 1e-5)[1],
    )
    yield (
        "rope",
        [leaf(9, 2, 2, 32)],
        lambda x: ops.rope(x[:, :, :1], x[:, :, 1], angle.cos(), angle.sin())[0],
    )
    yield "glu", [leaf(9, 64)], lambda x: ops.glu(x, "silu")
    yield (
        "linear_cross_entropy",
        [leaf(9, 32), leaf(40, 32)],
        lambda x, w: ops.linear_cross_entropy(x, w, labels),
    )
    yield (
        "attention",
        [leaf(9, 4, 32), leaf(9, 2, 32), leaf(9, 2, 32)],
        lambda q, k, v: ops.attention(q, k, v, segments, scale=0.2),
    )
    tokens, few = torch.randint(40, (9,), device=device), torch.full((32,), 0.5, device=device)
    yield "embedding", [leaf(40, 32)], lambda w: ops.embedding(tokens, w)
    yield (
        "rope_qk",
        [leaf(9, 2, 4, 32)],
        lambda x: ops.rope_qk(x, angle.cos(), angle.sin(), few, few, 1e-5)[0],
    )
    yield "linear_cross_entropy", [leaf(9, 40)], lambda x: ops.cross_entropy(x * 1, labels)
    yield "expert_rows", [leaf(9, 32)], lambda x: moe.permute(x, order)


def optimizer_results(device: str) -> list[Any]:
    import torch

    from megatune import ops

    torch.manual_seed(0)
    masters, moments, grads = ([torch.randn(777).to(device)] for _ in range(3))
    squares, weights = [torch.rand(777).to(device)], [torch.empty(777, device=device, dtype=torch.bfloat16)]
    options = {"decays": [0.1], "lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "step": 3, "weights": weights}
    ops.adamw_(masters, moments, squares, grads, scale=torch.tensor(0.5, device=device), **options)
    return [*masters, *moments, *squares, *weights, ops.square_sum(grads)[:1]]


def results(leaves: list[Any], call: Callable[..., Any]) -> list[Any]:
    import torch

    leaves = [x.detach().requires_grad_() for x in leaves]
    output = call(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, torch.ones_like(output))]


def wrong_on(device: str) -> list[str]:
    """Ops whose chosen body gives something else than the reference."""
    from megatune import ops

    def differ(found: list[Any], expected: list[Any]) -> bool:
        errors = [
            (a.float() - b.float()).norm() / (b.float().norm() + 1e-3)
            for a, b in zip(found, expected, strict=True)
        ]
        return not max(errors) < 2e-2

    wrong = []
    for op, leaves, call in calls(device):
        ops.configure({}, device)
        found = results(leaves, call)
        ops.configure({op: "reference"}, device)
        if differ(found, results(leaves, call)):
            wrong.append(f"{op} on {device}")
    ops.configure({}, device)
    found = optimizer_results(device)
    ops.configure({"adamw": "reference", "square_sum": "reference"}, device)
    if differ(found, optimizer_results(device)):
        wrong.append(f"adamw and square_sum on {device}")
    ops.configure({}, device)
    return wrong


def packing() -> str:
    import numpy as np

    from megatune.data import packing as module

    bins = module.best_fit(np.array([3, 5, 2, 4], dtype=np.int64), 8)
    assert bins.tolist() == [0, 0, 1, 1], bins
    return "compiled" if module._pack is not None else "in Python"


def inside(folder: str) -> int:
    import torch

    import megatune
    from megatune import ops
    from megatune.launch.show_environment import show_environment

    assert str(Path(megatune.__file__).resolve()).startswith(folder), (
        f"{megatune.__file__} is not the wheel's"
    )
    show_environment()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    wrong = [problem for device in devices for problem in wrong_on(device)]
    bodies = {body for device in devices for body in ops.chosen(device, torch.bfloat16).values()}
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, {' and '.join(devices)}: packing {packing()}"
    )
    print(f"bodies: {', '.join(sorted(bodies))}")
    print(
        "\n".join(f"WRONG: {problem}" for problem in wrong)
        or "every op called gives what its reference gives"
    )
    return 1 if wrong else 0


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--inside"]:
        return inside(arguments[1])
    if len(arguments) != 1 or not arguments[0].endswith(".whl"):
        print(__doc__)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder).resolve()
        install(Path(arguments[0]).resolve(), target)
        libraries = sorted(path.name for path in target.rglob("_*.so"))
        print(f"{Path(arguments[0]).name}: {', '.join(libraries)}", flush=True)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(target), os.environ.get("PYTHONPATH"))))
        }
        script = Path(__file__).resolve().read_text()
        (target / "try_wheel.py").write_text(script)
        command = [sys.executable, "-P", str(target / "try_wheel.py"), "--inside", str(target)]
        return subprocess.run(command, cwd=target, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
