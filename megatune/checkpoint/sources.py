"""Where weights come from: a Hugging Face folder of safetensors, read by slices of rows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Protocol

import torch
from torch import Tensor

from megatune.checkpoint.safetensors_file import SafetensorsFile
from megatune.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SAMPLES, _SAMPLE_BYTES = 32, 4096


class TensorSource(Protocol):
    """Named tensors that can be read by slices of dimension 0, in their own dtype, on the host. `str` of it is the
    place, for messages."""

    def names(self) -> set[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def rows(self, name: str, start: int, stop: int) -> Tensor: ...


class SafetensorsFolder:
    """The tensors of a Hugging Face folder: `model.safetensors`, or shards and their index.

    Every file's header is checked against its size when the folder is opened, so a missing, half-downloaded or
    truncated file is a CheckpointError, naming it, before anything is loaded.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = _weight_map(self.folder)
        if index is None:
            single = SafetensorsFile(self.folder / SINGLE)
            self._where = dict.fromkeys(single.entries, single)
            return
        files = {file: SafetensorsFile(self.folder / file) for file in dict.fromkeys(index.values())}
        self._where = {}
        for name, file in index.items():
            if name not in files[file].entries:
                raise CheckpointError(
                    f"{self.folder / file}: has no tensor {name}, though {INDEX} says so; download the folder again"
                )
            self._where[name] = files[file]

    def __str__(self) -> str:
        return str(self.folder)

    def names(self) -> set[str]:
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._where[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._where[name].dtype(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._where[name].rows(name, start, stop)


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files that hold a folder's weights; CheckpointError where they are not all there."""
    index = _weight_map(Path(folder))
    return [
        Path(folder) / file for file in (dict.fromkeys(index.values()) if index is not None else (SINGLE,))
    ]


def weights_digest(folder: str | Path) -> str:
    """Hex digest that tells base models apart without reading them whole.

    Covers each file's header (names, dtypes, shapes), its size, and samples of its bytes, so that another fine-tune
    of the same architecture differs too. Milliseconds a file.
    """
    digest = hashlib.sha256()
    for path in weight_files(folder):
        digest.update(path.name.encode())
        digest_file(path, digest)
    return digest.hexdigest()


def digest_file(path: Path, digest: hashlib._Hash) -> None:
    """Add a file's size, its first megabyte and samples spread over the rest to `digest`."""
    size = path.stat().st_size
    digest.update(str(size).encode())
    with open(path, "rb") as file:
        digest.update(file.read(1 << 20))
        for sample in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * (sample + 1) // _SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))


def read_json(path: Path) -> dict:
    """A JSON object from a file; CheckpointError where it is missing or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); is the folder complete?"
        ) from error
    except (ValueError, RecursionError) as error:  # the second: nesting without end
        raise CheckpointError(f"{path}: is not valid JSON; download the folder again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is not a JSON object; download the folder again")
    return value


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name from the index, None for a single file. Raises where a file is missing."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    partial = sorted(folder.glob("*.incomplete"))
    if partial:
        raise CheckpointError(f"{partial[0]}: a download that did not finish; download the model again")
    if (folder / SINGLE).is_file():
        return None
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder}: {_why_no_weights(folder)}")
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{folder / INDEX}: has no weight_map; download the folder again")
    for file in dict.fromkeys(map(str, index.values())):
        parts = PurePosixPath(file).parts
        if len(parts) != 1 or parts[0] in ("..", "/") or not file.endswith(".safetensors"):
            raise CheckpointError(f"{folder / INDEX}: {file!r} is no safetensors file of this folder")
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder / file}: missing, though {INDEX} lists it; finish the download")
    return {name: str(file) for name, file in index.items()}


def _why_no_weights(folder: Path) -> str:
    if list(folder.glob("*.safetensors")):
        return f"has safetensors files but neither {SINGLE} nor {INDEX}; finish the download"
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt*")):
        return "has pickled weights only, which megatune does not open; save the model as safetensors"
    return f"holds no weights ({SINGLE} or {INDEX})"
