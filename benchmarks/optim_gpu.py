"""Optimizers on one GPU: our bodies, torch's, and others' where they are installed, over a Llama's list of shards.

    python -m benchmarks.optim_gpu [--shards 8] [--out FILE]

The tensors of Llama-3-8B, each divided by `--shards` (8: one thousand million elements, 291 tensors; one layer's are
in `python -m benchmarks.ops`). Milliseconds on the GPU, medians of calls one after the other; `host_ms` is what one
call takes on the host. Bytes are those that must move: each input once, each output once. `share`: of the bandwidth of
a large copy in the same run. What is left out, and why, is in the file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.common import RESULTS, device_name
from benchmarks.ops_timing import Device
from megatune import ops
from megatune.launch.show_environment import nvidia_versions

LR, BETAS, EPS, DECAY = 1e-4, (0.9, 0.95), 1e-8, 0.1
Step = Callable[[], Any]


def sizes(shards: int) -> list[int]:
    """Elements of each tensor's shard."""
    width, mlp, vocabulary = 4096, 14336, 128256
    layer = [(width + 2048) * width, width * width, 2 * mlp * width, mlp * width, width, width]
    return [size // shards for size in [*layer * 32, width, vocabulary * width, vocabulary * width]]


class Lists:
    """Masters, gradients in both dtypes, weights in bf16, and moments of zeros when they are asked for."""

    def __init__(self, shards: int) -> None:
        self.sizes = sizes(shards)
        self.elements = sum(self.sizes)
        self.masters = [torch.randn(size, device="cuda") for size in self.sizes]
        self.low = [torch.randn(size, device="cuda", dtype=torch.bfloat16) for size in self.sizes]
        self.wide = [one.float() for one in self.low]
        self.weights = [torch.empty_like(one) for one in self.low]
        self.decays = [DECAY if size > 4096 else 0.0 for size in self.sizes]
        self.scale = torch.full((), 0.5, device="cuda")
        self.common: dict[str, Any] = {"scale": self.scale, "decays": self.decays, "lr": LR, "betas": BETAS}
        self.adam = {**self.common, "eps": EPS, "step": 10}

    def moments(self) -> list[torch.Tensor]:
        return [torch.zeros_like(one) for one in self.masters]

    def eight(self) -> list[list[torch.Tensor]]:
        """Codes and scales of both moments, of zeros."""
        found = []
        for zero in (127, 0):
            found.append([torch.full_like(one, zero, dtype=torch.uint8) for one in self.masters])
            found.append([one.new_zeros(-(-one.numel() // 256)) for one in self.masters])
        return found


# Each case yields (name, bytes an element, what it runs); what it holds is free when the next one is asked for.
Cases = Iterator[tuple[str, float, Step]]


def adamw(t: Lists) -> Cases:
    m, v = t.moments(), t.moments()
    for body in bodies("adamw"):
        for grads, width in ((t.low, 2), (t.wide, 4)):
            lists = (t.masters, m, v, grads)
            yield (
                f"adamw {body}, {'bf16' if width == 2 else 'fp32'} gradient, bf16 weight out",
                26 + width,
                configured(
                    "adamw", body, lambda lists=lists: ops.adamw_(*lists, weights=t.weights, **t.adam)
                ),
            )
        yield (
            f"norm, clip factor, adamw {body}, fp32 gradient, bf16 weight out",
            34,
            configured("adamw", body, lambda: whole_step(t, m, v), norm=body),
        )


def whole_step(t: Lists, m: list[torch.Tensor], v: list[torch.Tensor]) -> None:
    """Norm, clip factor and update with nothing on the host in between."""
    norm = ops.square_sum(t.wide)[0].sqrt()
    scale = (1.0 / (norm + 1e-6)).clamp(max=1.0).float()
    ops.adamw_(t.masters, m, v, t.wide, weights=t.weights, **t.adam | {"scale": scale})


def torch_optimizers(t: Lists) -> Cases:
    parameters = [torch.nn.Parameter(one) for one in t.masters]
    for p, grad in zip(parameters, t.wide, strict=True):
        p.grad = grad
    for kind in ("fused", "foreach"):
        groups = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, kind: True}
        optimizer = torch.optim.AdamW(parameters, **groups)
        yield f"torch AdamW {kind} alone, fp32 gradient", 28, optimizer.step

        def chain(step: Step = optimizer.step) -> None:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
            step()
            torch._foreach_copy_(t.weights, t.masters)

        yield f"torch norm, clip, AdamW {kind}, copy to bf16", 34, chain
        del optimizer, chain


def apex(t: Lists) -> Cases:
    from apex.optimizers import FusedAdam

    parameters = [torch.nn.Parameter(one) for one in t.masters]
    for p, grad in zip(parameters, t.wide, strict=True):
        p.grad = grad
    optimizer = FusedAdam(parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, adam_w_mode=True)
    yield "apex FusedAdam alone, fp32 gradient", 28, optimizer.step


def adamw_8bit(t: Lists) -> Cases:
    states = t.eight()
    for body in bodies("adamw_8bit"):
        if body == "reference":
            continue  # seconds a call
        for grads, width in ((t.low, 2), (t.wide, 4)):
            lists = (t.masters, *states, grads)
            yield (
                f"adamw_8bit {body}, {'bf16' if width == 2 else 'fp32'} gradient, bf16 weight out",
                14 + width + 4 * 4 / 256,
                configured(
                    "adamw_8bit",
                    body,
                    lambda lists=lists: ops.adamw_8bit_(*lists, weights=t.weights, **t.adam),
                ),
            )


def bitsandbytes(t: Lists) -> Cases:
    from bitsandbytes.optim import AdamW8bit

    parameters = [torch.nn.Parameter(one) for one in t.masters]
    for p, grad in zip(parameters, t.wide, strict=True):
        p.grad = grad
    optimizer = AdamW8bit(parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    yield "bitsandbytes AdamW8bit, fp32 gradient", 16 + 4 * 4 / 256, optimizer.step


def adamw_bf16(t: Lists) -> Cases:
    masters, m, v = [one.bfloat16() for one in t.masters], t.moments(), t.moments()
    keys = list(range(len(masters)))
    for body in bodies("adamw_bf16"):
        if body != "reference":
            yield (
                f"adamw_bf16 {body}, bf16 gradient and masters",
                22,
                configured(
                    "adamw_bf16", body, lambda: ops.adamw_bf16_(masters, m, v, t.low, keys=keys, **t.adam)
                ),
            )


def lion(t: Lists) -> Cases:
    m = t.moments()
    for body in bodies("lion"):
        yield (
            f"lion {body}, bf16 gradient, bf16 weight out",
            20,
            configured("lion", body, lambda: ops.lion_(t.masters, m, t.low, weights=t.weights, **t.common)),
        )


def norms(t: Lists) -> Cases:
    for grads, width in ((t.wide, 4), (t.low, 2)):
        kind = "fp32" if width == 4 else "bf16"
        for body in bodies("square_sum"):
            step = configured("square_sum", body, lambda grads=grads: ops.square_sum(grads))
            yield f"square_sum {body}, {kind}", width, step
        yield f"torch foreach_norm, {kind}", width, lambda grads=grads: torch.nn.utils.get_total_norm(grads)


def bodies(op: str) -> list[str]:
    return [body.name for body in ops.OPS[op].bodies.values() if body.unfit("cuda", torch.float32) is None]


def configured(op: str, body: str, step: Step, norm: str | None = None) -> Step:
    """The step with this body of the op (and of the norm, where it has one of that name)."""

    def run() -> None:
        step()

    run.bodies = {op: body} | ({"square_sum": norm} if norm in bodies("square_sum") else {})
    return run


def measure(t: Lists) -> tuple[list[dict[str, Any]], dict[str, str], float]:
    device = Device.here("cuda")
    device.measure_limits()
    copied = device.copy / 1e9
    rows, left_out = [], {}
    for cases in (adamw, torch_optimizers, apex, adamw_8bit, bitsandbytes, adamw_bf16, lion, norms):
        try:
            for name, width, step in cases(t):
                ops.configure(getattr(step, "bodies", {}), "cuda")
                (gpu,) = device.steady([step])
                host = device.host_microseconds(step, 3) / 1e3
                rate = width * t.elements / gpu / 1e6
                share = round(rate / copied, 3)
                rows.append({"name": name, "ms": round(gpu, 3), "host_ms": round(host, 2), "bytes": width}
                            | {"gigabytes_a_second": round(rate, 1), "share": share})  # fmt: skip
                print(
                    f"{name:<66}{gpu:>9.3f} ms  {rate:>8.1f} GB/s  {share:>6.3f} of copy  host {host:.2f} ms"
                )
        except ImportError as error:
            left_out[cases.__name__] = str(error)
            print(f"{cases.__name__} is left out: {error}")
        torch.cuda.empty_cache()
    ops.configure({}, "cuda")
    return rows, left_out, copied


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--out", default=str(RESULTS / "optim_gpu.json"))
    options = parser.parse_args()
    tensors = Lists(options.shards)
    with torch.cuda.stream(torch.cuda.Stream()):  # graphs are not captured on the default one
        rows, left_out, copied = measure(tensors)
    facts = {
        "benchmark": "optim_gpu",
        "device": device_name(),
        "torch": torch.__version__,
        "versions": dict(nvidia_versions()),
        "elements": tensors.elements,
        "tensors": len(tensors.sizes),
        "copy_gigabytes_a_second": round(copied, 1),
        "left_out": left_out,
        "rows": rows,
    }
    with open(options.out, "w") as file:
        file.write(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
