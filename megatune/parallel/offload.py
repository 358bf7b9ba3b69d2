"""Activations that wait for backward in host memory (`parallel.offload`).

What the layers' forward passes save goes to pinned host memory on a stream of its own and comes back layer by layer,
one layer before it is needed. Storages travel whole and once, however many views of them were saved.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
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
    """One storage on its way, as a flat tensor: `source` until the copy in `host` is known to be finished, `device`
    once it is back."""

    host: Tensor
    source: Tensor | None
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

    On a CPU the copies are plain ones (to see that nothing depends on where the tensors lie). `counts_host`: called
    with each tensor that is made on the host, for the planner.
    """

    def __init__(self, device: torch.device, counts_host: Callable[[Tensor], None] | None = None) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._counts_host = counts_host
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
            or storage.nbytes() % tensor.itemsize
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
            held = layer.held[key] = self._send(tensor.detach())
        return layer, held, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()

    def _send(self, tensor: Tensor) -> _Held:
        flat = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
        host = torch.empty(flat.shape, dtype=flat.dtype, device="cpu", pin_memory=self._is_cuda)
        if self._counts_host is not None:
            self._counts_host(host)
        with self._behind(self._out):
            host.copy_(flat, non_blocking=True)
        return _Held(host, flat)

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        layer, held, dtype, shape, stride, offset = packed
        if not layer.used:
            layer.used = True
            if self._pending is not layer:
                self._release()
            self._arrive(layer)
            before = layer.before and layer.before()
            if before is not None:
                self._fetch(before)
        if held.source is None and held.device is None:
            self._arrive(layer)
        flat = held.device if held.source is None else held.source
        return flat.view(dtype).as_strided(shape, stride, offset)

    def _release(self) -> None:
        """Give up the sources of the layer whose copies were last on their way."""
        if self._pending is None:
            return
        if self._pending.gone is not None:
            torch.cuda.current_stream().wait_event(self._pending.gone)
        for held in self._pending.held.values():
            held.source = None
        self._pending = None

    def _arrive(self, layer: _Layer) -> None:
        self._fetch(layer)
        if layer.back is not None:
            torch.cuda.current_stream().wait_event(layer.back)

    def _fetch(self, layer: _Layer) -> None:
        """Let a layer's tensors come back, unless they are here or on their way."""
        missing = [held for held in layer.held.values() if held.source is None and held.device is None]
        for held in missing:
            # Of the computing stream's memory, since it is that stream which uses and frees it.
            held.device = torch.empty(held.host.shape, dtype=held.host.dtype, device=self._device)
        with self._behind(self._back):
            for held in missing:
                held.device.copy_(held.host, non_blocking=True)
        if missing and self._back is not None:
            layer.back = self._back.record_event()

    @contextmanager
    def _behind(self, stream: torch.cuda.Stream | None) -> Iterator[None]:
        """On this stream, after all that has been queued so far; at once where there are no streams."""
        if stream is None:
            yield
            return
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
