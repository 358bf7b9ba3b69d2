"""Counts while the code of one process runs on tensors without memory: bytes alive, and bytes sent."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatune.parallel import World

META = torch.device("meta")
# Of S bytes, the larger of what goes in and what comes out, one of n processes sends this share.
_SHARES: dict[str, Callable[[int], float]] = {
    "allreduce_": lambda n: 2 * (n - 1) / n,
    "allreduce_coalesced_": lambda n: 2 * (n - 1) / n,
    "_allgather_base_": lambda n: (n - 1) / n,
    "allgather_": lambda n: (n - 1) / n,
    "allgather_into_tensor_coalesced_": lambda n: (n - 1) / n,
    "_reduce_scatter_base_": lambda n: (n - 1) / n,
    "reduce_scatter_tensor_coalesced_": lambda n: (n - 1) / n,
    "alltoall_base_": lambda n: (n - 1) / n,
    "send": lambda n: 1,
    "recv_": lambda n: 0,
    "broadcast_": lambda n: 1,
}
_NAMES = ("tp", "pp", "cp", "fsdp", "dp_replicate", "ep", "etp", "efsdp", "dp_shard")


class Tracker(TorchDispatchMode):
    """Within, every new tensor is on meta, whatever device it is for; others that come in are taken for such.

    `live`, `peak`: bytes of all their storages, now and at most. `sent`: bytes that this process sends, by
    axis: all-gather and reduce-scatter of S bytes in all count as rings of n processes do, (n - 1) / n * S, all-reduce
    twice that. `calls`: collectives and messages.
    """

    def __init__(self, world: World) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._inside_kernel = 0
        self._old: set[int] = set()
        self._known: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        axes = {name: getattr(world, name) for name in _NAMES}
        self._axes: dict[str, str] = {}
        for name, axis in axes.items():
            if axis.group is not None:
                self._axes.setdefault(axis.group.group_name, name)
        self._of_ranks = {axis.ranks: name for name, axis in reversed(axes.items()) if axis.size > 1}

    def __enter__(self) -> Tracker:
        resize = torch.UntypedStorage.resize_

        def counted(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            result = resize(storage, size)
            self._resized(storage)
            return result

        self._resize = resize
        torch.UntypedStorage.resize_ = counted
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, named = (
            tuple(map(_on_meta, args)),
            {name: _on_meta(one) for name, one in (kwargs or {}).items()},
        )
        if named.get("device") is not None:
            named["device"] = META
        out = func(*args, **named)
        if self._inside_kernel:
            return out
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)
            return out
        for tensor in out if isinstance(out, tuple | list) else (out,):
            # A DTensor's own storage is for show.
            if isinstance(tensor, Tensor) and tensor.is_meta and not isinstance(tensor, DTensor):
                self.see(tensor)
        return out

    def start_step(self) -> None:
        """Forget what was sent so far, and what was alive at most."""
        self.sent.clear()
        self.calls.clear()
        self.peak = self.live
        self._old = set(self._known)

    def is_new(self, tensor: Tensor) -> bool:
        """Whether its memory is of this step."""
        return id(tensor.untyped_storage()) not in self._old

    def as_one(self, function: Callable) -> Callable:
        """The function as if it were one kernel: what is alive only within it is not counted."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._inside_kernel += 1
            try:
                out = function(*args, **kwargs)
            finally:
                self._inside_kernel -= 1
            self.see(*_tensors(out))
            return out

        return run

    def leave_out(self, tensor: Tensor) -> None:
        """Do not count this one's memory: it is not the device's."""
        self.see(tensor)
        key = id(tensor.untyped_storage())
        reference, size = self._known[key]
        self._known[key] = reference, 0
        self.live -= size

    def see(self, *tensors: Tensor) -> None:
        """Count the memory of these from now on, if it is not yet."""
        for storage in (tensor.untyped_storage() for tensor in tensors):
            key = id(storage)
            if key not in self._known:
                self._known[key] = weakref.ref(storage, lambda _, key=key: self._gone(key)), storage.nbytes()
                self._add(storage.nbytes())

    def _gone(self, key: int) -> None:
        _, size = self._known.pop(key)
        self._old.discard(key)
        self.live -= size

    def _resized(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._known:
            reference, before = self._known[id(storage)]
            self._known[id(storage)] = reference, storage.nbytes()
            self._add(storage.nbytes() - before)

    def _add(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        if name in ("barrier", "monitored_barrier_"):
            return
        group = next(
            dist.ProcessGroup.unbox(one)
            for one in args
            if isinstance(one, torch.ScriptObject) and _is_group(one)
        )
        axis = self._axis(name, group)
        self.sent[axis] += _bytes_sent(name, args, group)
        self.calls[axis] += 1

    def _axis(self, name: str, group: dist.ProcessGroup) -> str:
        if name in ("send", "recv_"):
            return "pp"
        found = self._axes.get(group.group_name)
        return found or self._of_ranks.get(tuple(dist.get_process_group_ranks(group)), "all")


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of the tensors' storages, each once."""
    return sum({id(one): one.nbytes() for one in (tensor.untyped_storage() for tensor in tensors)}.values())


def _bytes_sent(name: str, args: tuple[Any, ...], group: dist.ProcessGroup) -> int:
    if name == "alltoall_base_" and args[4]:
        rows, mine = args[4], group.rank()
        others = sum(rows) - rows[mine]
        return others * (args[1].nbytes // max(1, sum(rows)))
    whole = max(sum(tensor.nbytes for tensor in _tensors(one)) for one in args)
    return round(whole * _SHARES[name](group.size()))


def _on_meta(one: Any) -> Any:
    """An argument without values; a tensor of no dimensions goes with any device."""
    if isinstance(one, Tensor):
        return one if one.is_meta or one.dim() == 0 else one.to(META)
    return type(one)(map(_on_meta, one)) if type(one) in (tuple, list) else one


def _tensors(one: Any) -> Iterator[Tensor]:
    if isinstance(one, Tensor):
        yield one
    elif isinstance(one, tuple | list):
        for part in one:
            yield from _tensors(part)


def _is_group(one: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(one._type())
