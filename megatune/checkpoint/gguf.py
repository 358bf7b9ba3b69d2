"""A GGUF file (llama.cpp's format) as a Hugging Face folder: dequantised to fp32, converted once into the cache."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from megatune.checkpoint.gguf_config import ROPE_TENSORS, Architecture, Metadata, architecture_of, hf_config
from megatune.checkpoint.gguf_header import check_header
from megatune.checkpoint.safetensors_file import SafetensorsWriter
from megatune.checkpoint.sources import SINGLE
from megatune.errors import CheckpointError
from megatune.models.registry import family_for


def convert_gguf(path: Path, folder: Path) -> None:
    """Write `path` as a Hugging Face folder: config, fp32 safetensors, tokenizer, chat template, generation config.

    One tensor is in memory at a time. CheckpointError for a damaged file, an architecture or a tensor type that is not
    supported, or a tokenizer that transformers cannot rebuild.
    """
    source = GgufTensors(path)
    entries = [(name, torch.float32, source.shape(name)) for name in source.in_order]
    with SafetensorsWriter(folder / SINGLE, entries) as writer:
        for name, _, shape in entries:
            writer.write(name, source.rows(name, 0, shape[0]))
    _write_json(folder / "config.json", source.config)
    write_extras(source, folder)


def write_extras(source: GgufTensors, folder: Path) -> None:
    """Write what a model folder has beside weights and config: tokenizer, chat template, generation config."""
    config = source.config
    tokens = {key: value for key, value in config.items() if key.endswith("_token_id") and value is not None}
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **tokens})
    _write_tokenizer(source.path, folder, config["max_position_embeddings"])


class GgufTensors:
    """The tensors of a GGUF file by Hugging Face names: a `TensorSource`, dequantised to fp32 as they are read.
    `config`: as config.json. CheckpointError for a file that is damaged, not supported or not whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        reader = _open(path)
        self._meta = _metadata(reader, path)
        self._architecture, self.config = architecture_of(self._meta), hf_config(self._meta)
        self._where = _by_hf_name(reader, self._meta, self._architecture, self.config)
        self.in_order = list(self._where)

    def __str__(self) -> str:
        return str(self.path)

    def names(self) -> set[str]:
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._meta.tensors[self._where[name].name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        place, shape, architecture = self._where[name], self.shape(name), self._architecture
        unit = shape[0] // heads if (heads := self._permuted_heads(name)) else 1
        first, last = start // unit * unit, -(-stop // unit) * unit
        row = place.bytes // shape[0]
        data = np.fromfile(self.path, np.uint8, (last - first) * row, offset=place.offset + first * row)
        if data.size != (last - first) * row:
            raise CheckpointError(f"{self.path}: truncated in tensor {place.name}; download it again")
        values = _values(data.reshape(last - first, row), place.type, place.name, self.path)
        values = values.reshape(last - first, *shape[1:])
        if unit > 1:
            values = unpermute(values, (last - first) // unit)
        elif architecture.norm_offset and name.endswith("norm.weight"):
            values = values - np.float32(1)
        return torch.from_numpy(np.ascontiguousarray(values[start - first : stop - first]))

    def _permuted_heads(self, name: str) -> int:
        """Heads of a tensor whose rows llama.cpp stores in another order; 0 for the others."""
        if not self._architecture.permuted:
            return 0
        if ".self_attn.q_proj." in name:
            return self.config["num_attention_heads"]
        return self.config["num_key_value_heads"] if ".self_attn.k_proj." in name else 0


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in the file."""

    name: str
    type: gguf.GGMLQuantizationType
    offset: int
    bytes: int


def _open(path: Path) -> gguf.GGUFReader:
    check_header(path)
    try:
        return gguf.GGUFReader(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, IndexError, KeyError) as error:
        raise CheckpointError(
            f"{path}: not a GGUF file, or truncated ({error}); download it again"
        ) from error


def _metadata(reader: gguf.GGUFReader, path: Path) -> Metadata:
    scalars = {
        name: value.contents()
        for name, value in reader.fields.items()
        if value.types and value.types[0] != gguf.GGUFValueType.ARRAY
    }
    shapes = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors}
    meta = Metadata(scalars, shapes, str(path))
    if (parts := meta("split.count", 1)) > 1:
        raise CheckpointError(f"{path}: is one of {parts} parts; join them first (llama-gguf-split --merge)")
    if "token_embd.weight" not in shapes:
        raise CheckpointError(
            f"{path}: has no tensor token_embd.weight; is it a language model, and in one file?"
        )
    meta.ropes = {t.name: _dequantize(t, path) for t in reader.tensors if t.name in ROPE_TENSORS}
    return meta


def _by_hf_name(
    reader: gguf.GGUFReader, meta: Metadata, architecture: Architecture, config: dict[str, Any]
) -> dict[str, _Place]:
    tensors = {}
    for tensor in reader.tensors:
        name = architecture.hf_name(tensor.name)
        if name is not None:
            tensors[name] = _Place(
                tensor.name, tensor.tensor_type, int(tensor.data_offset), int(tensor.n_bytes)
            )
        elif tensor.name not in ROPE_TENSORS:
            raise CheckpointError(
                f"{meta.where}: tensor {tensor.name} is not known for architecture {meta.architecture}; use the "
                "model's safetensors"
            )
    family = family_for(config)
    wanted = {piece.hf_name for pieces in family.name_map(family.spec(config)).values() for piece in pieces}
    if missing := sorted(wanted - tensors.keys()):
        raise CheckpointError(
            f"{meta.where}: {len(missing)} tensors are missing, the first is {missing[0]}; is it complete?"
        )
    return tensors


def _dequantize(tensor: gguf.ReaderTensor, path: Path) -> np.ndarray:
    """A tensor's values in fp32, of its own shape."""
    values = _values(tensor.data, tensor.tensor_type, tensor.name, path)
    shape = tuple(int(n) for n in reversed(tensor.shape))
    # Writable means a copy where it would be a view of the mapped file.
    return np.require(values, np.float32, ["C_CONTIGUOUS", "WRITEABLE"]).reshape(shape)


def _values(data: np.ndarray, kind: gguf.GGMLQuantizationType, name: str, path: Path) -> np.ndarray:
    try:
        return gguf.quants.dequantize(data, kind)
    except NotImplementedError as error:
        raise CheckpointError(
            f"{path}: tensor {name} has type {kind.name}, which cannot be read; use another GGUF"
        ) from error


def unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of the rows of q and k: in each head it stores row i of the first half next to row i of
    the second half (rotary pairs side by side); Hugging Face has the halves one after the other."""
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _write_tokenizer(path: Path, folder: Path, max_length: int) -> None:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).save_pretrained(folder)
    except Exception as error:  # whatever transformers raises means one thing here
        raise CheckpointError(f"{path}: transformers cannot rebuild its tokenizer ({error})") from error
    finally:
        logging.set_verbosity(verbosity)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    for key in ("name_or_path", "is_local", "local_files_only", "backend"):  # of this machine and version
        settings.pop(key, None)
    # The class's name in every version of transformers, and the length that the file states.
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
