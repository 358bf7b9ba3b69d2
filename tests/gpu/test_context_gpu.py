"""Context parallelism on GPUs: FlashAttention's blocks against the reference, ring and Ulysses over NCCL."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatune import ops, parallel
from megatune.config.schema import ParallelConfig
from megatune.ops import Segments, Targets
from megatune.ops import attention_blocks as blocks
from megatune.ops.attention_blocks import Block
from megatune.parallel import context
from megatune.parallel.ring_plan import plan_of
from megatune.parallel.world import Axis
from tests.helpers.dist import run_ranks
from tests.helpers.ops import compare, need_body, relative_error

pytestmark = pytest.mark.gpu
DOCUMENTS = [[768], [30, 96, 5, 253, 64, 320], [96, 96, 192, 384]]
TOLERANCE = 8e-3  # one or two roundings to bf16


def all_blocks() -> list[Block]:
    """Every block of every process of four, with and without windows, and the smallest ones."""
    found = []
    for lengths in DOCUMENTS:
        segments = Segments.from_lengths(lengths, "cuda")
        for window in (None, 50, 150):
            for rank in range(4):
                plan = plan_of(segments, rank, 4, window)
                found += [m.block for part in (plan.own, *(r.meetings for r in plan.rounds)) for m in part]
    for queries, keys in ((1, 37), (37, 1), (1, 1)):
        borders = [torch.tensor([0, n], dtype=torch.int32, device="cuda") for n in (queries, keys)]
        found.append(Block((queries,), (keys,), *borders))
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(6, 2, 64, 64), (2, 2, 128, 128), (2, 2, 192, 128), (4, 1, 20, 24)])
def test_flash_blocks(heads: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Forward and backward, the latter for an output and a log-sum-exp over more keys than the block's."""
    need_body("attention_block", "flash", dtype, "cuda")
    heads_q, heads_k, dim, value_dim = heads
    scale = dim**-0.5
    for block in all_blocks():
        sizes = ((block.queries, heads_q, dim), (block.keys, heads_k, dim), (block.keys, heads_k, value_dim))
        q, k, v = (
            torch.randn(sum(rows), count, width, device="cuda").to(dtype) for rows, count, width in sizes
        )
        out, lse = blocks.flash(q, k, v, block, scale, None)
        truth, true_lse = blocks.reference(q.double(), k.double(), v.double(), block, scale, None)
        what = f"{block.queries} {block.keys} {block.left} {block.right}"
        assert lse.shape == true_lse.shape and lse.dtype == torch.float32
        assert relative_error(out, truth) < TOLERANCE, what
        assert (lse - true_lse).abs().max() < 1e-2, what
        grad = torch.randn_like(truth).to(dtype)
        whole, whole_lse = (truth * 0.7).to(dtype), true_lse + 0.4
        actual = blocks.flash_backward(grad, q, k, v, whole, whole_lse.float(), block, scale, None)
        wide = (x.double() for x in (grad, q, k, v, whole))
        expected = blocks.reference_backward(*wide, whole_lse, block, scale, None)
        for name, value, right in zip("qkv", actual, expected, strict=True):
            assert value.shape == right.shape
            # A query with one key and its own softmax has a gradient of 0 but for rounding.
            assert (value - right).norm() < 2 * TOLERANCE * right.norm() + 1e-3, f"{name} {what}"


@pytest.mark.parametrize("options", [{}, {"window": 40}])
@pytest.mark.parametrize("dims", [(64, 64), (192, 128), (64, 128)])
@pytest.mark.parametrize(
    ("body", "sunk"), [("varlen", True), ("varlen", False), ("sdpa", False), ("flex", False)]
)
def test_sinks_and_values_of_another_width(
    body: str, sunk: bool, dims: tuple[int, int], options: dict[str, int]
) -> None:
    need_body("attention", body, torch.bfloat16, "cuda", (*options, *(["sinks"] if sunk else [])))
    lengths = [5, 130, 1, 64, 200]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *sinks: torch.Tensor) -> torch.Tensor:
        segments = Segments.from_lengths(lengths, q.device)
        more = {"sinks": sinks[0]} if sinks else {}
        return ops.attention(q, k, v, segments, scale=dims[0] ** -0.5, **options, **more)

    shapes = [(400, 6, dims[0]), (400, 2, dims[0]), (400, 2, dims[1]), *([(6,)] if sunk else [])]
    inputs = [torch.randn(shape) for shape in shapes]
    compare("attention", body, attend, inputs, torch.bfloat16, "cuda", tolerance=TOLERANCE)


def test_decoding_with_sinks() -> None:
    need_body("attention", "varlen", torch.bfloat16, "cuda", ("cache", "sinks"))
    q, k, v = (torch.randn(50, heads, 64, device="cuda").bfloat16() for heads in (4, 2, 2))
    sinks = torch.randn(4, device="cuda")
    keys, segments = Segments.from_lengths([30, 20], "cuda"), Segments.from_lengths([1, 1], "cuda")
    whole = ops.attention(q, k, v, keys, scale=0.1, sinks=sinks)
    part = ops.attention(q[[29, 49]], k, v, segments, scale=0.1, key_segments=keys, sinks=sinks)
    torch.testing.assert_close(part, whole[[29, 49]], rtol=2e-2, atol=2e-2)


CASES: list[tuple[str, dict[str, Any]]] = [
    (method, options)
    for method in ("ring", "ulysses")
    for options in (
        {},
        {"window": 50},
        {"window": 150, "sinks": True},
        {"dims": (192, 128)},
        {"softcap": 5.0},
    )
    if method == "ring" or "softcap" not in options  # Ulysses has what ops.attention has, and this compiles
]


def attend(leaves: list[torch.Tensor], segments: Segments, cp: Axis, **options: Any) -> list[torch.Tensor]:
    """[output, gradients of q, k, v and the sinks if any] for a gradient that depends on the row in the stream."""
    q, k, v, *sinks = leaves = [x.detach().clone().requires_grad_() for x in leaves]
    scale = q.shape[2] ** -0.5
    out = context.attention(q, k, v, segments, cp, sinks=sinks[0] if sinks else None, scale=scale, **options)
    rows = torch.arange(768) if segments.rows is None else segments.rows.cpu()
    weights = torch.randn(768, *out.shape[1:], generator=torch.Generator().manual_seed(5)).bfloat16()
    return [out.detach(), *torch.autograd.grad(out, leaves, weights[rows].to(out))]


def equal_to_one_gpu(rank: int, size: int) -> None:
    cp = parallel.init(ParallelConfig(context=size), device="cuda").cp
    none = Targets(torch.empty(0).long(), torch.empty(0).long())
    for lengths in DOCUMENTS:
        for method, chosen in CASES:
            torch.manual_seed(1)
            options = dict(chosen)
            dim, value_dim = options.pop("dims", (64, 64))
            sunk = options.pop("sinks", False)
            whole = [torch.randn(768, heads, width) for heads, width in ((8, dim), (4, dim), (4, value_dim))]
            rounded = [x.bfloat16() for x in [*whole, *([torch.randn(8)] if sunk else [])]]
            segments = Segments.from_lengths(lengths)
            ops.configure({"attention": "reference"}, "cpu")
            truth = attend([x.double() for x in rounded], segments, Axis("cp"), **options)
            here = context.shard_stream(torch.arange(768), segments, none, cp).segments
            local = [x[here.rows] for x in rounded[:3]] + rounded[3:]
            actual = attend(
                [x.cuda() for x in local], here.to("cuda", non_blocking=True), cp, method=method, **options
            )
            if sunk:
                actual[4] = actual[4].float()
                dist.all_reduce(actual[4], group=cp.group)
            for number, (value, right) in enumerate(zip(actual, truth, strict=True)):
                right = right if number == 4 else right[here.rows]
                error = relative_error(value, right)
                assert error < TOLERANCE, f"{lengths} {method} {chosen} {number}: {error}"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_ring_and_ulysses_over_nccl_equal_one_process() -> None:
    run_ranks(equal_to_one_gpu, 2, backend="nccl", timeout=280)


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs")
def test_ring_and_ulysses_on_four_gpus() -> None:
    run_ranks(equal_to_one_gpu, 4, backend="nccl", timeout=280)
