"""Weight gradients put off."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatune.parallel import deferred


class Product(torch.autograd.Function):
    """x @ weight^T with the weight's gradient put off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, parameter: nn.Parameter) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.parameter = parameter
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return grad @ weight, deferred.defer(ctx.parameter, lambda: grad.t() @ x), None


def make() -> tuple[nn.Parameter, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 4, generator=generator, dtype=torch.float64))
    x = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    seen: list[Tensor] = []
    weight.grad_ready = lambda parameter: seen.append(parameter.grad.clone())
    return weight, x, seen


def loss(weight: nn.Parameter, x: Tensor) -> Tensor:
    """The weight twice: ready only after its second gradient."""
    return Product.apply(Product.apply(x, weight, weight).tanh(), weight, weight).square().sum()


def test_at_once_outside() -> None:
    weight, x, seen = make()
    loss(weight, x).backward()
    expected = torch.autograd.grad(((x @ weight.t()).tanh() @ weight.t()).square().sum(), (weight, x))
    torch.testing.assert_close((weight.grad, x.grad), expected)
    assert not seen  # autograd's own hooks tell


def test_later_inside() -> None:
    weight, x, seen = make()
    expected = torch.autograd.grad(((x @ weight.t()).tanh() @ weight.t()).square().sum(), (weight, x))
    for times in (1, 2):
        with deferred.collecting() as queue:
            loss(weight, x).backward()
        assert len(queue) == 2 and len(seen) == times - 1
        torch.testing.assert_close(x.grad, times * expected[1])
        queue.run()
        assert len(queue) == 0 and len(seen) == times
        torch.testing.assert_close(weight.grad, times * expected[0])
        torch.testing.assert_close(seen[-1], weight.grad)


def test_accumulates_in_the_gradients_dtype() -> None:
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float32))
    deferred.accumulate(weight, torch.ones(2, dtype=torch.bfloat16))
    assert weight.grad.dtype == torch.float32
    view = weight.grad
    deferred.accumulate(weight, torch.full((2,), 2.0**-12, dtype=torch.bfloat16))
    assert weight.grad is view  # in place: it may be a part of a bucket
    assert weight.grad.tolist() == [1 + 2.0**-12] * 2


def test_activations_are_freed_one_by_one() -> None:
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    activation = torch.ones(2)
    alive = weakref.ref(activation)
    with deferred.collecting() as queue:
        deferred.defer(first, lambda kept=activation: kept.clone())
        deferred.defer(second, lambda: torch.full((2,), float(alive() is not None)))
    del activation
    queue.run()
    gc.collect()
    assert first.grad.tolist() == [1, 1] and second.grad.tolist() == [0, 0]


def test_no_graph_of_gradients() -> None:
    weight, x = nn.Parameter(torch.ones(2)), torch.ones(2, requires_grad=True)
    made = []
    with deferred.collecting() as queue:
        deferred.defer(weight, lambda: made.append(x * 2) or made[0])
    queue.run()
    assert not made[0].requires_grad and not weight.grad.requires_grad


def test_collects_no_more_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), deferred.collecting():
        raise ZeroDivisionError
    weight = nn.Parameter(torch.zeros(1))
    assert deferred.defer(weight, lambda: torch.ones(1)) is not None
    with deferred.collecting(), pytest.raises(RuntimeError, match="inside another"), deferred.collecting():
        pass
