"""Arguments for every operator of megatune that has a CUDA kernel: small, of odd sizes, on the CPU.

Each kernel of an operator is to be reached: all dtypes, rows that are whole vectors of 16 bytes and rows that are not,
rows that a warp has and rows that a block has, none at all, strided views. tools/cuda_once.py calls them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatune.ops import quant

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Example = tuple[str, tuple[Any, ...], torch.dtype]  # operator, arguments, what it computes in


def examples() -> Iterator[Example]:
    torch.manual_seed(0)
    for dtype in DTYPES:
        yield from norms(dtype)
        yield from rotations(dtype)
        yield from gates(dtype)
        yield from losses(dtype)
        yield from projections(dtype)
        yield from rows_of_tokens(dtype)
        yield from eight_bits(dtype)
        yield from frozen_weights(dtype)
        yield from dropouts(dtype)
    yield from routers()
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
    """Whole vectors and single elements; some dimensions that are not turned; views of a fused projection."""
    for shape, half in (((9, 1, 3, 64), 32), ((7, 1, 2, 10), 3), ((1, 1, 1, 128), 64), ((5, 2, 2, 40), 16)):
        angle = torch.randn(shape[0], half)
        for inverse in (False, True):
            q, k = torch.randn(shape).to(dtype), torch.randn(*shape[:2], shape[3]).to(dtype)
            yield "rope", (q, k, angle.cos(), angle.sin(), inverse), dtype
    angle = torch.randn(9, 16)
    qkv = torch.randn(9, 3, 5, 32).to(dtype)
    yield "rope", (qkv[:, :, 1:3], qkv[:, :, 3], angle.cos(), angle.sin(), False), dtype


def gates(dtype: torch.dtype) -> Iterator[Example]:
    for activation in range(3):
        for rows, width in ((3, 7), (5, 64), (1, 1), (130, 24), (0, 8)):
            x, grad = torch.randn(rows, 2 * width).to(dtype), torch.randn(rows, width).to(dtype)
            yield "glu", (x, activation), dtype
            yield "glu_backward", (grad, x, activation), dtype
        yield "glu", (torch.randn(4, 36).to(dtype)[:, :20], activation), dtype
    for rows, width in ((3, 7), (5, 64), (0, 8)):
        x, grad = (torch.randn(rows, 2 * width) * 5).to(dtype), torch.randn(rows, width).to(dtype)
        yield "clamped_glu", (x,), dtype
        yield "clamped_glu_backward", (grad, x), dtype


def losses(dtype: torch.dtype) -> Iterator[Example]:
    """Whole vocabularies and parts of one; labels elsewhere and rows that do not count."""
    rings = ((140, 16384, 0.0), (3, 131072, 0.0))  # more rows than blocks, a row of several blocks
    for rows, columns, softcap in ((5, 33, 0.0), (3, 4096, 3.0), (1, 20011, 0.0), (0, 8, 0.0), *rings):
        labels = torch.randint(columns, (rows,))
        for write_grad in (False, True):
            arguments = (torch.randn(rows, columns).to(dtype), labels, softcap, write_grad)
            yield "cross_entropy_rows", arguments, dtype
            for smoothing in (0.0, 0.1):
                more = (
                    torch.rand(rows),
                    1e-3,
                    smoothing,
                    0,
                )  # weights, z-loss, .., the label that does not count
                yield "cross_entropy_rows", (*arguments, *more), dtype
        for with_sum in (False, True):
            logits, elsewhere = torch.randn(rows, columns).to(dtype), labels + columns // 2
            yield "cross_entropy_sums", (logits, elsewhere, columns, 3 * columns, softcap, with_sum, 0), dtype
        for parts, numbers, smoothing in ((1, 3, 0.0), (5, 4, 0.1)):
            sums = torch.rand(parts, rows, numbers) + 1
            more = (3 * columns, torch.rand(rows), 1e-3, smoothing, 0)
            yield "cross_entropy_join", (sums, elsewhere, *more), dtype
        arguments = (logits, elsewhere, columns, 3 * columns, softcap, torch.full((rows, 2), 9.0))
        yield "cross_entropy_grad", (*arguments, torch.rand(rows), 1e-3, 0.1, 0), dtype
        single, factor = torch.randn(rows, columns), torch.tensor(0.3)
        yield "scale_gradient", (logits, logits, factor), dtype
        yield "scale_gradient", (torch.empty(rows, columns, dtype=dtype), single, factor), dtype


def projections(dtype: torch.dtype) -> Iterator[Example]:
    """Heads in a fused projection: turned, and with norms before that."""
    for tokens, groups, queries, width in ((9, 2, 3, 64), (5, 1, 2, 20), (3, 2, 1, 128), (0, 1, 1, 16)):
        qkv = torch.randn(tokens, groups, queries + 2, width).to(dtype)
        angle = torch.randn(tokens, width // 2)
        grads = [torch.randn(tokens, heads, width).to(dtype) for heads in (groups * queries, groups, groups)]
        weights = [torch.rand(width).to(dtype) for _ in range(2)]
        rstd = torch.rand(tokens, groups, queries + 1)
        turn = angle.cos(), angle.sin()
        yield "rope_qk", (qkv, *turn, None, None, 1e-5, 0.0), dtype
        yield "rope_qk", (qkv, *turn, *weights, 1e-5, 1.0), dtype
        yield "rope_qk_backward", (*grads, *turn, None, None, None, None, 0.0, False), dtype
        for weight_grad in (False, True):
            yield "rope_qk_backward", (*grads, *turn, qkv, *weights, rstd, 1.0, weight_grad), dtype


def rows_of_tokens(dtype: torch.dtype) -> Iterator[Example]:
    """Tokens to experts and back, some dropped; the gradient of a table, with tokens that are elsewhere."""
    for tokens, choices, width in ((9, 2, 7), (33, 3, 64), (4, 8, 1000)):
        count = tokens * choices
        source = torch.randperm(count)[: count - 2]
        place = torch.full((count,), len(source)).scatter_(0, source, torch.arange(len(source)))
        place = place.view(tokens, choices)
        x, rows = torch.randn(tokens, width).to(dtype), torch.randn(len(source), width).to(dtype)
        weights = torch.rand(tokens, choices)
        yield "expert_take", (x, source // choices), dtype
        yield "expert_copies", (x, place, len(source)), dtype
        for some in (None, weights):
            yield "expert_sum", (rows, place, some), dtype
        for some, rows_grad in ((None, True), (rows, False), (rows, True)):
            yield "expert_sum_backward", (x, some, weights, place, len(source), rows_grad), dtype
        ids = torch.randint(9, (tokens,))
        order = (ids - 2).where((ids >= 2) & (ids < 8), 6).sort(stable=True)[1]
        for some in (order, None):
            yield "embedding_backward", (x, ids, some, 2, 6), dtype
        many = torch.randn(300 * tokens, 5).to(dtype)
        yield "embedding_backward", (many, torch.randint(50, (300 * tokens,)), None, 0, 50), dtype
        yield "embedding_rows", (torch.randint(tokens + 9, (2 * tokens,)), x, 4, tokens + 9), dtype


def eight_bits(dtype: torch.dtype) -> Iterator[Example]:
    """fp8 in rows, blocks and tiles; copies as it is, transposed, both."""
    for rows, width in ((5, 128), (130, 256), (1, 1152), (19, 2304)):
        x, gate_up = torch.randn(rows, width).to(dtype), torch.randn(rows, 2 * width).to(dtype)
        for copies in (1, 2, 3):
            for scaling in range(4):
                yield "fp8_quantise", (x, scaling, False, copies), dtype
            yield "fp8_quantise", (x, 0, True, copies), dtype
            for scaling in range(2):
                yield "fp8_rms_norm", (x, torch.rand(width).to(dtype), 1e-5, 0.0, scaling, copies), dtype
                yield "fp8_glu", (gate_up, 0, scaling, copies), dtype
    # Enough tiles for norms that read each value once: a block without one, one without a neighbour, rows that end.
    for rows, width, offset in ((7000, 640, 0.0), (600, 7552, 1.0)):
        x = torch.randn(rows, width).to(dtype)
        yield "fp8_rms_norm", (x, torch.rand(width).to(dtype), 1e-5, offset, 1, 3), dtype


def frozen_weights(dtype: torch.dtype) -> Iterator[Example]:
    """Parts of a block of numbers, of what a warp has, and more numbers than share the scale of their scales."""
    number = DTYPES.index(dtype)
    for rows, columns in ((1, 1), (7, 90), (32, 64), (3, 683), (33, 512), (0, 8)):
        size = rows * columns
        blocks = -(-size // quant.BLOCK)
        packed, scales = (torch.randint(256, (n,), dtype=torch.uint8) for n in (-(-size // 2) + 1, blocks))
        nested, offset = torch.rand(-(-blocks // quant.NESTED)), torch.tensor(0.04)
        for codes in (packed[:-1], packed[1:]):  # the second is where no word can be loaded
            parts = codes, scales, nested, offset, quant.dynamic_code()
            yield "nf4_dense", (*parts, rows, columns, number), dtype
        numbers = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
        yield "int8_dense", (numbers, torch.rand(rows), 1 / 127, number), dtype


def dropouts(dtype: torch.dtype) -> Iterator[Example]:
    """Whole vectors and single elements, several blocks of both; a view; thresholds that keep all and nothing."""
    for rows, width, threshold in ((21, 64, 2**28), (70, 2056, 2**30), (5, 7, 0), (9, 300, 2**31), (0, 8, 5)):
        names = torch.randint(2**40, (rows,)) if rows % 2 else None
        yield "keyed_dropout", (torch.randn(rows, width).to(dtype), names, 77, 5, 3, threshold, 1.25), dtype
    view = torch.randn(9, 72).to(dtype)[:, 8:40]
    yield "keyed_dropout", (view, None, 1, 2, 0, 2**29, 1.25), dtype


def routers() -> Iterator[Example]:
    for tokens, experts, top_k, score, normalise in (
        (9, 8, 2, 0, True),
        (5, 128, 8, 1, False),
        (3, 33, 4, 2, True),
        (4, 200, 12, 0, False),
    ):
        logits = torch.randn(tokens, experts)
        chosen = logits.topk(top_k).indices
        yield "router", (logits, None, top_k, score, normalise, 1.0, 1, 1), torch.float32
        yield (
            "router",
            (logits, torch.rand(experts) * 0.01, top_k, score, normalise, 2.0, 1, 1),
            torch.float32,
        )
        for grad in (None, torch.randn(tokens, experts)):
            arguments = (torch.randn(tokens, top_k), grad, logits, chosen, score, normalise, 2.0)
            yield "router_backward", arguments, torch.float32


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
    yield from optimizers_in_fewer_bits(sizes)


def optimizers_in_fewer_bits(sizes: list[int]) -> Iterator[Example]:
    """8-bit moments; sign updates; parameters that are bf16 themselves."""
    count, step = len(sizes), (0.01, 0.9, 0.95, 1e-8, 3)
    low, single = torch.bfloat16, torch.float32

    def lists(dtype: torch.dtype = single) -> list[Tensor]:
        return [torch.randn(size).to(dtype) for size in sizes]

    def codes(first: int) -> list[Tensor]:
        return [torch.randint(first, 200, (size,), dtype=torch.uint8) for size in sizes]

    scales = [[torch.rand(-(-size // 256)) for size in sizes] for _ in range(2)]
    common = (torch.tensor(0.7), [0.1] * count)
    for grads, weights in ((low, low), (single, single)):
        moments = (codes(60), scales[0], codes(0), scales[1])
        arguments = (lists(), *moments, lists(grads), lists(weights), *common)
        yield "adamw_8bit_", (*arguments, *step), low
        yield "lion_", (lists(), lists(), lists(grads), lists(weights), *common, 0.01, 0.9, 0.95), low
    squares = [x.square() for x in lists()]
    places = [[*range(count)], *([one] * count for one in (7, 40, 64))]  # keys, firsts, widths, strides
    arguments = (lists(low), lists(), squares, lists(low), *common, *places)
    yield "adamw_bf16_", (*arguments, *step), low
