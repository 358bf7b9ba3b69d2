"""Our safetensors reader and writer against the `safetensors` library, and files that are not whole."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatune.checkpoint.safetensors_file import DTYPES, SafetensorsFile, SafetensorsWriter
from megatune.checkpoint.sources import INDEX, SINGLE, SafetensorsFolder, weights_digest
from megatune.errors import CheckpointError


def _tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    values = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(len(shape)))
    return values.to(dtype)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / SINGLE
    save_file({"a": torch.randn(6, 4), "b": torch.randn(5, 2, 3).bfloat16()}, path)
    return path


def test_reads_every_dtype_by_rows(tmp_path: Path) -> None:
    tensors = {name: _tensor(dtype, 7, 3) for name, dtype in DTYPES.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    source = SafetensorsFile(tmp_path / "x.safetensors")
    assert source.names() == set(tensors)
    for name, tensor in tensors.items():
        rows = source.rows(name, 2, 6)
        assert (source.shape(name), source.dtype(name)) == ((7, 3), tensor.dtype)
        assert rows.dtype == tensor.dtype and torch.equal(rows.float(), tensor[2:6].float())
    assert source.rows("F32", 3, 3).shape == (0, 3)
    with pytest.raises(ValueError, match="rows 5 to 8 of 7"):
        source.rows("F32", 5, 8)


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = {"z": torch.randn(3, 4), "a": torch.randn(5).bfloat16(), "empty": torch.empty(0, 2).bfloat16()}
    entries = [(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    with SafetensorsWriter(tmp_path / "x.safetensors", entries) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_the_writer_takes_only_what_was_announced(tmp_path: Path) -> None:
    entries = [("a", torch.float32, (2, 2)), ("b", torch.float32, (2,))]
    with pytest.raises(ValueError, match="announced"), SafetensorsWriter(tmp_path / "x", entries) as writer:
        writer.write("a", torch.zeros(2, 3))
    with (
        pytest.raises(ValueError, match="b was announced"),
        SafetensorsWriter(tmp_path / "x", entries) as writer,
    ):
        writer.write("a", torch.zeros(2, 2))
    with pytest.raises(ValueError, match="order the tensors"):
        SafetensorsWriter(tmp_path / "x", [("a", torch.bfloat16, (3,)), ("b", torch.float32, (2,))])


@pytest.mark.parametrize("cut", [1, 40, 10_000])
def test_truncated_file_is_named(file: Path, cut: int) -> None:
    file.write_bytes(file.read_bytes()[: max(0, file.stat().st_size - cut)])
    with pytest.raises(CheckpointError, match=rf"{file}: truncated or damaged"):
        SafetensorsFolder(file.parent)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[1, 2]",
        json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode(),
        json.dumps({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [8, 4]}}).encode(),
        json.dumps({"a": {"dtype": "F32", "shape": [2]}}).encode(),
    ],
)
def test_damaged_header(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / SINGLE
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    with pytest.raises(CheckpointError, match=f"{path}: truncated or damaged"):
        SafetensorsFolder(tmp_path)


def test_absurd_header_length_is_not_read(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(CheckpointError, match="without a whole header"):
        SafetensorsFolder(tmp_path)


def _sharded(folder: Path) -> Path:
    save_file({"a": torch.zeros(2, 2)}, folder / "model-1.safetensors")
    save_file({"b": torch.ones(3)}, folder / "model-2.safetensors")
    _index(folder, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    return folder


def _index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_are_one_source(tmp_path: Path) -> None:
    source = SafetensorsFolder(_sharded(tmp_path))
    assert source.names() == {"a", "b"}
    assert torch.equal(source.rows("b", 1, 3), torch.ones(2))


def test_missing_shard_is_named(tmp_path: Path) -> None:
    (_sharded(tmp_path) / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-2.safetensors: missing.*finish the download"):
        SafetensorsFolder(tmp_path)


def test_tensor_that_the_index_promises(tmp_path: Path) -> None:
    _index(_sharded(tmp_path), {"a": "model-1.safetensors", "c": "model-2.safetensors"})
    with pytest.raises(CheckpointError, match=r"model-2.safetensors: has no tensor c"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin", ".."]
)
def test_index_stays_inside_the_folder(tmp_path: Path, name: str) -> None:
    _index(_sharded(tmp_path), {"a": name})
    with pytest.raises(CheckpointError, match="is no safetensors file of this folder"):
        SafetensorsFolder(tmp_path)


def _unfinished(folder: Path) -> None:
    (folder / "model-3.safetensors.incomplete").touch()


def _no_index(folder: Path) -> None:
    (folder / INDEX).unlink()


def _no_map(folder: Path) -> None:
    _index(folder, [])


def _bad_json(folder: Path) -> None:
    (folder / INDEX).write_text("{")


def _pickles(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "pytorch_model.bin").touch()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_unfinished, "incomplete: a download that did not finish"),
        (_no_index, f"neither {SINGLE} nor {INDEX}; finish the download"),
        (_no_map, "has no weight_map"),
        (_bad_json, "is not valid JSON"),
        (_pickles, "pickled weights only"),
    ],
)
def test_folder_that_is_not_whole(tmp_path: Path, spoil, message: str) -> None:
    spoil(_sharded(tmp_path))
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFolder(tmp_path)


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        SafetensorsFolder(tmp_path / "x")
    with pytest.raises(CheckpointError, match="holds no weights"):
        SafetensorsFolder(tmp_path)


def test_digest_tells_fine_tunes_apart(tmp_path: Path) -> None:
    digests = []
    for seed in (0, 0, 1):
        generator = torch.Generator().manual_seed(seed)
        save_file({"a": torch.randn(300, 300, generator=generator)}, tmp_path / SINGLE)
        digests.append(weights_digest(tmp_path))
    assert digests[0] == digests[1] != digests[2]
