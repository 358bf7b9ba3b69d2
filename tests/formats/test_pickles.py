"""Pickles as data: what torch.save writes comes back equal, and nothing that a pickle names is ever run."""

from __future__ import annotations

import argparse
import collections
import enum
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatune.checkpoint.convert import pickle_machine
from megatune.checkpoint.convert.pickles import (
    LazyTensor,
    Opaque,
    open_pickle,
    open_pickle_at,
    read_pickle,
)
from megatune.errors import CheckpointError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.bool,
    torch.complex64,
]


class Colour(enum.Enum):
    RED = 1


class Thing:
    def __init__(self) -> None:
        self.size, self.inner = 3, torch.arange(4)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _values(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def _saved(folder: Path, value: Any, **options: Any) -> Any:
    torch.save(value, folder / "x.pt", **options)
    return open_pickle(folder / "x.pt")


@pytest.mark.parametrize("zip_format", [True, False])
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, zip_format: bool) -> None:
    saved = {str(dtype): _values(dtype, 5, 3) for dtype in DTYPES}
    if not zip_format:
        saved = {name: one for name, one in saved.items() if "float8" not in name and "uint16" not in name}
    found = _saved(tmp_path, saved, _use_new_zipfile_serialization=zip_format)
    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
        lazy = found[name]
        assert isinstance(lazy, LazyTensor) and lazy.dtype == tensor.dtype and lazy.shape == (5, 3)
        assert torch.equal(_bits(lazy.read()), _bits(tensor))
        assert torch.equal(_bits(lazy.rows(1, 4)), _bits(tensor[1:4]))
        assert torch.equal(_bits(lazy.flat(4, 11)), _bits(tensor.reshape(-1)[4:11]))


@pytest.mark.parametrize("zip_format", [True, False])
def test_views_share_their_storage_and_read_only_their_part(tmp_path: Path, zip_format: bool) -> None:
    base = torch.randn(6, 8)
    saved = [
        base,
        base[2:4],
        base.t(),
        base[:, 3],
        base[1::2, ::3],
        base[0, 0],
        torch.empty(0, 4),
        base.expand(6, 8),
    ]
    found = _saved(tmp_path, saved, _use_new_zipfile_serialization=zip_format)
    for tensor, lazy in zip(saved, found, strict=True):
        assert torch.equal(lazy.read(), tensor) and lazy.numel == tensor.numel()
        if tensor.dim():
            assert torch.equal(lazy.rows(0, len(tensor) // 2), tensor[: len(tensor) // 2])
            assert torch.equal(lazy.flat(0, tensor.numel() // 2), tensor.reshape(-1)[: tensor.numel() // 2])
    assert all(lazy.storage.start == found[0].storage.start for lazy in found[:6])


def test_everything_else_is_data(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    default = collections.defaultdict(list, a=[1, 2.5, None, True, 10**30, -5])
    saved = {
        "state": model.state_dict(),
        "parameter": model[0].weight,
        "args": argparse.Namespace(tensor=2, name="x", dtype=torch.bfloat16),
        "enum": Colour.RED,
        "thing": Thing(),
        "default": default,
        "size": torch.Size([2, 3]),
        "device": torch.device("cpu"),
        "set": {1, 2},
        "frozen": frozenset("ab"),
        "bytes": b"\x00\xff" * 300,
        "text": "\u00e9\ud800" * 200,
        "numpy": np.float32(2.5),
        "array": np.arange(3),
        ("key", 1): (1, (2, 3, 4), []),
        "path": Path("a/b"),
    }
    found = _saved(tmp_path, saved)
    assert list(found["state"]) == list(model.state_dict())
    assert torch.equal(found["parameter"].read(), model[0].weight.detach())
    args = found["args"]
    assert (args.name, args.attributes) == (
        "argparse.Namespace",
        {"tensor": 2, "name": "x", "dtype": torch.bfloat16},
    )
    assert isinstance(found["enum"], Opaque) and found["enum"].name.startswith(f"{__name__}.Colour")
    assert found["thing"].attributes["size"] == 3
    assert torch.equal(found["thing"].attributes["inner"].read(), torch.arange(4))
    for name in ("default", "set", "frozen", "bytes", "text", "size", ("key", 1)):
        assert found[name] == saved[name], name
    assert type(found["default"]) is dict
    assert all(isinstance(found[name], Opaque) for name in ("numpy", "array", "device", "path"))
    assert found["numpy"].args is not None and struct.pack("<f", 2.5) in found["numpy"].args


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_pickles_of_every_protocol(tmp_path: Path, protocol: int) -> None:
    value = {
        "a": [1, -2, 3 << 40, 2.5, b"xy" * 200, "z" * 300, bytearray(b"q"), None],
        (1, 2): {3},
        "n": [[]] * 3,
    }
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(value, protocol))
    assert open_pickle(tmp_path / "x.pkl") == value
    assert read_pickle(pickle.dumps(value, protocol)) == value
    known = {"argparse.Namespace": lambda *args: "mine"}
    assert read_pickle(pickle.dumps(argparse.Namespace(a=1), protocol), known) == "mine"


def test_a_file_within_a_file(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(5)}, tmp_path / "one.pt")
    inner = (tmp_path / "one.pt").read_bytes()
    (tmp_path / "many").write_bytes(b"x" * 37 + inner + b"y" * 100_000)
    found = open_pickle_at(tmp_path / "many", 37, len(inner))
    assert torch.equal(found["a"].read(), torch.arange(5))
    with pytest.raises(CheckpointError, match="ends before"):
        open_pickle_at(tmp_path / "many", 37, 1 << 40)


def test_reading_a_slice_takes_the_memory_of_the_slice(tmp_path: Path) -> None:
    torch.save({"big": torch.zeros(1 << 26), "small": torch.arange(3)}, tmp_path / "x.pt")
    script = (
        "import resource, sys, torch\n"
        "from megatune.checkpoint.convert.pickles import open_pickle\n"
        "open_pickle(sys.argv[1])['small'].read()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "found = open_pickle(sys.argv[1])['big']\n"
        "assert found.rows(1000, 2000).sum() == 0 and found.numel == 1 << 26\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    used = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "x.pt")], check=True, capture_output=True, text=True
    )
    assert int(used.stdout) < 20_000  # KiB; the tensor is 256 MiB


# Attacks. Each would create the canary file (or take the memory) if anything in it was run.


class _Runs:
    """Pickles to a call of `function(*args)`."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call

    def __call__(self) -> None:  # pickle wants functions that can be called
        raise AssertionError


def _bomb(canary: Path) -> list[tuple[str, Any]]:
    line = f"open({str(canary)!r}, 'w').close()"
    return [
        ("os.system", _Runs(os.system, f"touch {canary}")),
        ("eval", _Runs(eval, line)),
        ("exec", _Runs(exec, line)),
        ("open", _Runs(open, str(canary), "w")),
        ("import", _Runs(__import__, "antigravity")),
        ("subprocess", _Runs(subprocess.call, ["touch", str(canary)])),
        ("getattr chain", _Runs(_Runs(getattr, _Runs(__import__, "os"), "system"), f"touch {canary}")),
        ("torch.load", _Runs(torch.load, str(canary))),
        ("runpy", _Runs(__import__("runpy").run_path, str(canary))),
        ("in a list", [1, {"deep": (_Runs(os.system, f"touch {canary}"),)}]),
    ]


@pytest.mark.parametrize("case", range(10))
@pytest.mark.parametrize("how", ["zip", "old", "raw"])
def test_a_bomb_is_named_and_not_run(tmp_path: Path, case: int, how: str) -> None:
    canary, file = tmp_path / "canary", tmp_path / "x.pt"
    name, value = _bomb(canary)[case]
    if how == "raw":
        file.write_bytes(pickle.dumps(value))
    else:
        torch.save({"model": torch.ones(2), "x": value}, file, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(CheckpointError, match="may be an attack") as raised:
        open_pickle(file)
    assert str(file) in str(raised.value), name
    assert not canary.exists()


def _hand(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def test_classes_are_names_that_cannot_be_changed() -> None:
    """A state for a class would set attributes of it (`Opaque`, `OrderedDict`, ...) in a usual unpickler."""
    state = b"}\x8c\x0c__setstate__" + _name("os", "system") + b"s"
    for target in (("collections", "OrderedDict"), (pickle_machine.__name__, "Opaque"), ("torch", "Size")):
        with pytest.raises(CheckpointError):
            read_pickle(_hand(_name(*target), state, b"b"))
        with pytest.raises(CheckpointError, match="sets attributes of the class"):
            read_pickle(_hand(_name(*target), b"}\x8c\x01aK\x01s", b"b"))
    found = read_pickle(_hand(_name("a.b", "C"), b")R}\x8c\x0c__setstate__K\x05sb"))
    assert found.attributes == {"__setstate__": 5} and not hasattr(Opaque, "__setstate__")


def test_functions_of_torch_and_of_unknown_modules_are_not_called(tmp_path: Path) -> None:

    before = set(sys.modules)
    found = read_pickle(_hand(_name("antigravity.x", "y"), b"\x8c\x01a\x85R"))
    assert isinstance(found, Opaque) and found.args == ("a",) and "antigravity" not in sys.modules
    assert isinstance(read_pickle(_hand(_name("torch", "from_file"), b"\x8c\x01a\x85R")), Opaque)
    assert isinstance(read_pickle(_hand(_name("functools", "partial"), b"\x8c\x01a\x85R")), Opaque)
    assert set(sys.modules) == before
    with pytest.raises(CheckpointError, match="may be an attack"):  # the result of getattr is not called
        read_pickle(_hand(_name("builtins", "getattr"), _name("m", "C"), b"\x8c\x01x\x86R", b")R"))
    with pytest.raises(CheckpointError):  # getattr of data
        read_pickle(_hand(_name("builtins", "getattr"), b"]\x8c\x06append\x86R"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        b"\x80\x04",
        b"\x80\x07N.",
        _hand(b"0"),
        _hand(b"("),
        _hand(b"K"),
        _hand(b"h\x05"),
        _hand(b"t"),
        _hand(b"\x8c\xffabc"),
        _hand(b"\x8e" + struct.pack("<Q", 1 << 60)),
        _hand(b"B" + struct.pack("<I", 1 << 31)),
        _hand(b"\x96" + struct.pack("<Q", (1 << 64) - 1)),
        _hand(b"\x8b" + struct.pack("<i", -5)),
        _hand(b"\x8b" + struct.pack("<i", 1 << 20) + b"\xff" * (1 << 20)),
        _hand(b"}]K\x01s"),
        _hand(b"}(K\x01u"),
        _hand(b"N)R"),
        _hand(b"N}b"[:2] + b"a"),
        _hand(b"\x82\x01"),  # the extension registry
        _hand(b"\x97"),  # a buffer outside the pickle
        _hand(b"Q"),
        _hand(b"\x8c\x01aQ"),
        _hand(_name("builtins", "bytearray"), b"J\xff\xff\xff\x7f\x85R"),
        _hand(_name("torch", "Size"), b"\x8c\x03abc\x85R"),
        _hand(_name("torch._utils", "_rebuild_tensor_v2"), b"(K\x01K\x00)))NtR"),
        _hand(b"c" + b"a" * 5000 + b"\nb\n"),
        b"\x80\x04" + b")" + b"\x85" * 50_000 + b"}\x8c\x01x\x86" + b".",  # fine to hold, ends at once
    ],
)
def test_damaged_streams_are_one_error(data: bytes) -> None:
    if data.endswith(b"\x86."):
        assert isinstance(read_pickle(data), tuple)
        return
    with pytest.raises(CheckpointError, match="a pickle: .*nothing in it was run"):
        read_pickle(data)


def test_random_damage_raises_nothing_else(tmp_path: Path) -> None:
    torch.save(
        {"a": torch.arange(5), "b": [argparse.Namespace(x=1), {"c": (1, "two", 3.0)}]}, tmp_path / "x.pt"
    )
    whole = (tmp_path / "x.pt").read_bytes()
    raw = pickle.dumps({"a": [1, 2.0, "x"], "n": argparse.Namespace(x={1: 2}), "p": Path("a")})
    generator = np.random.default_rng(0)
    count = int(os.environ.get("MEGATUNE_FUZZ", "150"))
    refused = 0
    for _ in range(count):
        for source in (whole, raw):
            data = bytearray(source)
            for place in generator.integers(0, len(data), generator.integers(1, 6)):
                data[place] = generator.integers(0, 256)
            (tmp_path / "y.pt").write_bytes(data[: generator.integers(1, len(data))] if _ % 4 == 0 else data)
            try:
                found = open_pickle(tmp_path / "y.pt")
                if isinstance(found, dict) and isinstance(found.get("a"), LazyTensor):
                    found["a"].read()
            except CheckpointError:
                refused += 1
    assert count // 4 < refused < 2 * count


def _bounded(bombs: list[bytes], tmp_path: Path, megabytes: int) -> list[str]:
    """What reading pickles one after the other says in a process that may use so much more memory, and a minute."""
    for number, data in enumerate(bombs):
        (tmp_path / f"{number}.bomb").write_bytes(data)
    script = (
        "import resource, sys, torch\n"
        "from megatune.checkpoint.convert.pickles import open_pickle\n"
        "from megatune.errors import CheckpointError\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        f"limit = used + {megabytes} * 2**20\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        open_pickle(path)\n"
        "        print('read')\n"
        "    except CheckpointError as error:\n"
        "        print(error)\n"
    )
    files = [str(tmp_path / f"{number}.bomb") for number in range(len(bombs))]
    done = subprocess.run([sys.executable, "-c", script, *files], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-300:]
    return done.stdout.splitlines()


def test_bombs_of_memory_and_time_stay_small(tmp_path: Path) -> None:
    twice = [b"](" + 2 * (b"h" + bytes([n])) + b"eq" + bytes([n + 1]) for n in range(100)]
    keys = b")" + b"q\x00h\x00\x86" * 60
    text = b"X" + struct.pack("<I", 1 << 22) + b"a" * (1 << 22) + b"q\x01"
    said = _bounded(
        [
            _hand(b"]q\x00" + b"".join(twice)),  # 2 ** 100 lists, but shared: fine to hold
            _hand(b"r" + struct.pack("<I", (1 << 32) - 1)),  # an index that asks for 32 GiB
            _hand(b"}" + keys + b"Ns"),  # a key whose hash would take 2 ** 60 steps
            _hand(b"})" + b"\x85" * 1_000_000 + b"Ns"),  # a key whose hash would overflow C's stack
            _hand(
                text + (_name("_codecs", "encode") + b"h\x01\x8c\x06latin1\x86R") * 2000
            ),  # 8 GiB from 4 MiB
        ],
        tmp_path,
        300,
    )
    assert said[0] == "read" and len(said) == 5
    assert all("nothing in it was run" in line for line in said[1:])


def test_too_many_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_machine, "MOST_OBJECTS", 1000)
    with pytest.raises(CheckpointError, match="more than 1000 objects"):
        read_pickle(_hand(b"]" * 1001))
    assert read_pickle(_hand(b"]" * 900)) == []


# Zip files that are not what torch.save writes.


def _rezipped(
    tmp_path: Path, change: Callable[[dict[str, bytes]], None], method: int = zipfile.ZIP_STORED
) -> Path:
    torch.save({"a": torch.arange(1000)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as source:
        members = {name: source.read(name) for name in source.namelist()}
    change(members)
    with zipfile.ZipFile(tmp_path / "y.pt", "w", method) as target:
        for name, data in members.items():
            target.writestr(name, data)
    return tmp_path / "y.pt"


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    path = _rezipped(
        tmp_path, lambda members: members.update({"x/data/0": b"\0" * 10_000_000}), zipfile.ZIP_DEFLATED
    )
    with pytest.raises(CheckpointError, match="compressed"):
        open_pickle(path)
    assert torch.equal(open_pickle(_rezipped(tmp_path, lambda members: None))["a"].read(), torch.arange(1000))


def test_members_must_be_there_and_large_enough(tmp_path: Path) -> None:
    for change in (
        lambda members: members.update({"x/data/0": b"short"}),
        lambda members: members.pop("x/data/0"),
        lambda members: members.pop("x/data.pkl"),
        lambda members: members.update({"x/byteorder": b"big"}),
    ):
        with pytest.raises(CheckpointError, match="y.pt"):
            open_pickle(_rezipped(tmp_path, change))


@pytest.mark.parametrize("zip_format", [True, False])
def test_cut_files(tmp_path: Path, zip_format: bool) -> None:
    torch.save({"a": torch.arange(1000)}, tmp_path / "x.pt", _use_new_zipfile_serialization=zip_format)
    data = (tmp_path / "x.pt").read_bytes()
    for size in (*range(0, len(data), 197), len(data) - 1):
        (tmp_path / "x.pt").write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="x.pt"):
            open_pickle(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_pickle(tmp_path / "none.pt")


def test_absurd_shapes_take_no_memory(tmp_path: Path) -> None:
    huge = torch.zeros(1).expand(1 << 40)
    lazy = _saved(tmp_path, {"a": huge})["a"]
    assert lazy.shape == (1 << 40,)
    with pytest.raises(CheckpointError, match="does not fit"):
        lazy.read()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8 << 20
    data = (tmp_path / "x.pt").read_bytes()
    real = struct.pack("<BBQ", 0x8A, 6, 1 << 40)[:8]
    assert real in data  # the shape, where the stride is 0
    (tmp_path / "x.pt").write_bytes(
        data.replace(real + b"\x85q", struct.pack("<BBQ", 0x8A, 6, 1 << 41)[:8] + b"\x85q")
    )
    assert open_pickle(tmp_path / "x.pt")["a"].shape == (1 << 41,)


def test_many_files_stay_within_the_limit_of_descriptors(tmp_path: Path) -> None:
    for n in range(150):
        torch.save(torch.tensor([n]), tmp_path / f"{n}.pt")
    before = len(os.listdir("/proc/self/fd"))  # of other tests in this process
    opened = [open_pickle(tmp_path / f"{n}.pt") for n in range(150)]
    assert len(os.listdir("/proc/self/fd")) - before < 120
    assert [int(one.read()) for one in opened] == list(range(150))
