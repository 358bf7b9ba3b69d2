"""Megatron-LM's legacy checkpoints (`mp_rank_*`), written at any layout: one file for each model parallel rank."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatune.checkpoint.convert.base import Job, Line, Opened, Options, copy_extras
from megatune.checkpoint.convert.megatron_args import megatron_args, padded_vocab
from megatune.checkpoint.convert.megatron_legacy_files import FILE, RELEASE, TOKENIZER, TRACKER
from megatune.checkpoint.convert.megatron_names import (
    EMBEDDING,
    HEAD,
    Backend,
    MegatronTable,
    MegatronTensor,
    ToMegatron,
)
from megatune.checkpoint.convert.megatron_order import in_order
from megatune.checkpoint.convert.megatron_states import HALVES, UNSAID, Trained, plain_optimizer, scheduler
from megatune.checkpoint.convert.names import Cast
from megatune.checkpoint.convert.torch_zip import Instance, Streamed, torch_file_size, write_torch_file
from megatune.checkpoint.sources import TensorSource
from megatune.errors import ParallelError
from megatune.models.registry import family_for

_VERSION = 3.0
_PORTION_BYTES = 16 << 20


@dataclass(frozen=True)
class _Rank:
    tensor: int
    stage: int
    expert: int


class LegacyTarget:
    """What Megatron-LM loads with `--ckpt-format torch`: a `release` (weights without a step), or with optimizer states
    a step of a run with the plain optimizer (without `--use-distributed-optimizer`).

    `backend`: names of a model with Transformer Engine (Megatron's default) or with Megatron's own layers.
    ParallelError for a layout that does not divide the model.
    """

    def __init__(self, opened: Opened, options: Options, backend: Backend = "te") -> None:
        self.report: list[Line] = []
        self._opened, self._options, self._backend = opened, options, backend
        self._spec = family_for(opened.hf_config).spec(opened.hf_config)
        self._table = MegatronTable(self._spec)
        self._table.check(opened.weights)
        self._ordered = in_order(self._table.tensors.values(), backend)
        self._source = ToMegatron(self._table, opened.weights)
        self._dtype = options.dtype or self._source.dtype(EMBEDDING)
        self._states = {slot: ToMegatron(self._table, one) for slot, one in self._slots().items()}
        self._step = opened.step if self._states else None
        self._folder = RELEASE if self._step is None else f"iter_{self._step:07d}"
        _check(self._table, options)
        self._args, notes = megatron_args(opened.hf_config, self._dtype, options)
        self._rows = padded_vocab(self._spec.vocab_size, options)
        self.report += notes
        if self._rows != self._spec.vocab_size:
            more = self._rows - self._spec.vocab_size
            detail = f"{more} rows of zeros, to a multiple of {options.vocab_multiple} x {options.tensor}"
            self.report += [
                Line(name, "padded", detail) for name in (EMBEDDING, HEAD) if name in self._table.tensors
            ]
        if self._spec.tied_embeddings and options.pipeline > 1:
            self.report.append(Line(HEAD, "tied", "a copy of the embedding, on the last stage"))

    def _slots(self) -> dict[str, TensorSource]:
        """The optimizer's slots. Where the source has no masters, they are the weights."""
        found = dict(self._opened.optimizer)
        if found:
            self.report.append(UNSAID)
        if found and self._dtype in HALVES:
            weights = self._opened.weights
            found.setdefault("master", Cast(weights, dict.fromkeys(weights.names(), torch.float32)))
        return found

    def jobs(self) -> list[Job]:
        return [Job(self._file(rank), self._size(rank)) for rank in self._ranks()]

    def make(self, job: Job, folder: Path) -> None:
        rank = next(rank for rank in self._ranks() if self._file(rank) == job.file)
        path = folder / job.file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_torch_file(path, self._content(rank))

    def _content(self, rank: _Rank) -> dict[str, Any]:
        """What one rank's file holds."""
        virtual, ranks = self._options.virtual, self._options.tensor
        chunks = [list(self._chunk(rank, number)) for number in range(virtual)]
        content: dict[str, Any] = {
            "args": Instance("argparse.Namespace", state=self._args | {"iteration": self._step or 0}),
            "checkpoint_version": _VERSION,
            "iteration": self._step or 0,
            "num_floating_point_operations_so_far": 0,
        }
        for number, chunk in enumerate(chunks):
            content["model" if virtual == 1 else f"model{number}"] = {
                key: self._streamed(tensor, self._source, self._kind(tensor), rank.tensor, ranks)
                for key, tensor in chunk
            }
        if self._step is not None:
            weights = [
                self._trained(key, one, rank) for chunk in chunks for key, one in chunk if not one.fp32
            ]
            apart = self._options.expert > 1 and self._spec.moe is not None
            content["optimizer"] = plain_optimizer(weights, self._step, apart=apart)
            content["opt_param_scheduler"] = scheduler()
        return content

    def _trained(self, key: str, tensor: MegatronTensor, rank: _Rank) -> Trained:
        states = {
            slot: self._streamed(tensor, source, torch.float32, rank.tensor, self._options.tensor)
            for slot, source in self._states.items()
        }
        return Trained(key, len(tensor.shape) == 1, tensor.expert is not None, states)

    def finish(self, folder: Path) -> None:
        text = RELEASE if self._step is None else str(self._step)
        (folder / TRACKER).write_text(text, encoding="utf-8")
        if self._opened.extras is not None or self._opened.write_extras is not None:
            (folder / TOKENIZER).mkdir(exist_ok=True)
            copy_extras(self._opened, folder / TOKENIZER)

    def _ranks(self) -> Iterator[_Rank]:
        for stage in range(self._options.pipeline):
            for tensor in range(self._options.tensor):
                for expert in range(self._options.expert):
                    yield _Rank(tensor, stage, expert)

    def _file(self, rank: _Rank) -> str:
        name = f"mp_rank_{rank.tensor:02d}"
        name += f"_{rank.stage:03d}" if self._options.pipeline > 1 else ""
        name += f"_{rank.expert:03d}" if self._options.expert > 1 else ""
        return f"{self._folder}/{name}/{FILE}"

    def _size(self, rank: _Rank) -> int:
        tensors = list(_tensors(self._content(rank)))
        return torch_file_size(
            sum(math.prod(one.shape) * one.dtype.itemsize for one in tensors), len(tensors)
        )

    def _chunk(self, rank: _Rank, chunk: int) -> Iterator[tuple[str, MegatronTensor]]:
        """The names in the state dict of one chunk of one rank, in the order of the model's modules."""
        options, spec = self._options, self._spec
        share = spec.num_layers // (options.pipeline * options.virtual)
        first = (chunk * options.pipeline + rank.stage) * share
        is_first = rank.stage == 0 and chunk == 0
        is_last = rank.stage == options.pipeline - 1 and chunk == options.virtual - 1
        outside = ([EMBEDDING] if is_first else []) + (
            ["decoder.final_layernorm.weight", HEAD] if is_last else []
        )
        for tensor in self._ordered:
            if tensor.layer is None and tensor.within in outside:
                yield tensor.within, tensor
            elif tensor.layer is not None and first <= tensor.layer < first + share:
                expert = self._local_expert(tensor, rank)
                if tensor.expert is None or expert is not None:
                    yield tensor.key(tensor.layer - first, expert, self._backend), tensor
        if is_last and not is_first and spec.tied_embeddings:
            yield HEAD, self._table.tensors[EMBEDDING]

    def _local_expert(self, tensor: MegatronTensor, rank: _Rank) -> int | None:
        """The expert's number on this rank, None where it is on another one."""
        if tensor.expert is None:
            return None
        owner, local = divmod(tensor.expert, self._spec.moe.num_experts // self._options.expert)
        return local if owner == rank.expert else None

    def _kind(self, tensor: MegatronTensor) -> torch.dtype:
        return self._source.dtype(tensor.name) if tensor.fp32 else self._dtype

    def _streamed(
        self, tensor: MegatronTensor, source: ToMegatron, dtype: torch.dtype, rank: int, ranks: int
    ) -> Streamed:
        """One rank's part of a tensor of `source`."""
        cut = tensor.cut_with(self._backend)
        rows, *rest = (self._rows, *tensor.shape[1:]) if tensor.vocab else tensor.shape
        if cut == 1:
            width = rest[0] // ranks
            columns, runs = (rank * width, width), [(0, rows)]
            shape = (rows, width)
        else:
            columns, runs = None, _runs(tensor, rows, rank, ranks) if cut == 0 else [(0, rows)]
            shape = (sum(count for _, count in runs), *rest)

        def chunks() -> Iterator[Tensor]:
            for first, count in runs:
                for block in _rows_of(tensor, source, first, count, columns):
                    yield block.to(dtype)

        return Streamed(dtype, shape, chunks)


def _rows_of(
    tensor: MegatronTensor, source: ToMegatron, first: int, count: int, columns: tuple[int, int] | None
) -> Iterator[Tensor]:
    """Rows [first, first + count) in portions, zeros beyond the tensor's own."""
    width = math.prod(tensor.shape[1:])
    step = max(1, _PORTION_BYTES // (width * 4))
    last = min(first + count, tensor.shape[0])
    for start in range(first, last, step):
        block = source.rows(tensor.name, start, min(start + step, last))
        yield block if columns is None else block.narrow(1, *columns)
    padding = first + count - max(first, last)
    for start in range(0, padding, step):
        yield torch.zeros((min(step, padding - start), *tensor.shape[1:]))


def _tensors(value: Any) -> Iterator[Streamed]:
    """All that will be written of one file."""
    if isinstance(value, Streamed):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)


def _runs(tensor: MegatronTensor, rows: int, rank: int, ranks: int) -> list[tuple[int, int]]:
    """(first row, rows) of the whole tensor that one rank has, in its order."""
    if not tensor.halves:
        share = rows // ranks
        return [(rank * share, share)]
    half, share = rows // 2, rows // 2 // ranks
    return [(rank * share, share), (half + rank * share, share)]


def _check(table: MegatronTable, options: Options) -> None:
    """ParallelError where the layout does not divide the model."""
    spec = table.spec
    chunks = options.pipeline * options.virtual
    if spec.num_layers % chunks:
        raise ParallelError(
            f"--pipeline {options.pipeline} with --virtual {options.virtual}: {spec.num_layers} layers are no multiple "
            f"of {chunks}; choose numbers whose product divides the layers"
        )
    if options.virtual > 1 and options.pipeline == 1:
        raise ParallelError(
            f"--virtual {options.virtual}: needs --pipeline 2 or more; Megatron refuses it otherwise"
        )
    if options.expert > 1 and (spec.moe is None or spec.moe.num_experts % options.expert):
        count = 0 if spec.moe is None else spec.moe.num_experts
        raise ParallelError(
            f"--expert {options.expert}: does not divide the model's {count} experts; choose another"
        )
    if spec.num_heads % options.tensor:
        raise ParallelError(
            f"--tensor {options.tensor}: does not divide the model's {spec.num_heads} attention heads; choose another"
        )
    for tensor in table.tensors.values():
        cut = tensor.cut
        parts = options.tensor * (2 if tensor.halves else 1)
        if cut is not None and not tensor.vocab and tensor.shape[cut] % parts:
            raise ParallelError(
                f"--tensor {options.tensor}: {tensor.name} has {tensor.shape[cut]} "
                f"{'columns' if cut else 'rows'}, which it does not divide; choose another"
            )
