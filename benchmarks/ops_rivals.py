"""Other libraries' kernels for the cases of `ops_cases`. None of the libraries is a dependency: what cannot be imported
is named in the results, with the reason.

A new rival is one function here, `@rival(OP, .., package=NAME)`, that makes an `Other` of a case and imports its
library itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops_cases import Case, Other, Tensors, halves
from megatune.ops import quant
from megatune.ops.optim import code_values
from megatune.optim.muon import COEFFICIENTS, STEPS

# Looked for and not used here, in the versions of November 2026. Those of `RIVALS` are left out where they import.
NO_USE = {
    "quack": "quack-kernels 0.6.5 needs nvidia-cutlass-dsl, whose wheel for CUDA 13 alone has 92 MB: more than can be "
    "brought to the machine",
    "transformer_engine": "transformer-engine-torch is source only and wants cuDNN's headers and the 277 MB wheel "
    "transformer-engine-cu13",
    "apex": "PyPI's package apex is another project, and NVIDIA's has no wheels",
    "torchao": "0.18 has no kernel for any of these ops but the 8-bit optimizer, which it makes with torch.compile",
}

Maker = Callable[[Case], Other]
RIVALS: dict[str, list[tuple[str, str, Maker]]] = {}  # op -> (name in the results, package, maker)


def rival(*op_names: str, package: str, name: str = "") -> Callable[[Maker], Maker]:
    def register(maker: Maker) -> Maker:
        for op in op_names:
            RIVALS.setdefault(op, []).append((name or package, package, maker))
        return maker

    return register


def problem(package: str, device: str) -> str | None:
    """Why a library cannot be used here, None if it can."""
    if package == "torch":
        return None
    if device != "cuda":
        return "its kernels are for GPUs"
    try:
        import_module(package)
    except Exception as error:  # libraries fail to load in ways of their own
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    return None


def absent(device: str) -> dict[str, str]:
    """{library: why it is not among the rivals}."""
    packages = sorted({package for makers in RIVALS.values() for _, package, _ in makers})
    reasons = {package: problem(package, device) for package in packages}
    return NO_USE | {package: reason for package, reason in reasons.items() if reason is not None}


def present(device: str) -> dict[str, str]:
    """{library: version} of the rivals that are here."""
    found = {}
    for package in sorted({package for makers in RIVALS.values() for _, package, _ in makers}):
        if problem(package, device) is None:
            try:
                found[package] = version(package.replace("_", "-"))
            except PackageNotFoundError:
                found[package] = "?"
    return found


def rivals(case: Case, device: str) -> Iterator[tuple[str, Other]]:
    """(name, implementation) of all others for a case, plain PyTorch first, on a GPU also through torch.compile."""
    if case.plain is not None:
        yield case.plain_name, case.plain
        if case.compiled and device == "cuda":
            fused = torch.compile(case.plain.run, dynamic=False)
            yield "torch.compile", Other(fused, case.plain.prepare, case.plain.same)
    for name, package, make in RIVALS.get(case.op, ()):
        if problem(package, device) is None:
            yield name, make(case)


@rival("rms_norm", "qk_norm", package="torch", name="F.rms_norm")
def torch_norm(case: Case) -> Other:
    return Other(lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-5))


@rival("rms_norm", "qk_norm", package="liger_kernel")
def liger_norm(case: Case) -> Other:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction as Norm

    return Other(
        lambda x, weight: Norm.apply(x, weight, 1e-5, 0.0, "llama", False),
        prepare=lambda leaves: (leaves[0].contiguous(), leaves[1]),
    )


@rival("add_rms_norm", package="liger_kernel")
def liger_add_norm(case: Case) -> Other:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction as Norm

    return Other(
        lambda x, residual, weight: Norm.apply(x, residual, weight, 1e-5, 0.0, "llama", False),
        same=lambda outputs: (outputs[1], outputs[0]),
    )


@rival("rope", package="liger_kernel")
def liger_rope(case: Case) -> Other:
    """In place, on q and k that lie apart."""
    from liger_kernel.ops.rope import LigerRopeFunction as Rope

    cos, sin = case.facts["cos"][None], case.facts["sin"][None]

    def prepare(leaves: Tensors) -> Tensors:
        q, k = leaves[0].flatten(1, 2), leaves[1]
        return tuple(x.clone(memory_format=torch.contiguous_format)[None].transpose(1, 2) for x in (q, k))

    def same(outputs: Tensors) -> Tensors:
        q, k = (x[0].transpose(0, 1) for x in outputs)
        return q.unflatten(1, (k.shape[1], -1)), k

    return Other(lambda q, k: Rope.apply(q, k, cos, sin), prepare, same)


@rival("swiglu", package="liger_kernel")
def liger_swiglu(case: Case) -> Other:
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction as Glu

    return Other(lambda x: Glu.apply(x, False), prepare=lambda leaves: (halves(*leaves),))


@rival("geglu", package="liger_kernel")
def liger_geglu(case: Case) -> Other:
    """Its backward pass writes over its inputs."""
    from liger_kernel.ops.geglu import LigerGELUMulFunction as Glu

    def prepare(leaves: Tensors) -> Tensors:
        return leaves[0][:, 0::2].contiguous(), leaves[0][:, 1::2].contiguous()

    return Other(Glu.apply, prepare)


@rival("linear_cross_entropy", package="liger_kernel")
def liger_loss(case: Case) -> Other:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Loss

    labels = case.facts["labels"]

    def run(x: Tensor, head: Tensor) -> Tensor:
        options = (None, None, -100, 0.0, 0.0, "sum", None, False, torch.float32)  # gradients summed in fp32
        return Loss.apply(x, head, labels, *options)[0]

    return Other(run)


@rival("cross_entropy", package="liger_kernel")
def liger_given_logits(case: Case) -> Other:
    """It too writes the gradient over the logits."""
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction as Loss

    labels = case.facts["labels"]
    return Other(lambda logits: Loss.apply(logits, labels, None, -100, 0.0, 0.0, "sum")[0])


@rival("linear_cross_entropy", package="cut_cross_entropy")
def cut_loss(case: Case) -> Other:
    """Without gradients of small probabilities, its default."""
    from cut_cross_entropy import linear_cross_entropy

    labels = case.facts["labels"]
    return Other(lambda x, head: linear_cross_entropy(x, head, labels, reduction="sum"))


def _nf4_state(parts: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype, codes: Tensors) -> Any:
    """bitsandbytes' state of a weight in nf4 with scales in 8 bits: (scales, their scales, offset)."""
    from bitsandbytes.functional import QuantState

    scales, nested, offset = parts
    inner = QuantState(absmax=nested, code=codes[0], blocksize=quant.NESTED, dtype=torch.float32)
    return QuantState(scales, torch.Size(shape), codes[1], quant.BLOCK, "nf4", dtype, offset, inner)


def _nf4_codes() -> Tensors:
    return quant.dynamic_code().cuda(), torch.tensor(quant.NF4, device="cuda")


@rival("nf4_dequantise", package="bitsandbytes")
def bitsandbytes_nf4(case: Case) -> Other:
    from bitsandbytes.functional import dequantize_4bit

    codes = _nf4_codes()

    def run(packed: Tensor, *parts: Tensor) -> Tensor:
        state = _nf4_state(parts, case.facts["shape"], case.facts["dtype"], codes)
        return dequantize_4bit(packed.view(-1, 1), state)

    return Other(run)


def on_default_stream(run: Callable[..., Any]) -> Other:
    """bitsandbytes' optimizers work on CUDA's default stream, whatever the current one is."""

    def ordered(*leaves: Tensor) -> Any:
        here, there = torch.cuda.current_stream(), torch.cuda.default_stream()
        there.wait_stream(here)
        with torch.cuda.stream(there):
            made = run(*leaves)
        here.wait_stream(there)
        return made

    return Other(ordered, graph=False)


@rival("lion", package="bitsandbytes")
def bitsandbytes_lion(case: Case) -> Other:
    """A call for each tensor; without the clip factor, which it wants on the host, and with a copy to bf16."""
    from bitsandbytes.functional import optimizer_update_32bit

    def run(*leaves: Tensor) -> Tensors:
        count = (len(leaves) - 1) // 4
        masters, moments, grads, weights = (leaves[i * count : (i + 1) * count] for i in range(4))
        for p, m, grad in zip(masters, moments, grads, strict=True):
            optimizer_update_32bit(
                "lion", grad, p, m, 0.9, 0.0, 10, 1e-3, None, 0.95, weight_decay=0.1, gnorm_scale=0.7
            )
        torch._foreach_copy_(weights, masters)
        return (*masters, *moments, *weights)

    return on_default_stream(run)


@rival("adamw_8bit", package="bitsandbytes")
def bitsandbytes_adamw_8bit(case: Case) -> Other:
    """As bitsandbytes' Lion here."""
    from bitsandbytes.functional import optimizer_update_8bit_blockwise

    def run(*leaves: Tensor) -> Tensors:
        count = case.facts["tensors"]
        lists = [leaves[i * count : (i + 1) * count] for i in range(7)]
        device = leaves[0].device
        if "codes" not in tables:
            tables["codes"] = tuple(code_values(signed, device)[0] for signed in (True, False))
        signed, unsigned = tables["codes"]
        masters, _, _, _, weights, _, _ = lists
        for p, m, v, grad, _, m_scales, v_scales in zip(*lists, strict=True):
            optimizer_update_8bit_blockwise(
                "adam", grad, p, m, v, 0.9, 0.95, 0.0, 0.0, 1e-8, 10, 1e-3, signed, unsigned, m_scales, v_scales,
                weight_decay=0.1, gnorm_scale=0.7,
            )  # fmt: skip
        torch._foreach_copy_(weights, masters)
        return (*masters, *lists[5], *lists[6], *weights)

    tables: dict[str, Tensors] = {}
    return on_default_stream(run)


@rival("nf4_linear", package="bitsandbytes")
def bitsandbytes_nf4_linear(case: Case) -> Other:
    from bitsandbytes import matmul_4bit

    weight = case.facts["weight"]
    packed, *parts = weight.buffers()
    state = _nf4_state(parts, tuple(weight.shape), weight.dtype, _nf4_codes())
    return Other(lambda x: matmul_4bit(x, packed.view(-1, 1).t(), quant_state=state))


@rival("muon", package="torch", name="torch.optim.Muon")
def torch_muon(case: Case) -> Other:
    """It multiplies in bf16 too, and leaves the result so."""
    from torch.optim._muon import _zeropower_via_newtonschulz as orthogonal

    return Other(lambda x: orthogonal(x, COEFFICIENTS, STEPS, 1e-7))
