"""Weight gradients put off: the halves of a zero-bubble schedule's backward (arXiv:2401.10241).

A backward gives gradients of inputs, which the stage before waits for, and of weights, which nobody waits for. The
autograd functions of linear layers hand the computation of the second kind to `defer`; it is done at once unless the
pipeline collects it for a bubble of its schedule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Queue:
    """Weight gradients that are still to be computed, in the order in which backward came by."""

    def __init__(self) -> None:
        self._entries: list[tuple[nn.Parameter, Callable[[], Tensor]]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, parameter: nn.Parameter, compute: Callable[[], Tensor]) -> None:
        self._entries.append((parameter, compute))

    @torch.no_grad()
    def run(self) -> None:
        """Compute and accumulate all, and forget them; a parameter that was used several times is ready after the
        last of them."""
        entries, self._entries = self._entries[::-1], []
        left = Counter(id(parameter) for parameter, _ in entries)
        while entries:
            # Popped, so that the activations that a computation holds are freed as soon as it is done.
            parameter, compute = entries.pop()
            _add(parameter, compute())
            left[id(parameter)] -= 1
            if not left[id(parameter)]:
                _ready(parameter)


# One for the process and not one for each thread: backward's functions run in threads of the autograd engine.
_collector: Queue | None = None


def defer(parameter: nn.Parameter, compute: Callable[[], Tensor]) -> Tensor | None:
    """For backward of an autograd function: the gradient of `parameter` (its shape), or None where it comes later.

    `compute` gives a tensor that nobody else holds, and must not need the autograd context after backward has returned:
    let it close over the tensors themselves. `parameter` is the one that has `.grad`: pass it beside the tensors that
    autograd saves (a saved tensor comes back as another object).
    """
    if _collector is None:
        return compute()
    _collector.add(parameter, compute)
    return None


def active() -> bool:
    """Whether `defer` puts off now."""
    return _collector is not None


@contextmanager
def collecting() -> Iterator[Queue]:
    """While it lasts `defer` puts off; the queue is run by whoever opened it, after the end. Not to be nested."""
    global _collector
    if _collector is not None:
        raise RuntimeError("deferred.collecting() inside another one")
    _collector = queue = Queue()
    try:
        yield queue
    finally:
        _collector = None


def accumulate(parameter: nn.Parameter, grad: Tensor) -> None:
    """Add `grad` to `parameter.grad` (in its dtype), then tell: `parameter.grad_ready(parameter)` where it has that
    attribute, in place of the hooks that autograd would call."""
    _add(parameter, grad)
    _ready(parameter)


def _add(parameter: nn.Parameter, grad: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = grad.detach().to(parameter.dtype)
    else:
        parameter.grad.add_(grad.detach())


def _ready(parameter: nn.Parameter) -> None:
    ready = getattr(parameter, "grad_ready", None)
    if ready is not None:
        ready(parameter)
