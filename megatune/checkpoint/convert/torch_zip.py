"""torch.save's files, written tensor by tensor: for readers of other frameworks, without their memory.

A file is an uncompressed zip archive: `data.pkl` (a pickle of protocol 2 in which a tensor is a call of torch's rebuild
function on a storage's number), `data/N` (the bytes of storage N, aligned to 64) and a few words on the version
(https://docs.pytorch.org/docs/stable/notes/serialization.html). `torch.load(weights_only=True, mmap=True)` opens it;
classes that it has to be told of are those that the caller names with `Instance`.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

_ROOT = "archive"
_ALIGNMENT = 64
_LOCAL_HEADER = 30  # bytes of a zip member's header without its name and extra fields
_ZIP64_EXTRA = 20
_PADDING_ID = b"FB"  # what torch itself calls the extra field that aligns
_PIECE = 1 << 24  # elements handed to the file at once
_BATCH = 1000  # entries between two MARKs, as pickle does

# dtypes whose storages torch.save knows by a class; others are bytes and a dtype.
_STORAGES = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.int64: "LongStorage",
    torch.int32: "IntStorage",
    torch.int16: "ShortStorage",
    torch.int8: "CharStorage",
    torch.uint8: "ByteStorage",
    torch.bool: "BoolStorage",
    torch.complex64: "ComplexFloatStorage",
    torch.complex128: "ComplexDoubleStorage",
}


@dataclass(frozen=True, eq=False)
class Streamed:
    """A tensor that is made while it is written. `chunks()` gives its elements in row-major order, in pieces of any
    shape, all of `dtype`. One object in two places is one storage, as tied weights are."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Tensor]]


@dataclass(frozen=True, eq=False)
class Instance:
    """An object of a class that is only named here: `type_name` ("argparse.Namespace"), made from `arguments` and
    given `state` as its attributes (None: none)."""

    type_name: str
    arguments: tuple[Any, ...] = ()
    state: Mapping[str, Any] | None = None


@dataclass
class _Storage:
    """Bytes of the archive: a tensor's whole storage, or a `Streamed`."""

    dtype: torch.dtype
    numel: int
    source: Tensor | Streamed
    number: int


def write_torch_file(path: str | Path, value: Any) -> int:
    """Write what `torch.load` will return as `value`; returns the file's size in bytes.

    `value`: dicts (ordered ones too), lists, tuples, sets, strings, bytes, numbers, None, torch dtypes, sizes and
    devices, tensors (tensors that share a storage do so in the file), `Streamed` and `Instance`. Beside what `value`
    holds, memory is one chunk of one `Streamed`. The file is on disk when this returns. TypeError for anything else;
    ValueError where a `Streamed` gives more, fewer or other elements than it says.
    """
    pickler = _Pickler()
    text = pickler.dump(value)
    with open(path, "wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            _member(archive, file, "data.pkl", [text], len(text))
            _member(archive, file, ".format_version", [b"1"], 1)
            _member(archive, file, ".storage_alignment", [str(_ALIGNMENT).encode()], 2)
            _member(archive, file, "byteorder", [b"little"], 6)
            for storage in pickler.storages.values():
                size = storage.numel * storage.dtype.itemsize
                _member(archive, file, f"data/{storage.number}", _bytes_of(storage), size)
            _member(archive, file, "version", [b"3\n"], 2)
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def pickled(value: Any) -> bytes:
    """The pickle of `value` alone, as in a file's `data.pkl`: where there are tensors in it, of their names."""
    return _Pickler().dump(value)


def torch_file_size(tensor_bytes: int, tensors: int) -> int:
    """About how large a file with so many tensors will be."""
    return tensor_bytes + 512 * tensors + 16384


def _member(
    archive: zipfile.ZipFile, file: IO[bytes], name: str, data: Iterable[bytes | memoryview], size: int
) -> None:
    """One record, its first byte at a multiple of `_ALIGNMENT`."""
    entry = zipfile.ZipInfo(f"{_ROOT}/{name}", (1980, 1, 1, 0, 0, 0))
    large = size >= 1 << 31
    start = file.tell() + _LOCAL_HEADER + len(entry.filename) + 4 + (_ZIP64_EXTRA if large else 0)
    padding = -start % _ALIGNMENT
    entry.extra = _PADDING_ID + struct.pack("<H", padding) + b"Z" * padding
    entry.file_size = size
    with archive.open(entry, "w", force_zip64=large) as member:
        for piece in data:
            member.write(piece)


def _bytes_of(storage: _Storage) -> Iterator[memoryview]:
    source = storage.source
    chunks = [source] if isinstance(source, Tensor) else source.chunks()
    done = 0
    for chunk in chunks:
        if chunk.dtype != storage.dtype:
            raise ValueError(f"storage {storage.number}: a chunk of {chunk.dtype}, announced {storage.dtype}")
        flat = chunk.detach().cpu().contiguous().view(-1)
        done += flat.numel()
        for piece in flat.split(_PIECE):
            yield memoryview(piece.view(torch.uint8).numpy())
    if done != storage.numel:
        raise ValueError(f"storage {storage.number}: {done} elements were given, {storage.numel} announced")


@dataclass
class _Pickler:
    """Protocol 2 as `torch.load(weights_only=True)` reads it: no references but to storages, which are few."""

    storages: dict[int, _Storage] = field(default_factory=dict)
    _out: bytearray = field(default_factory=bytearray)
    # Keeps what storages are recognised by alive while addresses are compared.
    _kept: list[Any] = field(default_factory=list)

    def dump(self, value: Any) -> bytes:
        self._out += b"\x80\x02"
        self._put(value)
        self._out += b"."
        return bytes(self._out)

    def _put(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, Streamed):
            strides = [math.prod(value.shape[dim + 1 :]) for dim in range(len(value.shape))]
            storage = self._storage(id(value), value.dtype, math.prod(value.shape), value)
            self._rebuild(storage, 0, value.shape, tuple(strides))
        elif isinstance(value, Instance):
            self._instance(value)
        elif isinstance(value, dict):
            self._dict(value)
        elif isinstance(value, (list, tuple, set, torch.Size)):
            self._sequence(value)
        else:
            self._scalar(value)

    def _scalar(self, value: Any) -> None:
        out = self._out
        if value is None or isinstance(value, bool):
            out += {None: b"N", True: b"\x88", False: b"\x89"}[value]
        elif isinstance(value, int):
            self._int(value)
        elif isinstance(value, float):
            out += b"G" + struct.pack(">d", value)
        elif isinstance(value, str):
            data = value.encode("utf-8", "surrogatepass")
            out += b"X" + struct.pack("<I", len(data)) + data
        elif isinstance(value, bytes):  # protocol 2 has none: the text of equal code points, encoded
            self._call("_codecs", "encode", (value.decode("latin1"), "latin1"))
        elif isinstance(value, torch.dtype):
            self._global("torch", str(value).removeprefix("torch."))
        elif isinstance(value, torch.device):
            arguments = (value.type,) if value.index is None else (value.type, value.index)
            self._call("torch", "device", arguments)
        else:
            raise TypeError(f"a {type(value).__name__} cannot be written into a torch file")

    def _int(self, value: int) -> None:
        if 0 <= value < 256:
            self._out += b"K" + struct.pack("<B", value)
        elif -(1 << 31) <= value < 1 << 31:
            self._out += b"J" + struct.pack("<i", value)
        else:
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self._out += b"\x8a" + struct.pack("<B", len(data)) + data

    def _dict(self, value: dict[Any, Any]) -> None:
        if isinstance(value, OrderedDict):
            self._call("collections", "OrderedDict", ())
        else:
            self._out += b"}"
        items = list(value.items())
        for start in range(0, len(items), _BATCH):
            self._out += b"("
            for key, item in items[start : start + _BATCH]:
                self._put(key)
                self._put(item)
            self._out += b"u"

    def _sequence(self, value: list | tuple | set | torch.Size) -> None:
        if isinstance(value, torch.Size):
            self._call("torch", "Size", (tuple(value),))
            return
        if isinstance(value, set):
            self._call("builtins", "set", (sorted(value),))
            return
        if isinstance(value, tuple):
            self._out += b"("
            for item in value:
                self._put(item)
            self._out += b"t"
            return
        self._out += b"]"
        for start in range(0, len(value), _BATCH):
            self._out += b"("
            for item in value[start : start + _BATCH]:
                self._put(item)
            self._out += b"e"

    def _instance(self, value: Instance) -> None:
        module, _, name = value.type_name.rpartition(".")
        if value.state is None:
            self._call(module, name, value.arguments)
            return
        self._global(module, name)
        self._put(value.arguments)
        self._out += b"\x81"  # NEWOBJ: made without its __init__
        self._put(dict(value.state))
        self._out += b"b"

    def _tensor(self, value: Tensor) -> None:
        tensor = value.detach()
        if tensor.layout != torch.strided or tensor.is_meta:
            raise TypeError(
                f"a {tensor.layout} tensor on {tensor.device} cannot be written into a torch file"
            )
        whole = tensor.untyped_storage()
        flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(whole)
        # An empty storage has no address of its own.
        key = whole.data_ptr() or id(value)
        storage = self._storage(key, tensor.dtype, flat.numel(), flat)
        # A view of another dtype counts its elements otherwise: a storage of its own.
        if storage.dtype != tensor.dtype:
            own = tensor.clone(memory_format=torch.contiguous_format)
            storage = self._storage(id(own), own.dtype, own.numel(), own.view(-1))
            self._kept.append(own)
            tensor = own
        self._kept.append(value)
        self._rebuild(storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())

    def _storage(self, key: int, dtype: torch.dtype, numel: int, source: Tensor | Streamed) -> _Storage:
        if key not in self.storages:
            self.storages[key] = _Storage(dtype, numel, source, len(self.storages))
        return self.storages[key]

    def _rebuild(
        self, storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
    ) -> None:
        known = _STORAGES.get(storage.dtype)
        self._global("torch._utils", "_rebuild_tensor_v2" if known else "_rebuild_tensor_v3")
        self._out += b"(("
        self._put("storage")
        if known:
            self._global("torch", known)
        else:
            self._global("torch.storage", "UntypedStorage")
        count = storage.numel if known else storage.numel * storage.dtype.itemsize
        for item in (str(storage.number), "cpu", count):
            self._put(item)
        self._out += b"tQ"
        for item in (offset, shape, stride, False, OrderedDict()):
            self._put(item)
        if not known:
            self._put(storage.dtype)
        self._out += b"tR"

    def _global(self, module: str, name: str) -> None:
        if "\n" in module + name:
            raise ValueError(f"{module}.{name}: is no name")
        self._out += f"c{module}\n{name}\n".encode()

    def _call(self, module: str, name: str, arguments: tuple[Any, ...]) -> None:
        self._global(module, name)
        self._put(arguments)
        self._out += b"R"
