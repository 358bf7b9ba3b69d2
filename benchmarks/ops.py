"""Every op against the limit that this GPU reaches itself, and against what others have, at three models' sizes.

    python -m benchmarks.ops [--only OP,..] [--models MODEL,..] [--list] [--seconds 200] [--out FILE]
    python -m benchmarks.ops --table FILE

Sizes: Llama-3-8B and Qwen3-30B-A3B at 16k tokens, one of eight processes of a 70B under tensor parallelism. For each
body of an op and each rival: device time forward and backward (`benchmarks/ops_timing.py` says how), bytes or
operations a second of the least that must be done, `share` of the limit measured in the same run (the better of two
ways to copy a large tensor from device memory to device memory; for products the bare bf16 products of the same
shapes), the host's time in one plain forward call, and the relative difference of its results
(outputs and gradients) from plain PyTorch's. Work of less than 30 us at that limit is held against a copy of as many
bytes (`small_share`), too: no kernel of that length reaches the rate of a long one.

Compiling comes first, in as many processes as there are cores (`benchmarks/ops_warm.py`). Rows are written to
benchmarks/results/ops_GPU.json after each case: a run that is cut leaves what it has, and one of some models or ops
(on the same GPU, driver and torch) puts its rows in the place of those of the same model and op. At the end, and in the
file: what is below its target, and what is slower than the best of its rivals by more than 3 %. `--table` prints the
page docs/ops.md or docs/ops_h100.md of a file. `--device cpu --tiny` runs every case once anywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import ops_cases_fp8, ops_cases_loss, ops_cases_moe, ops_cases_optim  # noqa: F401 - register their cases
from benchmarks.common import RESULTS, device_name
from benchmarks.ops_cases import CASES, MODELS, TINY, Case, Other, Work, makers
from benchmarks.ops_report import line_of, page, said, verdicts
from benchmarks.ops_rivals import absent, present, rivals
from benchmarks.ops_timing import LARGE_COPY, SMALL_MS, Device, Timed, tensors_in
from benchmarks.ops_warm import configure_compiler, share, warm
from megatune import ops
from megatune.launch.show_environment import nvidia_versions

SLOW_BODIES = ("reference", "flex", "sdpa")  # on CUDA only with --all: they are not what runs there
Row = dict[str, Any]
Extent = Literal[
    "all", "first", "again"
]  # all bodies; a choice of them, at an op's first size or at another one


@dataclass(frozen=True)
class Candidate:
    """One who computes a case: a body of ours (`chosen`: whether it is the automatic choice) or a rival."""

    name: str
    other: Other
    chosen: bool | None = None
    bodies: tuple[tuple[str, str], ...] = ()  # to be configured for it


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
    count = 1 if case.forward.products else device.sets(sum(x.nbytes for x in first))
    sets = [first, *(other.prepare(case.make()) for _ in range(count - 1))]
    sets = [tuple(x.detach().requires_grad_(x.requires_grad) for x in leaves) for leaves in sets]
    has_gradient = any(x.requires_grad for x in first)
    if case.joint:
        return _measure_joint(case, other, sets, device, dtype)
    forward = [lambda leaves=leaves: other.run(*leaves) for leaves in sets]
    timed, limit = device.with_limit(forward, case.forward, dtype, first, other.graph)
    row = {"timed": timed.how, **rates("forward", timed, limit, case.forward, device)}
    row["host_us"] = device.host_microseconds(forward[0], 10 if device.type == "cuda" else 1)
    if has_gradient and case.backward is not None:
        outputs = [tensors_in(call()) for call in forward]
        grads = [seeded(one) for one in outputs]
        backward = [
            lambda out=out, leaves=leaves, grad=grad: gradients(out, leaves, grad)
            for out, leaves, grad in zip(outputs, sets, grads, strict=True)
        ]
        timed, limit = device.with_limit(backward, case.backward, dtype, first, other.graph)
        row |= rates("backward", timed, limit, case.backward, device)
    return row


def _measure_joint(
    case: Case, other: Other, sets: list[tuple[Tensor, ...]], device: Device, dtype: torch.dtype
) -> Row:
    grads: list[Tensor] = []

    def both(leaves: tuple[Tensor, ...]) -> Any:
        outputs = tensors_in(other.run(*leaves))
        if not grads:  # of a loss: 1, with which a backward pass starts
            grads.extend([torch.ones_like(x) for x in outputs] if outputs[0].dim() == 0 else seeded(outputs))
        return torch.autograd.grad(outputs, [x for x in leaves if x.requires_grad], grads)

    calls = [lambda leaves=leaves: both(leaves) for leaves in sets]
    calls[0]()
    peak = device.peak_bytes(calls[0])
    timed, limit = device.with_limit(calls, case.forward, dtype, sets[0], other.graph)
    found = rates("forward_backward", timed, limit, case.forward, device)
    return {"timed": timed.how, "peak_mib": peak / 2**20, **found}


def rates(name: str, timed: Timed, limit: float, work: Work, device: Device) -> Row:
    """Time, rate of the least work, and the share of the limit, which is in milliseconds."""
    row = {f"{name}_ms": timed.ms, f"{name}_share": limit / timed.ms}
    if work.flops:
        return row | {f"{name}_tflops": work.flops / timed.ms / 1e9}
    if limit < SMALL_MS:
        row[f"{name}_small_share"] = device.small_copy_ms(int(work.size)) / timed.ms
    return row | {f"{name}_gbytes_per_s": work.size / timed.ms / 1e6}


def bodies_of(case: Case, device_type: str, dtype: torch.dtype, extent: Extent) -> list[str]:
    """The bodies that are measured. On a GPU, if not all: none that is slow by design, and what torch.compile makes at
    an op's first size only, and not where it makes the same of the rival in plain PyTorch."""
    op = ops.OPS.get(case.registry or case.op)
    if op is None:
        return []
    fit = [name for name, body in op.bodies.items() if body.unfit(device_type, dtype) is None]
    if extent == "all" or device_type == "cpu":
        return fit
    twice = extent == "again" or (case.plain is not None and case.compiled)
    passed = (*SLOW_BODIES, "compiled") if twice and fit[0] != "compiled" else SLOW_BODIES
    return [name for name in fit if name not in passed] or fit[:1]


def candidates(case: Case, device_type: str, dtype: torch.dtype, extent: Extent) -> Iterator[Candidate]:
    """The bodies of ours, then the rivals."""
    registry, dtype = case.registry or case.op, case.dtype or dtype
    names = bodies_of(case, device_type, dtype, extent)
    best = ops.chosen(device_type, dtype).get(registry, "megatune")
    for name in names:
        yield Candidate(name, Other(case.run), name == best, ((registry, name),))
    if not names:
        yield Candidate("megatune", Other(case.run), True)
    for name, other in rivals(case, device_type):
        yield Candidate(name, other)


def truth_of(case: Case) -> list[Tensor]:
    """What results are compared with: plain PyTorch's, or ours where there is no such or it has not enough memory."""
    try:
        return results_of(case, case.plain or Other(case.run))
    except torch.OutOfMemoryError:
        return results_of(case, Other(case.run))


def rows_of(case: Case, device: Device, dtype: torch.dtype, extent: Extent) -> Iterator[Row]:
    """A row for each candidate. What fails has a row that says why."""
    with device.clock("truth"):
        truth = truth_of(case)
    for candidate in list(candidates(case, device.type, dtype, extent)):
        ops.configure(dict(candidate.bodies), device.type, case.dtype or dtype)
        row = row_of(candidate, case, device, dtype, truth)
        yield row | {"targets": case.targets} if candidate.chosen else row
    ops.configure({}, device.type)
    del truth
    with device.clock("freeing"):
        device.forget()


def row_of(candidate: Candidate, case: Case, device: Device, dtype: torch.dtype, truth: list[Tensor]) -> Row:
    row: Row = {"by": candidate.name}
    if candidate.chosen is not None:
        row = {"body": candidate.name, "chosen": candidate.chosen}
    try:
        with device.clock(f"first call, {candidate.name}"):
            row["difference"] = difference(case, candidate.other, truth)
        with device.clock("timing"):
            row |= measure(case, candidate.other, device, dtype)
    except Exception as error:  # a rival's own failure must not end the run
        row["failed"] = _said(error)
        device.forget()
    return {key: _short(value) for key, value in row.items()}


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def wanted(
    options: argparse.Namespace, dtype: torch.dtype
) -> Iterator[tuple[str, str, Extent, Callable[[], Case]]]:
    """(model, op, how much of it, what makes the case) of what is asked for."""
    seen: set[str] = set()
    for model, sizes in (TINY if options.tiny else MODELS).items():
        if not options.models or model in options.models:
            for op, make in makers(model, sizes, dtype, options.device):
                if not options.only or op in options.only:
                    yield model, op, "all" if options.all else "again" if op in seen else "first", make
                    seen.add(op)


def header(device: Device, dtype: torch.dtype) -> Row:
    return {
        "benchmark": "ops",
        "device": device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "versions": dict(nvidia_versions()),
        "dtype": str(dtype)[6:],
        "copy_gbytes_per_s": round(device.copy / 1e9, 1),
        "copies_gbytes_per_s": {name: round(rate / 1e9, 1) for name, rate in device.copies.items()},
        "empty_kernel_us": round(device.launch_ms * 1e3, 2),
        "rivals": present(device.type),
        "rivals_absent": absent(device.type),
    }


def merged(content: Row, path: Path | None) -> Row:
    """`content` with what a run before it left in the file, if that was with the same GPU, driver and torch."""
    before = json.loads(path.read_text()) if path is not None and path.exists() else {}
    keys = ("benchmark", "device", "torch", "versions", "dtype")
    same = all(before.get(key) == content[key] for key in keys)
    kept = before if same else {}
    return content | {name: kept.get(name, []) for name in ("runs", "left_out", "rows")}


def without(rows: list[Row], model: str, op: str) -> list[Row]:
    return [row for row in rows if (row["model"], row["op"]) != (model, op)]


def place_of(rows: list[Row], model: str, op: str) -> int:
    """Where that case's rows begin; behind all others, if it has none."""
    found = (number for number, row in enumerate(rows) if (row["model"], row["op"]) == (model, op))
    return next(found, len(rows))


def run(options: argparse.Namespace, path: Path) -> Row:
    """Measures what was asked for; the file has all of it after each case."""
    began = time.monotonic()
    dtype = torch.float32 if options.tiny else torch.bfloat16
    device = Device.here(options.device)
    spent: Row = {}
    if options.device == "cuda" and not options.cold:
        spent["compiling"] = warm(options.arguments, options.seconds / 2)
        print(f"compiled before: {spent['compiling']}", flush=True)
    with device.clock("limits"):
        device.measure_limits(2**16 if options.tiny else LARGE_COPY)
    content = merged(header(device, dtype), path if options.models or options.only else None)
    # Shares are of the limit of their own run; a copy's rate moves by a percent from one to the next.
    this = {"copy_gbytes_per_s": content["copy_gbytes_per_s"], "models": []}
    content["runs"] = [*content["runs"], this]
    seen: dict[tuple[str, str], str] = {}
    for model, op, extent, make in wanted(options, dtype):
        if time.monotonic() - began > options.seconds:
            left = {"model": model, "op": op, "why": "no time left"}
            if not any((row["model"], row["op"]) == (model, op) for row in content["rows"]):
                content["left_out"] = [*without(content["left_out"], model, op), left]
            continue
        case = make()
        same = seen.setdefault((op, case.shape), model)
        place = place_of(content["rows"], model, op)
        content["rows"] = without(content["rows"], model, op)
        content["left_out"] = without(content["left_out"], model, op)
        if same != model:
            content["left_out"].append({"model": model, "op": op, "why": f"the same as {same}'s"})
            continue
        print(f"{model}  {op}  {case.shape}  (after {time.monotonic() - began:.0f} s)", flush=True)
        what = {"model": model, "op": op, "shape": case.shape}
        try:
            for row in rows_of(case, device, dtype, extent):
                content["rows"].insert(place, what | row)
                place += 1
                print(line_of(row), flush=True)
        except Exception as error:  # the other ops still have their turn
            content["left_out"].append({"model": model, "op": op, "why": _said(error)})
        spent |= {name: round(seconds, 1) for name, seconds in device.spent.items()}
        this |= {"products_ms": {name: _short(ms) for name, ms in device.products.items()}}
        this |= {"seconds": round(time.monotonic() - began, 1), "seconds_of": spent}
        this["models"] = sorted({*this["models"], model})
        write(content, path)
    write(content, path)
    print("\n".join(["", *said(content["verdicts"])]))
    return content


def compile_into(options: argparse.Namespace) -> None:
    """One of the processes of `warm`."""
    dtype = torch.bfloat16

    def compiles(candidate: Candidate) -> bool:
        return candidate.name not in ("cuda", "megatune", "torch") and not candidate.name.startswith("torch ")

    def do(extent: Extent, make: Callable[[], Case]) -> None:
        case = make()
        for candidate in list(candidates(case, "cuda", dtype, extent)):
            if compiles(candidate):
                ops.configure(dict(candidate.bodies), "cuda", case.dtype or dtype)
                results_of(case, candidate.other)
        torch.cuda.empty_cache()

    jobs = (
        (f"{model} {op}", partial(do, extent, make)) for model, op, extent, make in wanted(options, dtype)
    )
    share(jobs, Path(options.compile_into))


def write(content: Row, path: Path) -> None:
    content["verdicts"] = verdicts(content["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(unfinished, path)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def names(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("--only", type=names, help="ops, with commas between them")
    parser.add_argument("--models", type=names, help=f"of {', '.join(MODELS)}")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--table", type=Path, help="print the page of a result file and stop")
    parser.add_argument("--all", action="store_true", help="the bodies too that are not meant for a GPU")
    parser.add_argument("--seconds", type=float, default=200, help="begin no new case after that")
    parser.add_argument("--cold", action="store_true", help="compile each kernel when its turn comes")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a few numbers in fp32 instead of models' sizes")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--compile-into", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.arguments = sys.argv[1:] if arguments is None else arguments
    for model in options.models or ():
        if model not in MODELS:
            parser.error(f"--models has {model!r}, must be of {', '.join(MODELS)}")
    known = {op for _, op, _ in CASES}
    for op in options.only or ():
        if op not in known:
            parser.error(f"--only has {op!r}, must be of {', '.join(sorted(known))}")
    here = options.list or options.table or options.device == "cpu"
    if not here and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --tiny runs every case once")
    return options


def main(arguments: list[str] | None = None) -> Row:
    options = parsed(arguments)
    if options.table:
        print(page(json.loads(options.table.read_text()), options.table.as_posix()), end="")
        return {}
    if options.list:
        for model, op, *_ in wanted(options, torch.bfloat16):
            print(f"{model:<16}{op}")
        return {}
    if options.device == "cpu":
        return run(options, options.out or RESULTS / "ops_cpu_tiny.json")
    configure_compiler()
    with torch.cuda.stream(torch.cuda.Stream()):
        if options.compile_into:
            compile_into(options)
            return {}
        name = re.sub(r"\W+", "_", device_name().removeprefix("NVIDIA ").lower())
        return run(options, options.out or RESULTS / f"ops_{name}.json")


if __name__ == "__main__":
    main()
