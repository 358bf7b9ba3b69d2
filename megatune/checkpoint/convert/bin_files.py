"""Old Hugging Face weights, `pytorch_model.bin` and its shards: read without running anything that is in them."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from megatune.checkpoint.convert.pickles import LazyTensor, open_pickle
from megatune.checkpoint.sources import read_json
from megatune.errors import CheckpointError

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"


class BinFolder:
    """A `TensorSource`: the tensors of a folder's `.bin` files. CheckpointError where they are not all there, or hold
    anything but tensors by name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._where: dict[str, LazyTensor] = {}
        files = _files(folder)
        for file in dict.fromkeys(files.values()) if files else (SINGLE,):
            for name, tensor in _tensors(folder / file).items():
                if files and files.get(name) != file:
                    raise CheckpointError(f"{folder / file}: holds {name}, which {INDEX} does not list there")
                self._where[name] = tensor
        if missing := sorted(files.keys() - self._where.keys()):
            raise CheckpointError(
                f"{folder / files[missing[0]]}: has no tensor {missing[0]}, though {INDEX} says so"
            )

    @staticmethod
    def is_one(folder: Path) -> bool:
        return (folder / SINGLE).is_file() or (folder / INDEX).is_file()

    def __str__(self) -> str:
        return str(self._folder)

    def names(self) -> set[str]:
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._where[name].dtype

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._where[name].rows(start, stop)


def _files(folder: Path) -> dict[str, str]:
    """Tensor name -> file name from the index; empty where there is one file."""
    if (folder / SINGLE).is_file():
        return {}
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{folder / INDEX}: has no weight_map; download the folder again")
    for file in dict.fromkeys(map(str, index.values())):
        if len(PurePosixPath(file).parts) != 1 or file in ("..", "/") or not file.endswith(".bin"):
            raise CheckpointError(f"{folder / INDEX}: {file!r} is no .bin file of this folder")
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder / file}: missing, though {INDEX} lists it; finish the download")
    return {str(name): str(file) for name, file in index.items()}


def _tensors(path: Path) -> dict[str, LazyTensor]:
    state = open_pickle(path)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds no tensors by name; is it a file of weights?")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, LazyTensor):
            raise CheckpointError(f"{path}: {name!r} is no tensor; is it a file of weights?")
    return dict(state)
