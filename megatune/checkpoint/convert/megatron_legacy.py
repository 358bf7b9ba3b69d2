"""Megatron-LM's legacy checkpoints (`mp_rank_*`, `--ckpt-format torch`), read at any layout.

Every rank's file is opened for its names and places; tensors are put together of the ranks' parts row by row, when they
are asked for.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatune.checkpoint.convert.base import SLOTS, Format, Line, Opened, Options
from megatune.checkpoint.convert.megatron_config import hf_config, like_config
from megatune.checkpoint.convert.megatron_legacy_files import (
    OPTIMIZER_FILE,
    TOKENIZER,
    Chunk,
    RankFile,
    Ranks,
    find_step,
    is_legacy,
)
from megatune.checkpoint.convert.megatron_legacy_optimizer import States, Unproven, advice, states_of
from megatune.checkpoint.convert.megatron_legacy_parts import (
    Parts,
    Place,
    StateParts,
    are_equal,
    joined,
    of_group,
)
from megatune.checkpoint.convert.megatron_legacy_write import LegacyTarget
from megatune.checkpoint.convert.megatron_names import (
    EMBEDDING,
    HEAD,
    FromMegatron,
    MegatronTable,
    MegatronTensor,
)
from megatune.checkpoint.convert.megatron_states import with_states
from megatune.checkpoint.convert.pickles import LazyTensor
from megatune.errors import CheckpointError
from megatune.models.registry import family_for

# Tensors of files that are no weights of the model.
_IGNORED = re.compile(r"(.*\.)?rotary_pos_emb\.inv_freq|.*\.mlp\.router\.local_tokens_per_expert")
_MTP = "mtp."
_GROUPED = re.compile(r"mlp\.experts\.linear_fc([12])\.weight")


def open_legacy(path: Path, options: Options) -> Opened:
    """A legacy checkpoint, or the newest (or `options.step`) of a run's folder."""
    folder, step = find_step(path, options.step)
    ranks = Ranks(folder)
    rows = sum(_embedding(ranks.at(tensor, 0)).shape[0] for tensor in range(ranks.sizes.tensor))
    config, report = hf_config(ranks.args, like_config(options), rows, str(folder))
    family = family_for(config)
    table = MegatronTable(family.spec(config))
    _check_norms(table, ranks, folder)
    whole = _Whole(table, ranks)
    optimizer = {}
    if options.optimizer and _has_optimizer(ranks):
        try:
            optimizer = {slot: FromMegatron(table, states) for slot, states in whole.optimizer().items()}
        except Unproven as error:
            report.append(Line("optimizer", "skipped", advice(str(error))))
    report += whole.report
    if rows > table.spec.vocab_size:
        detail = f"the last {rows - table.spec.vocab_size} of {rows} rows pad the vocabulary"
        padded = [tensor for tensor in table.tensors.values() if tensor.vocab]
        report += [Line(tensor.pieces[0].hf_name, "trimmed", detail) for tensor in padded]
    return Opened(
        kind="megatron",
        path=folder,
        hf_config=config,
        weights=FromMegatron(table, whole),
        optimizer=optimizer,
        step=step,
        extras=_extras(folder, options),
        report=report,
    )


def _has_optimizer(ranks: Ranks) -> bool:
    """Whether any of the files has optimizer states; the distributed optimizer's stand beside them."""
    files = ranks.opened()
    return any("optimizer" in file.content or (file.path.parent / OPTIMIZER_FILE).is_file() for file in files)


def _extras(folder: Path, options: Options) -> Path | None:
    if options.like is None:
        ours = folder.parent / TOKENIZER
        return ours if ours.is_dir() else None
    like = Path(options.like)
    return like.parent if like.is_file() else like


def _embedding(file: RankFile) -> LazyTensor:
    found = file.chunks[0].tensors.get(EMBEDDING)
    if found is None or len(found.shape) != 2:
        raise CheckpointError(f"{file.path}: has no {EMBEDDING}; is it a GPT checkpoint of Megatron?")
    return found


def _check_norms(table: MegatronTable, ranks: Ranks, folder: Path) -> None:
    """Norms as 1 + w or as w: the arguments and the family must mean the same."""
    around_zero = ranks.args.get("apply_layernorm_1p")
    if around_zero is not None and bool(around_zero) != (table.spec.norm_offset == 1.0):
        raise CheckpointError(
            f"{folder}: args.apply_layernorm_1p is {bool(around_zero)}, but norms of {table.family.name} models are "
            "stored the other way; give the folder of the right model with --like"
        )


class _Whole:
    """The whole Megatron model, out of the ranks' files: a `TensorSource` with the names of `MegatronTensor.name`."""

    def __init__(self, table: MegatronTable, ranks: Ranks) -> None:
        self.report: list[Line] = []
        self._table, self._ranks = table, ranks
        self._chunks = self._layers()
        self._used: dict[int, set[tuple[int, str]]] = {}  # by stage: (chunk, name)
        self._places: dict[str, list[Place]] = {}
        self._parts = {name: self._find(tensor) for name, tensor in table.tensors.items()}
        self._rest()

    def __str__(self) -> str:
        return str(self._ranks.folder)

    def names(self) -> set[str]:
        return set(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._table.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._parts[name].parts[0].dtype

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._parts[name].rows(start, stop)

    def _layers(self) -> list[tuple[int, int, int]]:
        """(pipeline rank, chunk, layer in it) of each layer of the model: a model runs through the first chunks of all
        stages, then through the second ones, and so on. How many layers each has, the files say themselves."""
        sizes, places = self._ranks.sizes, []
        for chunk in range(sizes.virtual):
            for stage in range(sizes.pipeline):
                file = self._ranks.at(0, stage)
                if len(file.chunks) != sizes.virtual:
                    raise CheckpointError(
                        f"{file.path}: has {len(file.chunks)} virtual stages where other files have {sizes.virtual}; "
                        "files of two checkpoints are mixed here"
                    )
                places += [(stage, chunk, layer) for layer in range(file.chunks[chunk].layers)]
        wanted = self._table.spec.num_layers
        if len(places) != wanted:
            raise CheckpointError(
                f"{self}: holds {len(places)} layers but the config has {wanted}; they do not belong together"
            )
        return places

    def _find(self, tensor: MegatronTensor) -> Parts:
        stage, chunk, layer = self._place(tensor)
        found = []
        if tensor.expert is None:
            for rank in range(self._ranks.sizes.tensor):
                file = self._ranks.at(rank, stage)
                found.append(self._take(file, chunk, tensor, layer, None))
        else:
            per_rank, left = divmod(self._table.spec.moe.num_experts, self._ranks.sizes.expert)
            if left:
                raise CheckpointError(
                    f"{self}: {self._table.spec.moe.num_experts} experts cannot be spread over expert parallel size "
                    f"{self._ranks.sizes.expert}; the config does not belong to the checkpoint"
                )
            owner, local = divmod(tensor.expert, per_rank)
            for rank in range(self._ranks.sizes.expert_tensor):
                file = self._ranks.of_experts(owner, rank, stage)
                found.append(self._take(file, chunk, tensor, layer, local))
        parts = joined(tensor, [(place.file, place.tensor()) for place in found])
        self._places[tensor.name] = found[: len(parts.parts)]
        if len(parts.parts) < len(found) and not are_equal([place.tensor() for place in found]):
            detail = (
                f"{found[0].file.path.parent.name}'s, though other tensor parallel ranks have other values"
            )
            self.report.append(Line(tensor.name, "mapped", detail))
        return parts

    def _place(self, tensor: MegatronTensor) -> tuple[int, int, int | None]:
        sizes = self._ranks.sizes
        if tensor.layer is not None:
            return self._chunks[tensor.layer]
        first = tensor.within == EMBEDDING
        return (0, 0, None) if first else (sizes.pipeline - 1, sizes.virtual - 1, None)

    def _take(
        self, file: RankFile, chunk: int, tensor: MegatronTensor, layer: int | None, expert: int | None
    ) -> Place:
        """The tensor's part in one file, by any of the names that Megatron has had for it."""
        tensors = file.chunks[chunk].tensors
        for key in (tensor.key(layer, expert, "te"), tensor.key(layer, expert, "local")):
            if key in tensors:
                self._used.setdefault(file.stage, set()).add((chunk, key))
                return Place(file, chunk, key)
        grouped = _GROUPED.fullmatch(tensor.within) if expert is not None else None
        if grouped:
            key = f"decoder.layers.{layer}.mlp.experts.weight{grouped[1]}"
            if key in tensors:
                self._used.setdefault(file.stage, set()).add((chunk, key))
                ranks = self._ranks.sizes.expert_tensor
                view = partial(
                    of_group, tensor=tensor, expert=expert, number=int(grouped[1]), file=file, ranks=ranks
                )
                return Place(file, chunk, key, view)
        raise CheckpointError(
            f"{file.path}: has no {tensor.key(layer, expert)} ({tensor.name} of the whole model); is the file whole, "
            "and does the config belong to it?"
        )

    def optimizer(self) -> dict[str, StateParts]:
        """Slot -> states of what is trained; `Unproven` where they do not tell which weight they belong to."""
        files = self._ranks.opened()
        states: dict[Path, States] = {}
        for file in files:
            siblings = [one for one in files if (one.tensor, one.stage) == (file.tensor, file.stage)]
            try:
                states[file.path] = states_of(file, siblings)
            except Unproven as error:
                raise Unproven(f"{file.path.parent.name}: {error}") from error
        trained = {
            name: places for name, places in self._places.items() if not self._table.tensors[name].fp32
        }
        own = [one for places in trained.values() for one in places]
        if any(states[one.file.path][one.chunk, one.key]["master"] is one.stored for one in own):
            detail = "by order and shape alone where weights are in fp32: no masters beside them prove it"
            self.report.append(Line("optimizer", "mapped", detail))
        return {
            slot: StateParts(
                {
                    name: replace(
                        self._parts[name],
                        parts=tuple(
                            one.view(states[one.file.path][one.chunk, one.key][slot]) for one in places
                        ),
                    )
                    for name, places in trained.items()
                },
                self,
            )
            for slot in SLOTS
        }

    def _rest(self) -> None:
        """Nothing of the files may be left over unnamed."""
        seen: set[str] = set()
        for file in self._ranks.opened():
            used = self._used.get(file.stage, set())
            for number, chunk in enumerate(file.chunks):
                for name in chunk.tensors.keys() - {key for place, key in used if place == number}:
                    self._left_over(file, chunk, name, seen)
        states = sum(chunk.states for file in self._ranks.opened() for chunk in file.chunks)
        if states:
            detail = f"{states} settings of Transformer Engine's fp8, which are no weights"
            self.report.append(Line("_extra_state", "skipped", detail))

    def _left_over(self, file: RankFile, chunk: Chunk, name: str, seen: set[str]) -> None:
        spec = self._table.spec
        if spec.tied_embeddings and name == HEAD:
            self._check_copy(file, chunk.tensors[HEAD])
            line = Line("lm_head.weight", "tied", f"the copy of {EMBEDDING} on the last stage")
        elif name == EMBEDDING:
            return  # copies for multi-token prediction or, on the last stage, for a tied head
        elif _IGNORED.fullmatch(name):
            line = Line(name, "skipped", "a buffer that Megatron computes")
        elif name.startswith(_MTP):
            line = Line(name, "skipped", "multi-token prediction, which the Hugging Face model has not")
        else:
            raise CheckpointError(
                f"{file.path}: {name} has no counterpart in a {self._table.family.name} model; converting without it "
                "would change the model: give the folder of the right one with --like"
            )
        if line.tensor not in seen:
            seen.add(line.tensor)
            self.report.append(line)

    def _check_copy(self, file: RankFile, head: LazyTensor) -> None:
        """The last stage's copy of a tied embedding must be one; compared by samples of its rows."""
        embedding = self._parts[EMBEDDING].parts[file.tensor]
        if head.shape != embedding.shape or not are_equal([embedding, head]):
            raise CheckpointError(
                f"{file.path}: {HEAD} is not the embedding, though the model's are tied; if they are not, say so with "
                "the right model's folder (--like)"
            )


def _target(opened: Opened, options: Options) -> LegacyTarget:
    return LegacyTarget(opened, options)


FORMAT = Format(
    name="megatron",
    title="Megatron-LM, legacy (mp_rank_*)",
    detect=is_legacy,
    open=open_legacy,
    target=_target,
    takes=with_states,
)
