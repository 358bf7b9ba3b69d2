"""Arguments on which tools/cuda_once.py calls the operators: each kernel of each is reached.

All dtypes, rows that are whole vectors and rows that are not, one row and none, strided views; made on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatune.ops import quant

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Operator, arguments, what decides how near its values are to the CPU's: what it computes in, or bfloat16 where the
# last bit of a number decides between two results (codes of 8 bits, signs, random rounding).
Example = tuple[str, tuple[Any, ...], torch.dtype]


def examples() -> Iterator[Example]:
    torch.manual_seed(0)
    for dtype in DTYPES:
        yield from norms(dtype)
        yield from rotations(dtype)
        yield from gates(dtype)
        yield from packed_heads(dtype)
        yield from losses(dtype)
        yield from lookups(dtype)
        yield from expert_rows(dtype)
        yield from eight_bits(dtype)
        yield from frozen_weights(dtype)
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


def packed_heads(dtype: torch.dtype) -> Iterator[Example]:
    """With norms and without, all dimensions turned and some, no tokens, a view of something longer."""
    for tokens, groups, queries, width, half in (
        (9, 2, 3, 64, 32),
        (5, 1, 2, 10, 3),
        (7, 3, 1, 40, 16),
        (0, 1, 1, 8, 4),
    ):
        qkv = torch.randn(tokens, groups, queries + 3, width).to(dtype)[:, :, : queries + 2]
        angle = torch.randn(tokens, half)
        turn = angle.cos(), angle.sin()
        grads = [torch.randn(tokens, heads, width).to(dtype) for heads in (groups * queries, groups, groups)]
        yield "rope_qk", (qkv, *turn, None, None, 0.0, 0.0), dtype
        yield "rope_qk_backward", (*grads, *turn, None, None, None, None, None, 0.0, False), dtype
        weights = [torch.randn(width).to(dtype if tokens % 2 else torch.float32) for _ in range(2)]
        rstd = torch.rand(tokens, groups, queries) + 0.5, torch.rand(tokens, groups) + 0.5
        yield "rope_qk", (qkv, *turn, *weights, 1e-6, 1.0), dtype
        for weight_grad in (True, False):
            yield "rope_qk_backward", (*grads, *turn, qkv, *weights, *rstd, 1.0, weight_grad), dtype


def losses(dtype: torch.dtype) -> Iterator[Example]:
    """A few logits, more than a block has threads, more than it keeps; rows at odd distances; every option."""
    for rows, vocabulary in ((5, 7), (3, 1000), (2, 33001), (1, 1), (0, 16)):
        logits = (torch.randn(rows, vocabulary + 3) * 2).to(dtype)[:, 1 : vocabulary + 1]
        labels = torch.randint(vocabulary, (rows,))
        labels[1:2] = -100
        weights = torch.rand(rows)
        for options in ((0.0, None, 0.0, 0.0), (30.0, weights, 1e-3, 0.1)):
            softcap, *rest = options
            for write_grad in (False, True):
                yield "cross_entropy_rows", (logits, labels, softcap, write_grad, *rest, -100), dtype
            # As the second of two processes: some labels are the other's.
            cut = labels + (labels % 2 == 0) * vocabulary * (labels >= 0)
            part = vocabulary, 2 * vocabulary, softcap
            yield "cross_entropy_sums", (logits, cut, *part, bool(softcap), -100), dtype
            log_sum = logits.float().logsumexp(1) + 0.7
            yield "cross_entropy_grad", (logits, cut, *part, log_sum, *rest, -100), dtype


def lookups(dtype: torch.dtype) -> Iterator[Example]:
    """Rows asked for often, once and never; numbers that are in no row."""
    for tokens, rows, width in ((700, 5, 40), (9, 30, 7), (1, 1, 129), (0, 3, 8)):
        ids, order = torch.randint(-1, rows, (tokens,)).sort(stable=True)
        grad = torch.randn(tokens, width + 8).to(dtype)[:, 8:]
        yield "embedding_backward", (grad, ids.int(), order, rows), dtype


def expert_rows(dtype: torch.dtype) -> Iterator[Example]:
    """Each token's choices in any order, some of them dropped; with weights and without."""
    for tokens, choices, width in ((9, 3, 40), (5, 1, 7), (33, 8, 264), (0, 2, 16)):
        kept = torch.randperm(tokens * choices)[: tokens * choices * 3 // 4]
        place = torch.full((tokens * choices,), len(kept)).scatter_(0, kept, torch.arange(len(kept)))
        x, rows = torch.randn(tokens, width).to(dtype), torch.randn(len(kept), width).to(dtype)
        weights = torch.rand(tokens, choices)
        yield "expert_take", (x, kept // choices), dtype
        yield "expert_take", (x, kept - 2), dtype  # some are not there: rows of zeros
        for some in (weights, None):
            yield "expert_sum", (rows, place.view(tokens, choices), some), dtype
        for some, rows_grad in ((rows, True), (rows, False), (None, True)):
            yield "expert_sum_backward", (x, some, weights, kept, rows_grad), dtype


def routers() -> Iterator[Example]:
    for tokens, experts, choices, groups, chosen in (
        (9, 128, 8, 1, 1),
        (5, 7, 2, 1, 1),
        (3, 64, 6, 8, 3),
        (1, 512, 16, 32, 9),
        (0, 4, 1, 1, 1),
    ):
        logits = torch.randn(tokens, experts) * 2
        picked = torch.rand(tokens, experts).topk(choices, 1).indices
        grads = torch.randn(tokens, choices), torch.randn(tokens, experts)
        for score in range(3):
            correction = torch.randn(experts) * 0.1 if score == 1 else None
            how = choices, score, score == 1, 2.5, groups, chosen
            yield "router", (logits, correction, *how), torch.float32
            for of_probabilities in (grads[1], None):
                arguments = grads[0], of_probabilities, logits, picked, score, score == 1, 2.5
                yield "router_backward", arguments, torch.float32


def eight_bits(dtype: torch.dtype) -> Iterator[Example]:
    """Each scaling and each choice of copies; rows that are no whole blocks; views."""
    low = torch.bfloat16
    for rows, width in ((5, 48), (130, 256), (0, 16)):
        x = torch.randn(rows, width + 16).to(dtype)[:, 16:]
        gate_up = torch.randn(rows, 2 * width).to(dtype)
        weight = torch.randn(width).to(dtype)
        for scaling in range(3) if width % 128 == 0 else range(1):
            for copies in (1, 2, 3) if dtype == low else (3,):
                yield "fp8_quantise", (x, scaling, scaling == 0 and copies == 3, copies), low
                if scaling < 2:
                    yield "fp8_rms_norm", (x, weight, 1e-5, float(copies == 2), scaling, copies), low
                    yield "fp8_glu", (gate_up, copies - 1, scaling, copies), low


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


def optimizers() -> Iterator[Example]:
    """Odd sizes, longer than a chunk, more tensors than one launch takes; bf16 and fp32 beside each other."""
    low, single = torch.bfloat16, torch.float32
    some = [1, 3, 4096, 9001, 17, *[5] * 20]
    yield from updates([*some, *[5] * 500], low, low)
    for grad_type, weight_type in ((single, low), (low, single)):
        yield from updates(some, grad_type, weight_type)
    yield from updates_in_few_bits(some, low, low)
    yield from updates_in_few_bits([17, 20011], single, single)


def tensors(sizes: list[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(size).to(dtype) for size in sizes]


def updates(sizes: list[int], grad_type: torch.dtype, weight_type: torch.dtype) -> Iterator[Example]:
    squares = [x.square() for x in tensors(sizes)]
    masters, moments, grads = tensors(sizes), tensors(sizes), tensors(sizes, grad_type)
    weights = tensors(sizes, weight_type)
    weights[2] = torch.empty(0)  # not wanted
    scale, decays = torch.tensor(0.7), [0.1] * len(sizes)
    lists = masters, moments, squares, grads, weights
    yield "adamw_", (*lists, scale, decays, 0.01, 0.9, 0.95, 1e-8, 3), weight_type
    yield "lion_", (masters, moments, grads, weights, scale, decays, 0.01, 0.9, 0.99), torch.bfloat16
    yield "square_sum", (grads,), torch.float32


def updates_in_few_bits(
    sizes: list[int], grad_type: torch.dtype, weight_type: torch.dtype
) -> Iterator[Example]:
    """Moments in 8 bits; masters in bf16, parts of longer parameters."""
    low = torch.bfloat16
    rest = torch.tensor(0.7), [0.1] * len(sizes)
    step = 0.01, 0.9, 0.95, 1e-8, 3
    grads, squares = tensors(sizes, grad_type), [x.square() for x in tensors(sizes)]
    keys, firsts = ([start + i for i in range(len(sizes))] for start in (2**40, 5))
    lists = tensors(sizes, low), tensors(sizes), squares, grads
    yield "adamw_bf16_", (*lists, *rest, keys, firsts, *step), low
    states: list[list[Tensor]] = []
    for _ in range(2):
        states.append([torch.randint(256, (size,), dtype=torch.uint8) for size in sizes])
        states.append([torch.rand(-(-size // 256)) for size in sizes])
    yield "adamw_8bit_", (tensors(sizes), *states, grads, tensors(sizes, weight_type), *rest, *step), low
