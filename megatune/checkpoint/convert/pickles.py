"""Files of `torch.save` and other pickles, opened without running or importing anything that they name.

Tensors come back lazily, as places in the file; objects of unknown classes come back as `Opaque` data. See
`pickle_machine` for what makes that safe. Layout of the files: torch/serialization.py, `_save` (zip: `*/data.pkl` and
one member for each storage) and `_legacy_save` (five pickles, then the storages one after the other).
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatune.checkpoint.convert.pickle_machine import Opaque, PickleMachine, checked_key
from megatune.checkpoint.convert.zip_entries import File, is_zip, zip_members
from megatune.errors import CheckpointError

__all__ = ["LazyTensor", "Opaque", "Storage", "open_pickle", "open_pickle_at", "read_pickle"]

Allowed = Mapping[str, Callable[..., Any]]

_MOST_PICKLE = 1 << 29  # bytes of the pickle itself, beside the storages
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_DTYPES = {f"torch.{name}": one for name, one in vars(torch).items() if isinstance(one, torch.dtype)}
_STORAGES = {
    f"torch.{kind}Storage": dtype
    for kind, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexFloat": torch.complex64,
        "ComplexDouble": torch.complex128,
    }.items()
} | {"torch.storage.UntypedStorage": torch.uint8, "torch.UntypedStorage": torch.uint8}


@dataclass(eq=False)
class Storage:
    """Bytes of a file that tensors share: [start, start + size)."""

    file: File
    start: int
    size: int
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor of a file, not read yet. `stride` and `offset` in elements of the storage."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    storage: Storage

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def read(self) -> Tensor:
        """All of it, contiguous, on the host."""
        return self._read(self.shape, self.offset)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of dimension 0, contiguous, on the host; only their bytes are read where the tensor is
        laid out row by row."""
        if not self.shape or not 0 <= start <= stop <= self.shape[0]:
            raise ValueError(f"rows {start} to {stop} of a tensor of shape {self.shape}")
        return self._read((stop - start, *self.shape[1:]), self.offset + start * self.stride[0])

    def flat(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop) in row-major order, of a tensor that is contiguous in its file."""
        if not 0 <= start <= stop <= self.numel:
            raise ValueError(f"elements {start} to {stop} of {self.numel}")
        if not _is_contiguous(self.shape, self.stride):
            return self.read().reshape(-1)[start:stop]
        return self._read((stop - start,), self.offset + start, (1,))

    def _read(self, shape: tuple[int, ...], offset: int, stride: tuple[int, ...] | None = None) -> Tensor:
        stride = self.stride if stride is None else stride
        count, width = math.prod(shape), self.dtype.itemsize
        if count == 0:
            return torch.empty(shape, dtype=self.dtype)
        if count * width > self.storage.size:
            raise CheckpointError(
                f"{self.storage.file.path}: a tensor of shape {shape} does not fit the {self.storage.size} bytes that "
                "the file has for it; get the checkpoint again"
            )
        span = _span(shape, stride)
        raw = self.storage.file.tensor(self.storage.start + offset * width, span * width)
        found = raw.view(self.dtype)
        if _is_contiguous(shape, stride):
            return found.view(shape)
        return found.as_strided(shape, stride).contiguous()


def open_pickle(path: str | Path, allow: Allowed | None = None) -> Any:
    """What a file of `torch.save` (zip or old) or of `pickle.dump` holds, tensors as `LazyTensor`.

    `allow`: module.qualified_name -> a function of ours that is called in its place, with arguments that it must check
    (TypeError and ValueError mean: damaged); everything else becomes `Opaque`. CheckpointError where the file is
    missing, cut off, compressed, larger inside than outside, or where its pickle asks for what only an attack does.
    """
    return _open(File(path), 0, None, allow or {})


def open_pickle_at(path: str | Path | File, offset: int, length: int, allow: Allowed | None = None) -> Any:
    """The same for a file of `torch.save` that is bytes [offset, offset + length) of a larger one; give a `File` where
    many are opened."""
    file = path if isinstance(path, File) else File(path)
    if not 0 <= offset <= offset + length <= file.size:
        raise CheckpointError(f"{file.path}: ends before byte {offset + length}; copy it again")
    return _open(file, offset, length, allow or {})


def read_pickle(data: bytes, allow: Allowed | None = None, *, where: str = "a pickle") -> Any:
    """A pickle without tensors' storages, as DCP's `.metadata`. `where`: its place, for messages."""
    return _machine(data, where, allow or {}).run()


def _open(file: File, start: int, length: int | None, allow: Allowed) -> Any:
    if is_zip(file, start, length):
        return _open_zip(file, start, length, allow)
    size = file.size - start if length is None else length
    head = file.bytes(start, min(size, 64))
    if len(head) < 2 or head[0] != 0x80:
        raise CheckpointError(
            f"{file.path}: is no file of torch.save ({size} bytes); copy it again, or say which format it is"
        )
    if struct.pack("<BBB", 0x80, 2, 0x8A) + b"\x0a" == head[:4]:
        return _open_legacy(file, start, size, allow)
    if size > _MOST_PICKLE:
        raise CheckpointError(f"{file.path}: a pickle of {size} bytes is more than any checkpoint needs")
    return _machine(file.bytes(start, size), str(file.path), allow).run()


def _open_zip(file: File, start: int, length: int | None, allow: Allowed) -> Any:
    members = zip_members(file, start, length)
    pickles = [name for name in members if name.endswith("data.pkl") and name.count("/") <= 1]
    if len(pickles) != 1:
        raise CheckpointError(f"{file.path}: a zip file, but none of torch.save (it has no data.pkl)")
    prefix = pickles[0].removesuffix("data.pkl")
    order = members.get(f"{prefix}byteorder")
    if order is not None and file.bytes(order.start, min(order.size, 16)) != sys.byteorder.encode():
        raise CheckpointError(
            f"{file.path}: was written on a machine with the other byte order; save it again"
        )
    main = members[pickles[0]]
    if main.size > _MOST_PICKLE:
        raise CheckpointError(f"{file.path}: a pickle of {main.size} bytes is more than any checkpoint needs")

    def storage(identity: Any) -> Storage:
        dtype, key, count = _identity(identity)
        place = members.get(f"{prefix}data/{key}")
        if place is None or not 0 <= count * dtype.itemsize <= place.size:
            raise ValueError(f"storage {key} is not in the file")
        return Storage(file, place.start, count * dtype.itemsize, dtype)

    return _machine(file.bytes(main.start, main.size), str(file.path), allow, storage).run()


def _open_legacy(file: File, start: int, size: int, allow: Allowed) -> Any:
    """Five pickles (magic, protocol, system, object, keys), then count and bytes of each storage."""
    data, place = file.bytes(start, min(size, _MOST_PICKLE)), 0
    storages: dict[str, Storage] = {}

    def storage(identity: Any) -> Storage:
        dtype, key, count = _identity(identity)
        found = storages.setdefault(key, Storage(file, 0, count * dtype.itemsize, dtype))
        if count < 0 or found.size != count * dtype.itemsize or found.size > size:
            raise ValueError(f"storage {key} has two sizes")
        return found

    found = []
    for _ in range(5):
        machine = _machine(data, str(file.path), allow, storage, place)
        found.append(machine.run())
        place = machine.stop
        if found[0] != _LEGACY_MAGIC:
            return found[0]
    _, protocol, system, value, keys = found
    little = system.get("little_endian") if isinstance(system, dict) else None
    if (
        protocol != _LEGACY_PROTOCOL
        or little is not (sys.byteorder == "little")
        or not isinstance(keys, list)
    ):
        raise CheckpointError(
            f"{file.path}: an old torch.save file that this version does not know; save it again"
        )
    for key in map(str, keys):
        one = storages.get(key)
        count = int.from_bytes(file.bytes(start + place, 8), "little") if place + 8 <= size else -1
        if one is None or count * one.dtype.itemsize != one.size or place + 8 + one.size > size:
            raise CheckpointError(f"{file.path}: its tensors are cut off or damaged; copy it again")
        one.start = start + place + 8
        place += 8 + one.size
    if any(one.start == 0 for one in storages.values()):
        raise CheckpointError(f"{file.path}: its tensors are cut off or damaged; copy it again")
    return value


def _machine(
    data: bytes, where: str, allow: Allowed, storage: Callable[[Any], Storage] | None = None, start: int = 0
) -> PickleMachine:
    functions = dict(_FUNCTIONS)

    def rebuilt(function: Any, kind: Any, args: Any, state: Any) -> Any:
        """A tensor with attributes, or of a subclass: `_rebuild_from_type_v2`."""
        return machine.call(function, args)

    functions["torch._tensor._rebuild_from_type_v2"] = rebuilt
    functions |= allow
    values = {**_DTYPES, **{name: _Kind(dtype) for name, dtype in _STORAGES.items()}}
    machine = PickleMachine(data, where, functions=functions, values=values, persistent=storage, start=start)
    return machine


@dataclass(frozen=True)
class _Kind:
    """A storage class as a pickle names it."""

    dtype: torch.dtype


def _identity(identity: Any) -> tuple[torch.dtype, str, int]:
    """dtype, key and number of elements from ('storage', class, key, place, count[, view])."""
    word, kind, key, _, count, *view = identity
    if word != "storage" or not isinstance(kind, _Kind) or type(count) is not int or count < 0 or any(view):
        raise ValueError("no storage")
    return kind.dtype, str(key), count


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any, dtype: torch.dtype | None = None
) -> LazyTensor:
    """`torch._utils._rebuild_tensor_v2`; `rest`: requires_grad, hooks, metadata."""
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    dtype = dtype or storage.dtype
    shape, stride = tuple(shape), tuple(stride)
    if len(shape) != len(stride) or len(shape) > 64:
        raise ValueError("strides that do not fit the shape")
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in (offset, *shape, *stride)):
        raise ValueError("negative or absurd sizes")
    if math.prod(shape) and (offset + _span(shape, stride)) * dtype.itemsize > storage.size:
        raise ValueError("a tensor larger than its storage")
    return LazyTensor(dtype, shape, stride, offset, storage)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> LazyTensor:
    if not isinstance(dtype, torch.dtype):
        raise ValueError("no dtype")
    return _rebuild_tensor(storage, offset, shape, stride, dtype=dtype)


def _span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last one, inclusive."""
    return 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for n, step in zip(reversed(shape), reversed(stride), strict=True):
        if n != 1 and step != expected:
            return False
        expected *= n
    return True


def _ordered(pairs: Any = ()) -> dict[Any, Any]:
    """`collections.OrderedDict`: an ordinary dict is ordered."""
    made: dict[Any, Any] = {}
    for key, value in pairs.items() if isinstance(pairs, dict) else pairs:
        made[checked_key(key)] = value
    return made


def _size(values: Any = ()) -> tuple[int, ...]:
    """`torch.Size`, as a tuple."""
    if not all(type(n) is int for n in values):
        raise ValueError("no sizes")
    return tuple(values)


def _parameter(tensor: Any, *rest: Any) -> Any:
    return tensor


def _encoded(text: Any, encoding: Any = "latin1") -> bytes:
    """How protocol 2 writes bytes: `_codecs.encode(text, 'latin1')`."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8"):
        raise ValueError("no bytes")
    return text.encode(encoding)


def _set(values: Any = ()) -> set[Any]:
    return {checked_key(value) for value in values}


def _octets(*args: Any) -> bytes:
    """`bytes(...)` and `bytearray(...)` of bytes or text, not of a number: that would be a size."""
    if not args:
        return b""
    if isinstance(args[0], bytes) and len(args) == 1:
        return args[0]
    return _encoded(*args)


def _attribute(target: Any, name: Any) -> Opaque:
    """`getattr(SomeEnum, "MEMBER")`, how Python 3.11 writes members of enumerations: stays a name."""
    if not isinstance(target, Opaque) or target.args is not None or not isinstance(name, str):
        raise ValueError("an attribute of what is no class")
    return Opaque(f"{target.name}.{name}", ())


def _both(name: str, function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {f"builtins.{name}": function, f"__builtin__.{name}": function}


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.Size": _size,
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": lambda *factory: {},
    "_codecs.encode": _encoded,
    **_both("set", _set),
    **_both("frozenset", lambda values=(): frozenset(_set(values))),
    **_both("dict", lambda *pairs: _ordered(*pairs)),
    **_both("list", lambda values=(): list(values)),
    **_both("bytes", _octets),
    **_both("bytearray", _octets),
    **_both("getattr", _attribute),
}
