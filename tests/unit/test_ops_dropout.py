"""keyed_dropout: a mask that depends on key, row and column alone, and looks random."""

from __future__ import annotations

import pytest
import torch

from megatune import ops


def mask(
    shape: tuple[int, int],
    p: float = 0.3,
    key: int = 1,
    rows: torch.Tensor | None = None,
    first_column: int = 0,
) -> torch.Tensor:
    return ops.keyed_dropout(torch.ones(shape), p, key, rows, first_column) != 0


def test_a_part_of_the_tensor_gets_its_part_of_the_mask() -> None:
    whole = mask((512, 300))
    rows = torch.randperm(512, generator=torch.Generator().manual_seed(0))[:100]
    assert torch.equal(mask((100, 300), rows=rows), whole[rows])
    assert torch.equal(mask((512, 70), first_column=130), whole[:, 130:200])
    assert torch.equal(mask((100, 300), rows=torch.arange(100)), mask((100, 300)))


def test_a_large_tensor_is_done_in_blocks_that_cannot_be_seen() -> None:
    whole = mask((3000, 1000))  # several blocks
    assert torch.equal(mask((3, 1000), rows=torch.tensor([1047, 1048, 2999])), whole[[1047, 1048, 2999]])


@pytest.mark.parametrize("key", [0, 1, 77, 2**31, 2**62 - 5, -3])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_elements_fall_out_with_probability_p_everywhere(p: float, key: int) -> None:
    kept = mask((2048, 512), p, key).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 5 * deviation / 2**10
    # Six standard deviations of the mean of one column or row, of which there are some thousands.
    assert (kept.mean(0) - (1 - p)).abs().max() < 6 * deviation / 2048**0.5
    assert (kept.mean(1) - (1 - p)).abs().max() < 6 * deviation / 512**0.5


def test_neighbours_and_other_keys_are_independent() -> None:
    one = mask((2048, 512), 0.5).double() - 0.5
    assert not (mask((512, 64), key=1)[:, None] == mask((512, 64), key=0)).all(-1).any()
    for other in (
        mask((2048, 512), 0.5, key=2).double() - 0.5,
        mask((2048, 512), 0.5, key=1 + 2**31).double() - 0.5,
        *(one.roll(shift, dim) for dim in (0, 1) for shift in (1, 2, 64)),
    ):
        correlation = (one * other).mean() / 0.25
        assert abs(correlation) < 5 / 2**10
    # Variance of the rows' counts is that of independent draws.
    assert (one.sum(1).var() / (512 * 0.25)).item() == pytest.approx(1.0, abs=0.2)
    assert (one.sum(0).var() / (2048 * 0.25)).item() == pytest.approx(1.0, abs=0.35)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradient(dtype: torch.dtype) -> None:
    x = torch.randn(40, 9, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    out = ops.keyed_dropout(x, 0.25, 3)
    kept = mask((40, 9), 0.25, 3)
    expected = torch.where(kept, x.detach() / 0.75, 0.0)
    torch.testing.assert_close(out.detach(), expected)
    (grad,) = torch.autograd.grad(out, x, torch.full_like(x, 3.0))
    torch.testing.assert_close(grad, kept.to(dtype) * 4.0)
    assert out.dtype == grad.dtype == dtype


def test_nothing_to_drop_and_nothing_there() -> None:
    x = torch.randn(4, 5)
    assert ops.keyed_dropout(x, 0.0, 1) is x
    assert ops.keyed_dropout(x[:0], 0.5, 1).shape == (0, 5)


def test_wrong_arguments_are_named() -> None:
    x = torch.randn(4, 5)
    for message, call in (
        (r"rows \[T\]", lambda: ops.keyed_dropout(x, 0.5, 1, torch.arange(3))),
        ("p is 1.0", lambda: ops.keyed_dropout(x, 1.0, 1)),
        (r"rows must be int64", lambda: ops.keyed_dropout(x, 0.5, 1, torch.arange(4).int())),
        ("floating", lambda: ops.keyed_dropout(x.int(), 0.5, 1)),
        ("rows is on meta", lambda: ops.keyed_dropout(x, 0.5, 1, torch.arange(4, device="meta"))),
    ):
        with pytest.raises(ValueError, match=message):
            call()
