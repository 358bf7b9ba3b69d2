"""Activations that wait for backward in host memory (`parallel.offload`).

What the layers' forward passes save goes to pinned host memory on a stream of its own and comes back layer by layer,
one layer before it is needed. Storages travel whole and once, however many views of them were saved.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakIdKeyDictionary

SMALLEST = 2**20  # bytes: below, a copy costs more than the memory is worth

_staying = WeakIdKeyDictionary()


def stay(*tensors: Tensor) -> None:
    """Never offload the memory of these: shared by layers, or given up and computed again."""
    for tensor in tensors:
        _staying[tensor.untyped_storage()] = True


@dataclass(eq=False)
class _Held:
    """One storage on its way: `source` until the copy in `host` is known to be finished, `device` once it is back."""

    host: Tensor
    source: torch.UntypedStorage | None
    device: Tensor | None = None


@dataclass(eq=False)
class _Layer:
    """What one layer's forward pass saved; `before`: the layer before it in the same micro-batch. A layer lives as
    long as something that it saved is waited for."""

    before: weakref.ref[_Layer] | None
    held: dict[tuple[int, int], _Held] = field(default_factory=dict)
    gone: Any = None  # event: all copies to the host are made
    back: Any = None  # event: all copies from the host are made
    used: bool = False


class Offload:
    """Offloads the activations of one model; `begin` before the layers of a micro-batch, `layer` around each.

    On a CPU the copies are plain ones (to see that nothing depends on where the tensors lie).
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._out = torch.cuda.Stream(device) if self._is_cuda else None
        self._back = torch.cuda.Stream(device) if self._is_cuda else None
        self._last: weakref.ref[_Layer] | None = None
        self._pending: _Layer | None = None  # its sources are still there

    def begin(self, shared: Iterable[Tensor] = ()) -> None:
        """A micro-batch's forward pass through a stage begins. `shared`: what all its layers use stays."""
        stay(*shared)
        self._last = None

    @contextmanager
    def layer(self) -> Iterator[None]:
        """Within, what is saved for backward goes to the host."""
        layer = _Layer(self._last)
        with saved_tensors_hooks(lambda tensor: self._pack(layer, tensor), self._unpack):
            yield
        self._last = weakref.ref(layer)
        if self._is_cuda:
            layer.gone = self._out.record_event()
        # A layer's own memory is free when the layer after it has been computed, so at most two wait for the bus.
        self._release()
        self._pending = layer

    def _pack(self, layer: _Layer, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        if (
            storage.nbytes() < SMALLEST
            or storage in _staying
            or (tensor.device.type == "cuda") != self._is_cuda
            or _is_parameter(tensor)
        ):
            return tensor
        # Until the layer ends all sources live, so no two have one address. A storage that was changed since another
        # view of it was saved counts as another one.
        key = (storage._cdata, tensor._version)
        held = layer.held.get(key)
        if held is None:
            held = layer.held[key] = self._send(storage)
        return layer, held, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()

    def _send(self, storage: torch.UntypedStorage) -> _Held:
        flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        if not self._is_cuda:
            return _Held(flat.clone(), storage)
        host = torch.empty(flat.shape, dtype=torch.uint8, pin_memory=True)
        self._out.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._out):
            host.copy_(flat, non_blocking=True)
        return _Held(host, storage)

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        layer, held, dtype, shape, stride, offset = packed
        if self._is_cuda and not layer.used:
            layer.used = True
            if self._pending is not layer:
                self._release()
            self._fetch(layer)
            if layer.back is not None:
                torch.cuda.current_stream().wait_event(layer.back)
            before = layer.before and layer.before()
            if before is not None:
                self._fetch(before)
        if held.source is not None:
            storage = held.source
        else:
            storage = (held.device if self._is_cuda else held.host).untyped_storage()
        return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, shape, stride)

    def _release(self) -> None:
        """Give up the sources of the layer whose copies were last on their way."""
        if self._pending is not None:
            if self._is_cuda:
                torch.cuda.current_stream().wait_event(self._pending.gone)
            for held in self._pending.held.values():
                held.source = None
            self._pending = None

    def _fetch(self, layer: _Layer) -> None:
        """Let a layer's tensors come back, unless they are here or on their way."""
        missing = [held for held in layer.held.values() if held.source is None and held.device is None]
        if not missing:
            return
        for held in missing:
            # Of the computing stream's memory, since it is that stream which uses and frees it.
            held.device = torch.empty_like(held.host, device=self._back.device)
        self._back.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._back):
            for held in missing:
                held.device.copy_(held.host, non_blocking=True)
        layer.back = self._back.record_event()


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
