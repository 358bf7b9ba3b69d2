"""Writing Megatron-Core's `torch_dist`: without Megatron, in files that are made on their own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatune.checkpoint.convert.base import Job, Line, Opened, Options, copy_extras
from megatune.checkpoint.convert.dcp_files import (
    Blob,
    Part,
    cut,
    plan_files,
    torch_blob,
    write_metadata,
)
from megatune.checkpoint.convert.megatron_args import megatron_args, padded_vocab
from megatune.checkpoint.convert.megatron_names import MegatronTable, MegatronTensor, ToMegatron
from megatune.checkpoint.convert.megatron_states import UNSAID, param_group, scheduler
from megatune.checkpoint.convert.names import Cast, main_dtype
from megatune.checkpoint.convert.torch_dist_keys import extra_states, trained, written_slot
from megatune.checkpoint.convert.torch_zip import Instance, write_torch_file
from megatune.checkpoint.hf import write_json
from megatune.checkpoint.sources import TensorSource
from megatune.errors import CheckpointError
from megatune.models.registry import family_for

LATEST = "latest_checkpointed_iteration.txt"
MARK = "metadata.json"
COMMON = "common.pt"
# Our slots as Megatron's distributed optimizer calls them in the form `fully_reshardable`.
_SLOTS = {"master": "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


class TorchDistTarget:
    """A `torch_dist` checkpoint being written: one step, named after the source's (or `release`), with arguments, and
    config.json and tokenizer beside it."""

    def __init__(self, opened: Opened, options: Options) -> None:
        self.report: list[Line] = []
        self._opened, self._options = opened, options
        self._table = MegatronTable(family_for(opened.hf_config).spec(opened.hf_config))
        self._table.check(opened.weights)
        self._step = opened.step if opened.optimizer else None
        self.folder = "release" if self._step is None else f"iter_{self._step:07d}"
        self._vocab = padded_vocab(self._table.spec.vocab_size, options)
        self._args, lines = megatron_args(opened.hf_config, main_dtype(opened.weights), options)
        self.report += lines
        if opened.optimizer:
            self.report.append(UNSAID)
        self._files = plan_files(self._items())

    def jobs(self) -> list[Job]:
        return [Job(f"{self.folder}/{file.name}", file.size) for file in self._files]

    def make(self, job: Job, folder: Path) -> None:
        (folder / self.folder).mkdir(parents=True, exist_ok=True)
        name = Path(job.file).name
        next(file for file in self._files if file.name == name).write(folder / self.folder)

    def finish(self, folder: Path) -> None:
        """The index, the common state, and last what says that the step is whole."""
        step = folder / self.folder
        write_metadata(step, self._files)
        write_torch_file(step / COMMON, self._common())
        mark = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        _write(step / MARK, json.dumps(mark | {"common_backend": "torch", "common_backend_version": 1}))
        write_json(folder / "config.json", self._opened.hf_config)
        copy_extras(self._opened, folder)
        _write(folder / LATEST, "release" if self._step is None else str(self._step))

    def _items(self) -> Iterator[Part | Blob]:
        weights = ToMegatron(self._table, self._opened.weights)
        yield from self._parts("", weights, weights.names())
        padding = self._vocab - self._table.spec.vocab_size
        for tensor in self._table.tensors.values():
            if tensor.vocab and padding:
                detail = f"{padding} rows of zeros: vocabularies are padded to multiples"
                self.report.append(Line(tensor.pieces[0].hf_name, "padded", detail))
        wanted = trained(self._table)
        for slot, source in sorted(self._states().items()):
            states = ToMegatron(self._table, source)
            missing = sorted(wanted - states.names())
            if missing:
                raise CheckpointError(
                    f"{source}: {slot} is there for some weights only (not for {missing[0]}), which Megatron cannot "
                    "load; convert without optimizer states"
                )
            yield from self._parts(f"optimizer.state.{_SLOTS[slot]}.", states, wanted)
        nothing = torch_blob([None])  # what Megatron's own layers keep there
        yield from (Blob(key, nothing) for key in dict.fromkeys(extra_states(self._table)))

    def _states(self) -> Mapping[str, TensorSource]:
        """The optimizer's slots. Where the source has no master weights, they are the weights."""
        states = self._opened.optimizer
        if not states or "master" in states:
            return states
        weights = self._opened.weights
        return {**states, "master": Cast(weights, dict.fromkeys(weights.names(), torch.float32))}

    def _parts(self, prefix: str, source: TensorSource, names: set[str]) -> Iterator[Part]:
        dtypes: dict[str, torch.dtype] = {}
        for name, tensor in self._table.tensors.items():
            if name not in names:
                continue
            slot, dtype = written_slot(self._table, tensor), source.dtype(name)
            if dtypes.setdefault(slot.key, dtype) != dtype:
                raise CheckpointError(
                    f"{source}: {name} is {dtype}, but in another layer {dtypes[slot.key]}; Megatron stacks the "
                    "layers, so give one with --dtype"
                )
            shape = (self._vocab, *tensor.shape[1:]) if tensor.vocab else tensor.shape
            lead = len(slot.lead)

            def make(start: int, stop: int, tensor: MegatronTensor = tensor, lead: int = lead) -> Tensor:
                rows = _padded(source, tensor, start, stop)
                return rows.view(*(1,) * lead, *rows.shape)

            yield from cut(
                prefix + slot.key,
                dtype,
                (*slot.lead, *(0 for _ in shape)),
                (*(1 for _ in slot.lead), *shape),
                make,
                dim=lead,
            )

    def _common(self) -> dict[str, Any]:
        args = self._args | {"ckpt_format": "torch_dist", "use_dist_ckpt": True, "iteration": self._step or 0}
        common: dict[str, Any] = {
            "args": Instance("argparse.Namespace", (), args),
            "checkpoint_version": 3.0,
            "iteration": self._step or 0,
            "content_metadata": {
                "singleton_local_shards": False,
                "chained_optim_avoid_prefix": True,
                "distrib_optim_sharding_type": "fully_reshardable",
                "distrib_optim_fully_reshardable_mem_efficient": False,
            },
        }
        if self._opened.optimizer:
            chained = self._options.expert > 1 and self._table.spec.moe is not None
            one = optimizer_state(self._step or 0)
            common["opt_param_scheduler"] = scheduler()
            common["optimizer"] = {0: one, 1: optimizer_state(self._step or 0)} if chained else one
        return common


def optimizer_state(step: int) -> dict[str, Any]:
    """What Megatron's distributed optimizer has beside its tensors."""
    groups = [
        param_group(step, decays=decays, expert=expert)
        for expert in (False, True)
        for decays in (True, False)
    ]
    return {"optimizer": {"param_groups": groups}, "param_state_sharding_type": "fully_reshardable"}


def _padded(source: TensorSource, tensor: MegatronTensor, start: int, stop: int) -> Tensor:
    """Rows [start, stop), zeros beyond the tensor's own."""
    own = tensor.shape[0]
    rows = source.rows(tensor.name, min(start, own), min(stop, own))
    more = stop - start - rows.shape[0]
    return torch.cat([rows, rows.new_zeros(more, *rows.shape[1:])]) if more else rows


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
