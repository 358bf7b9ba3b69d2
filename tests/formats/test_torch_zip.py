"""Our writer of torch.save's files: torch.load reads what was written, also the weights-only one."""

from __future__ import annotations

import argparse
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from megatune.checkpoint.convert.torch_zip import Instance, Streamed, torch_file_size, write_torch_file

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.uint16,
]


def _load(path: Path, *classes: type):
    with torch.serialization.safe_globals(list(classes)):
        return torch.load(path, weights_only=True, mmap=True)


def test_plain_values_come_back(tmp_path: Path) -> None:
    value = {
        "n": None,
        "bools": [True, False],
        "ints": [0, 255, 256, -1, 2**31 - 1, -(2**31), 2**31, -(2**40), 2**63, -(2**80)],
        "floats": [0.0, -1.5, float("inf"), 1e-300],
        "text": "grüß 文",
        "bytes": bytes(range(256)),
        "tuple": ((), (1,), (1, (2, 3), [4])),
        "ordered": OrderedDict(b=1, a={"x": []}),
        "set": {3, 1, 2},
        "size": torch.Size((2, 3)),
        "dtype": torch.bfloat16,
        "device": torch.device("cuda", 1),
        7: "an int as key",
        "many": list(range(2500)),
        "wide": {str(index): index for index in range(2500)},
    }
    write_torch_file(tmp_path / "x.pt", value)
    found = _load(tmp_path / "x.pt")
    assert found == value
    assert type(found["ordered"]) is OrderedDict and list(found["ordered"]) == ["b", "a"]
    assert type(found["size"]) is torch.Size and type(found["bools"][0]) is bool


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.randint(0, 2, (4, 6), generator=torch.Generator().manual_seed(0)).to(dtype)
    streamed = Streamed(dtype, (4, 6), lambda: iter((raw[:1], raw[1:])))
    written = write_torch_file(tmp_path / "x.pt", {"a": raw, "b": streamed, "c": raw[2].clone()[0]})
    found = _load(tmp_path / "x.pt")
    for name, wanted in {"a": raw, "b": raw, "c": raw[2, 0]}.items():
        assert found[name].dtype == dtype and found[name].shape == wanted.shape
        assert torch.equal(
            found[name].contiguous().view(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8)
        )
    size = (tmp_path / "x.pt").stat().st_size
    assert written == size <= torch_file_size(2 * raw.nbytes + 8, 3)


def test_views_and_tied_tensors_share_their_storage(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    streamed = Streamed(torch.float32, (4, 6), lambda: [base])
    value = {
        "whole": base,
        "columns": base[:, 1:3],
        "turned": base.T,
        "row": base[2],
        "parameter": torch.nn.Parameter(base),
        "words": base.view(torch.int32),
        "tied": [streamed, streamed],
        "nothing": [torch.empty(0, 3), torch.empty(0)],
        "number": torch.tensor(3.0),
    }
    write_torch_file(tmp_path / "x.pt", value)
    found = _load(tmp_path / "x.pt")
    for name in ("whole", "columns", "turned", "row", "words"):
        assert torch.equal(found[name], value[name]) and found[name].stride() == value[name].stride()
    assert found["whole"].data_ptr() == found["turned"].data_ptr() == found["parameter"].data_ptr()
    assert found["tied"][0].data_ptr() == found["tied"][1].data_ptr()
    assert [tuple(tensor.shape) for tensor in found["nothing"]] == [(0, 3), (0,)]
    assert found["number"].item() == 3.0 and found["number"].dim() == 0
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        records = [item for item in archive.infolist() if "/data/" in item.filename]
    # base, its words, the streamed one, two empty ones and the number
    assert len(records) == 6


def test_the_file_is_a_plain_zip_with_checked_and_aligned_records(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    write_torch_file(path, [torch.arange(n) for n in range(1, 20)])
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert all(item.compress_type == zipfile.ZIP_STORED for item in archive.infolist())
        names = [item.filename for item in archive.infolist() if "/data/" in item.filename]
    reader = torch._C.PyTorchFileReader(str(path))
    assert [reader.get_record_offset(name.removeprefix("archive/")) % 64 for name in names] == [0] * 19
    first = path.read_bytes()
    write_torch_file(path, [torch.arange(n) for n in range(1, 20)])
    assert path.read_bytes() == first


def test_named_classes(tmp_path: Path) -> None:
    args = Instance(
        "argparse.Namespace", state={"tensor_model_parallel_size": 2, "params_dtype": torch.bfloat16}
    )
    write_torch_file(tmp_path / "x.pt", {"args": args, "version": 3.0})
    found = _load(tmp_path / "x.pt", argparse.Namespace)
    assert found["args"] == argparse.Namespace(tensor_model_parallel_size=2, params_dtype=torch.bfloat16)
    with pytest.raises(Exception, match="argparse.Namespace"):
        _load(tmp_path / "x.pt")


def test_one_chunk_at_a_time_is_in_memory(tmp_path: Path) -> None:
    # A stream that fills one buffer again and again: right only if each chunk is written before the next is asked for.
    buffer = torch.empty(1 << 14)

    def chunks():
        for number in range(64):
            yield buffer.fill_(float(number))

    write_torch_file(tmp_path / "x.pt", Streamed(torch.float32, (64, 1 << 14), chunks))
    found = _load(tmp_path / "x.pt")
    assert torch.equal(found[:, 0], torch.arange(64.0)) and torch.equal(found[:, -1], torch.arange(64.0))


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([torch.zeros(3)], "3 elements were given, 4 announced"),
        ([torch.zeros(5)], "5 elements were given, 4 announced"),
        ([torch.zeros(4, dtype=torch.float64)], "a chunk of torch.float64, announced torch.float32"),
    ],
)
def test_streams_that_are_not_as_announced(tmp_path: Path, chunks: list, message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        write_torch_file(tmp_path / "x.pt", Streamed(torch.float32, (4,), lambda: chunks))


def test_what_cannot_be_written(tmp_path: Path) -> None:
    for value in (object(), lambda: 0, torch.zeros(2, device="meta"), torch.eye(2).to_sparse()):
        with pytest.raises(TypeError, match="cannot be written into a torch file"):
            write_torch_file(tmp_path / "x.pt", [value])
