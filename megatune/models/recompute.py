"""Activations that are computed again in backward instead of being kept (arXiv:1604.06174, arXiv:2205.05198).

| `parallel.recompute` | kept for backward | computed twice |
| --- | --- | --- |
| none | everything | nothing |
| selective | see below | norms of heads, rotary embedding, attention, gate |
| n | as none, but of every n-th layer its input only | every n-th layer |
| full | the input of every layer | every layer |

Selective (`recomputed`) keeps what the q, k, v projection gave but nothing up to the output projection, whose input is
given up too and computed again just before that projection's backward; likewise from the gate and up projection to the
down projection. So no matrix product of a linear layer and no collective runs twice: attention over a context parallel
axis, which communicates, is kept as with none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from megatune.parallel import offload

Recompute = Literal["none", "selective", "full"] | int

_selective = False


def drops_layer(mode: Recompute, index: int) -> bool:
    """Whether layer `index` keeps only its input."""
    return mode == "full" or (isinstance(mode, int) and index % mode == 0)


def whole_layer(layer: nn.Module, *inputs: Any) -> Tensor:
    """layer(*inputs), of which only the inputs are kept for backward."""
    # Dropout is keyed by what it acts on and there is no other randomness: no generator has to be put back.
    return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def selective(active: bool) -> Iterator[None]:
    """Within, `recomputed` gives up what it may, if `active`."""
    global _selective
    before, _selective = _selective, active
    try:
        yield
    finally:
        _selective = before


def recomputed(inner: Callable[..., Tensor], then: Callable[[Tensor], Tensor], *inputs: Tensor) -> Tensor:
    """then(inner(*inputs)); under selective recompute only `inputs` are kept of inner(*inputs) and all before it.

    `inner`: without randomness and collectives, its result shares no memory with its inputs; may use parameters.
    `then`: may keep inner's result for backward, and nothing but the result of `then` may be needed of it otherwise.
    """
    if not (_selective and torch.is_grad_enabled() and any(x.requires_grad for x in inputs)):
        return then(inner(*inputs))
    if torch.compiler.is_compiling():
        # The compiler decides by itself when a tensor's memory ends; it only has to know what may be computed again.
        return then(checkpoint(inner, *inputs, use_reentrant=False, preserve_rng_state=False))
    y = _Inner.apply(inner, *inputs)
    offload.stay(y)
    out = then(y)
    # The gradient of `out` exists before anything behind it asks for y.
    node, kept = y.grad_fn, y.data
    out.register_hook(lambda grad: node.restore(node, kept))
    kept.untyped_storage().resize_(0)
    return out


class _Inner(torch.autograd.Function):
    """inner(*inputs), of which only the inputs are kept; `restore` computes it again, into the memory of its result."""

    @staticmethod
    def forward(ctx: Any, inner: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        y = inner(*inputs)
        ctx.save_for_backward(*inputs)
        ctx.restore = _Restore(inner, y.untyped_storage().nbytes())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, result = ctx.restore.take()
        torch.autograd.backward(result, grad)
        return None, *(x.grad for x in inputs)


class _Restore:
    """The second computation of `inner`: its graph waits here for the backward of `_Inner`."""

    def __init__(self, inner: Callable[..., Tensor], size: int) -> None:
        self._inner, self._size = inner, size
        self._fresh: tuple[list[Tensor], Tensor] | None = None

    def __call__(self, node: Any, kept: Tensor) -> None:
        """Fill `kept`, the result of the first computation, whose memory was given back."""
        saved, needs = node.saved_tensors, node.needs_input_grad[1:]
        inputs = [x.detach().requires_grad_(need) for x, need in zip(saved, needs, strict=True)]
        with torch.enable_grad():
            result = self._inner(*inputs)
        kept.untyped_storage().resize_(self._size)
        # `kept` has a version of its own: to who saved the result nothing changed.
        kept.copy_(result.detach())
        self._fresh = inputs, result

    def take(self) -> tuple[list[Tensor], Tensor]:
        fresh, self._fresh = self._fresh, None
        return fresh
