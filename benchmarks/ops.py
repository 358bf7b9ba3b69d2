"""Every op against the limit that this GPU reaches itself, and against what others have, at three models' sizes.

    python -m benchmarks.ops [--only OP,..] [--models MODEL,..] [--list] [--seconds 140] [--out FILE]

Sizes: Llama-3-8B and Qwen3-30B-A3B at 16k tokens, one of eight processes of a 70B under tensor parallelism. For each
body of an op and each rival: device time forward and backward (`benchmarks/ops_timing.py` says how), bytes or
operations a second of the least that must be done, `share` of the limit measured in the same run (a large copy from
device memory to device memory; for products the bare bf16 products of the same shapes), the host's time in one plain
forward call, and the relative difference of its results (outputs and gradients) from plain PyTorch's. Rows are
written to benchmarks/results/ops_GPU.json after each op: a run that is cut leaves what it has. `--device cpu --tiny`
runs every case once anywhere.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import benchmarks.ops_cases_more  # noqa: F401  (its cases)
from benchmarks.common import RESULTS, device_name
from benchmarks.ops_cases import MODELS, TINY, Case, Other, Work, cases
from benchmarks.ops_rivals import absent, present, rivals
from benchmarks.ops_timing import Device, tensors_in
from megatune import ops
from megatune.launch.show_environment import nvidia_versions

SLOW_BODIES = ("reference", "flex", "sdpa")  # on CUDA only with --all: they are not what runs there
Row = dict[str, Any]


def gradients(outputs: list[Tensor], leaves: Iterable[Tensor], grads: list[Tensor]) -> tuple[Tensor, ...]:
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return torch.autograd.grad(outputs, wanted, grads, retain_graph=True)


def seeded(like: list[Tensor]) -> list[Tensor]:
    """Gradients for outputs, the same numbers each time."""
    torch.manual_seed(1)
    return [torch.randn_like(x) for x in like]


def results_of(case: Case, other: Other) -> list[Tensor]:
    """Outputs and gradients of an implementation in the layout of ours, for inputs that are always the same."""
    torch.manual_seed(0)
    leaves = case.make()
    outputs = tensors_in(other.same(other.run(*other.prepare(leaves))))
    if not any(leaf.requires_grad for leaf in leaves):
        return [x.detach().clone() for x in outputs]
    return [*(x.detach() for x in outputs), *gradients(outputs, leaves, seeded(outputs))]


def difference(case: Case, other: Other, truth: list[Tensor]) -> float:
    """The largest relative difference (of norms) from the results `truth`; infinite for another number of them."""
    found = results_of(case, other)
    if [x.shape for x in found] != [x.shape for x in truth]:
        return float("inf")
    pairs = [(a.float(), b.float()) for a, b in zip(found, truth, strict=True)]
    return max(((a - b).norm() / b.norm().clamp(min=1e-20)).item() for a, b in pairs)


def measure(case: Case, other: Other, device: Device, dtype: torch.dtype) -> Row:
    """Times of one implementation."""
    first = other.prepare(case.make())
    # Leaves as such: what made them is not part of the op.
    count = device.sets(sum(x.nbytes for x in first))
    sets = [first, *(other.prepare(case.make()) for _ in range(count - 1))]
    sets = [tuple(x.detach().requires_grad_(x.requires_grad) for x in leaves) for leaves in sets]
    has_gradient = any(x.requires_grad for x in first)
    if case.joint:
        return _measure_joint(case, other, sets, device, dtype)
    forward = [lambda leaves=leaves: other.run(*leaves) for leaves in sets]
    taken, how = device.milliseconds(forward)
    row = {"forward_ms": taken, "timed": how, "host_us": device.host_microseconds(forward[0])}
    row |= rates("forward", taken, case.forward, device, dtype)
    if has_gradient and case.backward is not None:
        outputs = [tensors_in(call()) for call in forward]
        grads = [seeded(one) for one in outputs]
        backward = [
            lambda out=out, leaves=leaves, grad=grad: gradients(out, leaves, grad)
            for out, leaves, grad in zip(outputs, sets, grads, strict=True)
        ]
        row["backward_ms"], _ = device.milliseconds(backward)
        row |= rates("backward", row["backward_ms"], case.backward, device, dtype)
    return row


def _measure_joint(
    case: Case, other: Other, sets: list[tuple[Tensor, ...]], device: Device, dtype: torch.dtype
) -> Row:
    def both(leaves: tuple[Tensor, ...]) -> Any:
        output = other.run(*leaves)
        return torch.autograd.grad(output, leaves)

    calls = [lambda leaves=leaves: both(leaves) for leaves in sets[:1]]
    peak = device.peak_bytes(calls[0])
    taken, how = device.milliseconds(calls)
    return {
        "forward_backward_ms": taken,
        "timed": how,
        "peak_mib": peak / 2**20,
        **rates("forward_backward", taken, case.forward, device, dtype),
    }


def rates(name: str, taken: float, work: Work, device: Device, dtype: torch.dtype) -> Row:
    """Rate of the least work, and the share of the limit."""
    share = {f"{name}_share": device.limit_ms(work, dtype) / taken}
    if work.flops:
        return share | {f"{name}_tflops": work.flops / taken / 1e9}
    return share | {f"{name}_gbytes_per_s": work.size / taken / 1e6}


def bodies_of(case: Case, device: Device, dtype: torch.dtype, everything: bool) -> list[str]:
    op = ops.OPS.get(case.registry or case.op)
    if op is None:
        return []
    fit = [name for name, body in op.bodies.items() if body.unfit(device.type, dtype) is None]
    if everything or device.type == "cpu":
        return fit
    return [name for name in fit if name not in SLOW_BODIES] or fit[:1]


def truth_of(case: Case) -> list[Tensor]:
    """What results are compared with: plain PyTorch's, or ours where there is no such or it has not enough memory."""
    try:
        return results_of(case, case.plain or Other(case.run))
    except torch.OutOfMemoryError:
        return results_of(case, Other(case.run))


def rows_of(
    case: Case, device: Device, dtype: torch.dtype, everything: bool, compiled: bool
) -> Iterable[Row]:
    """A row for each body of ours, then one for each rival. What fails has a row that says why."""
    registry = case.registry or case.op
    names = bodies_of(case, device, dtype, everything)
    chosen = ops.chosen(device.type, dtype).get(registry, "megatune")
    ours = Other(case.run)
    truth = truth_of(case)
    for name in names or ["megatune"]:
        with_body = {registry: name} if names else {}
        ops.configure(with_body, device.type, dtype)
        yield _row(name, name == chosen, case, ours, device, dtype, truth)
    ops.configure({}, device.type)
    for name, other in rivals(case, device.type, compiled):
        yield _row(name, None, case, other, device, dtype, truth)


def _row(
    name: str,
    chosen: bool | None,
    case: Case,
    other: Other,
    device: Device,
    dtype: torch.dtype,
    truth: list[Tensor],
) -> Row:
    row: Row = {"by": name} if chosen is None else {"body": name, "chosen": chosen}
    try:
        row["difference"] = difference(case, other, truth)
        row |= measure(case, other, device, dtype)
    except Exception as error:  # a rival's own failure must not end the run
        row["failed"] = _said(error)
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    return {key: _short(value) for key, value in row.items()}


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def line_of(row: Row) -> str:
    name = row.get("body") or row["by"]
    parts = [f"{name:<18}" + ("<- chosen" if row.get("chosen") else "         ")]
    for what in ("forward", "backward", "forward_backward"):
        if f"{what}_ms" in row:
            parts.append(f"{what} {row[f'{what}_ms']:>8.4g} ms {row[f'{what}_share']:>6.1%}")
    if "host_us" in row:
        parts.append(f"host {row['host_us']:.0f} us")
    parts.append(row.get("failed") or f"differs {row['difference']:.1e}")
    return "    " + "  ".join(parts)


def run(options: argparse.Namespace, write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measures what was asked for; `write` is called with the whole content after each op."""
    began = time.monotonic()
    dtype = torch.float32 if options.tiny else torch.bfloat16
    device = Device.here(options.device)
    device.measure_copy(2**16 if options.tiny else 2**31)
    content: dict[str, Any] = {
        "benchmark": "ops",
        "device": device_name() if options.device == "cuda" else "CPU",
        "torch": torch.__version__,
        "versions": dict(nvidia_versions()),
        "dtype": str(dtype)[6:],
        "copy_gbytes_per_s": round(device.copy / 1e9, 1),
        "rivals": present(options.device),
        "rivals_absent": absent(options.device),
        "left_out": [],
        "rows": [],
    }
    seen: set[str] = set()  # torch.compile is a rival at an op's first size: each size takes it seconds
    for model, sizes in (TINY if options.tiny else MODELS).items():
        if options.models and model not in options.models:
            continue
        for case in cases(model, sizes, dtype, options.device):
            if options.only and case.op not in options.only:
                continue
            if time.monotonic() - began > options.seconds:
                content["left_out"].append(f"{model} {case.op}: no time left")
                continue
            print(f"{model}  {case.op}  {case.shape}", flush=True)
            compiled = case.op not in seen
            seen.add(case.op)
            what = {"model": model, "op": case.op, "shape": case.shape}
            try:
                for row in rows_of(case, device, dtype, options.all, compiled):
                    content["rows"].append(what | row)
                    print(line_of(row), flush=True)
            except Exception as error:  # the other ops still have their turn
                content["left_out"].append(f"{model} {case.op}: {_said(error)}")
            products = {name: _short(ms) for name, ms in device.products.items()}
            content |= {"products_ms": products, "seconds": round(time.monotonic() - began, 1)}
            write(content)
    return content


def write_to(path: Path) -> Callable[[dict[str, Any]], None]:
    def write(content: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(unfinished, path)

    return write


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def names(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("--only", type=names, help="ops, with commas between them")
    parser.add_argument("--models", type=names, help=f"of {', '.join(MODELS)}")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--all", action="store_true", help="the bodies too that are not meant for a GPU")
    parser.add_argument("--seconds", type=float, default=140, help="begin no new op after that")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a few numbers in fp32 instead of models' sizes")
    parser.add_argument("--out")
    options = parser.parse_args(arguments)
    for model in options.models or ():
        if model not in MODELS:
            parser.error(f"--models has {model!r}, must be of {', '.join(MODELS)}")
    if not options.list and options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --tiny runs every case once")
    return options


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parsed(arguments)
    if options.list:
        for model, sizes in TINY.items():
            for case in cases(model, sizes, torch.float32, "cpu"):
                print(f"{model:<16}{case.op}")
        return {}
    name = (
        re.sub(r"\W+", "_", device_name().removeprefix("NVIDIA ").lower())
        if options.device == "cuda"
        else "cpu"
    )
    write = write_to(Path(options.out) if options.out else RESULTS / f"ops_{name}.json")
    if options.device == "cpu":
        return run(options, write)
    torch._dynamo.config.recompile_limit = 64  # one function at many sizes
    with torch.cuda.stream(torch.cuda.Stream()):
        return run(options, write)


if __name__ == "__main__":
    main()
