"""embedding: a gradient of sums over equal tokens, the same bit by bit each time; parts of a table."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from megatune import ops
from megatune.ops.embedding import _order
from tests.helpers.ops import compare, need_body
from tests.ops.bodies import DTYPES, QUICK, TOLERANCE, repeats_bitwise

PLACES = [pytest.param("reference", "cpu", id="reference-cpu")]
PLACES += [
    pytest.param(name, "cuda", id=f"{name}-cuda", marks=pytest.mark.gpu) for name in ops.BODIES["embedding"]
]


def streams(rows: int) -> dict[str, Tensor]:
    """Runs of equal ids of every kind: within a piece of the sorted tokens, over its border, over several pieces."""
    torch.manual_seed(7)
    return {
        "once": torch.randperm(rows)[:5],
        "mixed": torch.randint(rows, (331,)),
        "frequent": torch.where(torch.rand(700) < 0.8, torch.tensor(3), torch.randint(rows, (700,))),
        "one": torch.full((129,), rows - 1),
        "whole pieces": torch.tensor([2] * 32 + [3] * 64 + [5] * 32)[torch.randperm(128)],
        "borders": torch.arange(70).div(31, rounding_mode="floor"),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("body", "device"), PLACES)
def test_values_and_gradients(body: str, device: str, dtype: torch.dtype) -> None:
    need_body("embedding", body, dtype, device)
    # PyTorch's own adds up in the table's dtype where tokens are few.
    loose = 8 if body == "torch" and dtype != torch.float32 else 1
    for width in [8, 33] + ([1024, 2056] if device == "cuda" else []):
        table = torch.randn(50, width)
        for name, index in streams(50).items():
            for first, total in ((0, None), (17, 90), (3, 40)):
                weight = table if total is None else table[: 40 - first if total == 40 else 20]
                if total is not None and name == "one":
                    continue  # nothing to compare: no token is of this part
                where = index if total != 40 else index % 40

                def run(weight: Tensor, where=where, first=first, total=total) -> Tensor:
                    return ops.embedding(where.to(weight.device), weight, first, total)

                compare("embedding", body, run, (weight,), dtype, device, tolerance=loose * TOLERANCE[dtype])


def test_it_is_pytorchs_lookup_and_gradient() -> None:
    index, weight = streams(50)["frequent"], torch.randn(50, 16, requires_grad=True)
    for function in (ops.embedding, torch.nn.functional.embedding):
        weight.grad = None
        y = function(index, weight)
        y.backward(torch.arange(y.numel()).view(y.shape).float().sin())
        results = (y.detach(), weight.grad)
        if function is ops.embedding:
            expected = results
    assert all(torch.equal(one, two) for one, two in zip(results, expected, strict=True))


def test_parts_of_a_table_add_up_to_the_whole() -> None:
    index, weight = streams(50)["mixed"], torch.randn(50, 8)
    parts = [weight[first : first + 25].clone().requires_grad_() for first in (0, 25)]
    found = [ops.embedding(index, part, 25 * i, 50) for i, part in enumerate(parts)]
    assert torch.equal(found[0] + found[1], weight[index])
    grad = torch.randn(331, 8)
    (found[0] + found[1]).backward(grad)
    expected = torch.zeros(50, 8).index_add_(0, index, grad)
    torch.testing.assert_close(torch.cat([part.grad for part in parts]), expected)


def test_an_index_that_is_nowhere_is_refused() -> None:
    weight = torch.randn(5, 4)
    for index in (-1, 10, 12):
        with pytest.raises(IndexError):
            ops.embedding(torch.tensor([0, index]), weight, 5, 10)
    with pytest.raises(IndexError):
        ops.embedding(torch.tensor([5]), weight)


def test_what_does_not_fit_is_refused() -> None:
    index, weight = torch.tensor([1, 2]), torch.randn(5, 4)
    for arguments, message in (
        ((index.float(), weight), r"index .* must be int64 \[T\]"),
        ((index[None], weight), r"index .* must be int64 \[T\]"),
        ((index, weight[0]), r"weight .* must be \[rows, H\]"),
        ((index, weight, 3, 7), r"rows \[3, 8\) must be among the table's 7"),
        ((index, weight, 1), r"rows \[1, 6\) must be among the table's None; give total"),
        ((index, weight.long()), "weight must be floating point"),
    ):
        with pytest.raises(ValueError, match=f"embedding: {message}"):
            ops.embedding(*arguments)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(device: str) -> None:
    if device == "cuda":
        need_body("embedding", "cuda", torch.float32, "cuda")
    ids = torch.tensor([2, 7, 0, 2, -5, 0, 2], device=device)
    grad = torch.randn(7, 12, device=device)[:, 2:]
    call = torch.ops.megatune.embedding_backward
    order = torch.tensor([2, 5, 0, 3, 6, 1, 4], device=device)  # what is in none of rows 0 to 3 comes last
    for given, first, rows in ((order, 0, 4), (None, 0, 4), (None, 1, 7)):
        arguments = (grad, ids, given, first, rows)
        assert set(opcheck(call.default, arguments, test_utils=QUICK).values()) == {"SUCCESS"}
        here = ids - first
        known = (here >= 0) & (here < rows)
        expected = torch.zeros(rows, 10, device=device).index_add_(0, here[known], grad[known])
        torch.testing.assert_close(call(*arguments), expected)
    assert torch.equal(call(grad[:0], ids[:0], None, 0, 4), torch.zeros(4, 10, device=device))
    look, where = torch.ops.megatune.embedding_rows, torch.tensor([3, 9, 0, 6, 3], device=device)
    for arguments in ((where.clamp(max=6), grad, 0, 7), (where + 2, grad, 2, 12), (where[:0], grad, 2, 12)):
        assert set(opcheck(look.default, arguments, test_utils=QUICK).values()) == {"SUCCESS"}
    expected = grad[where % 7].masked_fill(where[:, None] > 6, 0.0)
    assert torch.equal(look(where + 2, grad, 2, 12), expected)


@pytest.mark.gpu
def test_the_order_found_is_that_of_a_stable_sort() -> None:
    need_body("embedding", "cuda", torch.float32, "cuda")
    for count in (2500, 1024, 1):
        ids, grad = torch.randint(400, (count,), device="cuda"), torch.randn(count, 8, device="cuda")
        call = torch.ops.megatune.embedding_backward
        given = call(grad, ids, _order(ids, 50, 300), 50, 300)
        assert torch.equal(call(grad, ids, None, 50, 300), given)


@pytest.mark.gpu
@pytest.mark.parametrize("body", ["torch", "cuda"])
def test_repeats_are_equal_bit_by_bit(body: str) -> None:
    need_body("embedding", body, torch.bfloat16, "cuda")
    ops.configure({"embedding": body}, "cuda")
    index = torch.where(torch.rand(8000, device="cuda") < 0.3, 7, torch.randint(1000, (8000,), device="cuda"))
    weight = torch.randn(1000, 512, device="cuda").bfloat16().requires_grad_()
    for tokens in (3000, 8000):
        y = ops.embedding(index[:tokens], weight)
        grad = torch.randn_like(y)
        repeats_bitwise(lambda y=y, grad=grad: torch.autograd.grad(y, weight, grad, retain_graph=True))
