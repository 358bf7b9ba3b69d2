"""Optimizer states of legacy Megatron checkpoints: which state belongs to which weight.

The files number states instead of naming them: Adam's own state dict by groups of parameters, the distributed optimizer
as flat buffers. Both follow the order of the model's parameters, which is that of its state dict, by rules that changed
between versions. So every rule is tried, and what holds is what the fp32 masters prove: rounded to the weight's dtype,
each must be the weight. Sources: megatron/core/optimizer/{__init__,optimizer,distrib_optimizer}.py and
megatron/core/distributed/{distributed_data_parallel,param_and_grad_buffer}.py (0.16.1).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from megatune.checkpoint.convert.base import SLOTS
from megatune.checkpoint.convert.megatron_legacy_files import OPTIMIZER_FILE, RankFile
from megatune.checkpoint.convert.megatron_legacy_parts import StoredTensor, samples
from megatune.checkpoint.convert.megatron_names import EMBEDDING, HEAD
from megatune.checkpoint.convert.pickles import LazyTensor, open_pickle

States = Mapping[tuple[int, str], Mapping[str, LazyTensor]]  # by (chunk, name): slot -> state

_MOMENTS = SLOTS[1:]
_BUFFER = re.compile(r"(.*\.)?(rotary_pos_emb\.inv_freq|local_tokens_per_expert|expert_bias)")
ALIGNMENT = 64  # elements: where parameters begin in a bucket
_ADVICE = "to keep the states, save as torch_dist with --dist-ckpt-optim-fully-reshardable"


class Unproven(Exception):
    """Why states are not converted; for the report."""


@dataclass(frozen=True, eq=False)
class _Parameter:
    chunk: int
    key: str
    weight: LazyTensor

    @property
    def place(self) -> tuple[int, str]:
        return self.chunk, self.key

    @property
    def is_expert(self) -> bool:
        return ".mlp.experts." in self.key

    @property
    def is_half(self) -> bool:
        """Whether the mixed-precision optimizer keeps an fp32 copy of it."""
        return self.weight.dtype in (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class _Group:
    """One group of parameters as saved: Adam's state of each, masters of those of 16 bits."""

    states: list[Mapping[str, Any]]
    masters: list[LazyTensor]


def states_of(file: RankFile, siblings: Sequence[RankFile]) -> States:
    """States of each weight in one rank's file: `master` (not of weights in fp32, unless a distributed optimizer keeps
    them), `exp_avg`, `exp_avg_sq`. `siblings`: files with the same dense weights; of a mixture of experts, one of them
    has the dense states. Unproven where there are none, or they cannot be told apart."""
    parameters = [
        _Parameter(number, key, tensor)
        for number, chunk in enumerate(file.chunks)
        for key, tensor in chunk.tensors.items()
        if not _BUFFER.fullmatch(key)
    ]
    if (file.path.parent / OPTIMIZER_FILE).is_file():
        return _of_buffers(parameters, _chain(file, siblings), file)
    if "optimizer" not in file.content:
        raise Unproven("is without optimizer states, though other files have some")
    return _of_groups(parameters, _groups(file.content["optimizer"]))


# ---- Adam's own state dict


def _groups(content: Any) -> list[_Group]:
    """Groups of parameters in the file's order; of chained optimizers one after the other."""
    found = []
    for one in content if isinstance(content, list) else [content]:
        if not isinstance(one, Mapping):
            raise Unproven(f"its optimizer state is a {type(one).__name__}")
        inner = one.get("optimizer", one.get("optimizer_state_dict", one))
        masters = one.get("fp32_from_fp16_params", one.get("fp32_from_fp16", []))
        try:
            states, groups = inner["state"], inner["param_groups"]
            masters = list(masters) or [[] for _ in groups]
            for group, copies in zip(groups, masters, strict=True):
                found.append(_Group([states[number] for number in group["params"]], list(copies)))
        except (KeyError, TypeError, ValueError) as error:
            raise Unproven(
                "has no state for each parameter: it was saved before the first step, or not by Adam"
            ) from error
    found = [group for group in found if group.states]
    for group in found:
        tensors = [state.get(slot) for state in group.states for slot in _MOMENTS] + group.masters
        if not all(isinstance(tensor, LazyTensor) for tensor in tensors):
            raise Unproven("holds other states than Adam's exp_avg and exp_avg_sq")
    return found


def _of_groups(parameters: list[_Parameter], groups: list[_Group]) -> States:
    wrong = f"its {sum(len(group.states) for group in groups)} states are not those of its {len(parameters)} weights"
    for rule in _rules():
        parts: dict[Any, list[_Parameter]] = {}
        for parameter in parameters:
            parts.setdefault(rule(parameter), []).append(parameter)
        if len(parts) != len(groups):
            continue
        shaped = [[part for part in parts.values() if _has_shapes(group, part)] for group in groups]
        if not all(shaped):
            continue
        fits = []
        for group, candidates in zip(groups, shaped, strict=True):
            unequal = [(part, _unlike(group, part)) for part in candidates]
            fits.append([part for part, key in unequal if key is None])
            wrong = next(
                (f"the fp32 master in the place of {key} is not that weight" for _, key in unequal if key),
                wrong,
            )
        if any(len(part) > 1 for part in fits):
            wrong = "it has groups of states that fit several groups of weights"
        if len({id(part[0]) for part in fits if len(part) == 1}) == len(groups):
            return dict(
                pair for group, part in zip(groups, fits, strict=True) for pair in _named(group, part[0])
            )
    raise Unproven(wrong)


def _rules() -> Iterator[Callable[[_Parameter], Any]]:
    """By what weights may have been grouped: weight decay (none for vectors and biases; or all; or also for norms of q
    and k), experts apart (with expert parallelism), embedding and head apart (with a learning rate of their own)."""

    def decays(kind: str, one: _Parameter) -> bool:
        if kind == "all" or (kind == "qk" and one.key.endswith(("q_layernorm.weight", "k_layernorm.weight"))):
            return True
        return len(one.weight.shape) != 1 and not one.key.endswith(".bias")

    for kind, experts, outer in product(("", "qk", "all"), (False, True), (False, True)):
        yield lambda one, kind=kind, experts=experts, outer=outer: (
            decays(kind, one),
            experts and one.is_expert,
            outer and one.key in (EMBEDDING, HEAD),
        )


def _has_shapes(group: _Group, parameters: list[_Parameter]) -> bool:
    if len(group.states) != len(parameters):
        return False
    halves = [one.weight.shape for one in parameters if one.is_half]
    return halves == [master.shape for master in group.masters] and all(
        state[slot].shape == one.weight.shape
        for state, one in zip(group.states, parameters, strict=True)
        for slot in _MOMENTS
    )


def _unlike(group: _Group, parameters: list[_Parameter]) -> str | None:
    """Name of the first weight that is not its master, rounded."""
    halves = [one for one in parameters if one.is_half]
    pairs = zip(halves, group.masters, strict=True)
    return next((one.key for one, master in pairs if not rounds_to(master, one.weight)), None)


def _named(
    group: _Group, parameters: list[_Parameter]
) -> Iterator[tuple[tuple[int, str], dict[str, LazyTensor]]]:
    masters = iter(group.masters)
    for state, one in zip(group.states, parameters, strict=True):
        found = {slot: state[slot] for slot in _MOMENTS}
        yield one.place, found | {"master": next(masters) if one.is_half else one.weight}


# ---- the distributed optimizer's buffers


def _chain(file: RankFile, siblings: Sequence[RankFile]) -> list[dict[str, LazyTensor]]:
    """All buffers in order: of each of the chained optimizers, its chunks, their dtypes."""

    def content(one: RankFile) -> list[Any]:
        path = one.path.parent / OPTIMIZER_FILE
        found = open_pickle(path) if path.is_file() else []
        return found if isinstance(found, list) else [found]

    chained = content(file)
    if None in chained:  # is in the file of another data parallel rank
        others = [content(one) for one in siblings if one is not file]
        for number, one in enumerate(chained):
            there = [other[number] for other in others if number < len(other) and other[number] is not None]
            if one is None and not there:
                raise Unproven(f"its {OPTIMIZER_FILE} lacks the states of the weights that are no experts")
            chained[number] = there[0] if one is None else one
    found = []
    for one in chained:
        if not isinstance(one, Mapping):
            raise Unproven(f"its {OPTIMIZER_FILE} holds no states but a {type(one).__name__}")
        for number in sorted(key for key in one if type(key) is int):
            found += [_buffer(buffer) for buffer in one[number].values()]
    return found


def _buffer(content: Any) -> dict[str, LazyTensor]:
    """The three flat tensors of one buffer, by slot."""
    slots = dict(zip(SLOTS, ("param", *_MOMENTS), strict=True))
    found = {slot: content.get(key) for slot, key in slots.items()} if isinstance(content, Mapping) else {}
    if not found or not all(isinstance(one, LazyTensor) and len(one.shape) == 1 for one in found.values()):
        raise Unproven(f"its {OPTIMIZER_FILE} is older than February 2024, with buckets of another order")
    if len({one.shape for one in found.values()}) > 1:
        raise Unproven(f"its {OPTIMIZER_FILE} has buffers of unequal lengths")
    return found


def _of_buffers(parameters: list[_Parameter], buffers: list[dict[str, LazyTensor]], file: RankFile) -> States:
    wrong = Unproven(f"its {len(buffers)} buffers are not those of its weights")
    for apart in (False, True):
        runs: dict[Any, list[_Parameter]] = {}
        ordered = sorted(parameters, key=lambda one: (apart and one.is_expert, one.chunk))
        for one in ordered:
            runs.setdefault((apart and one.is_expert, one.chunk, one.weight.dtype), []).append(one)
        if len(runs) != len(buffers):
            continue
        try:
            return {
                one.place: {slot: _slice(flat, one, offset) for slot, flat in buffer.items()}
                for run, buffer in zip(runs.values(), buffers, strict=True)
                for one, offset in _laid_out(run, buffer["master"])
            }
        except Unproven as error:
            wrong = error
    raise wrong


def _laid_out(run: list[_Parameter], masters: LazyTensor) -> list[tuple[_Parameter, int]]:
    """Each weight's first element in a buffer. They stand in reverse order, each at a multiple of 64 elements from the
    beginning of its bucket; where buckets end is not in the file, so that both places are tried."""
    length, order = masters.numel, run[::-1]
    # (end of the last weight, beginning of its bucket modulo 64) -> offsets, the last one first, as a linked list
    ways: dict[tuple[int, int], tuple[int, Any] | None] = {(0, 0): None}
    for one in order:
        found: dict[tuple[int, int], tuple[int, Any]] = {}
        for (end, base), way in ways.items():
            for start, bucket in ((end + (base - end) % ALIGNMENT, base), (end, end % ALIGNMENT)):
                key = (start + one.weight.numel, bucket)
                if key[0] > length or not rounds_to(_slice(masters, one, start), one.weight):
                    continue
                if key in found and _listed(found[key]) != [start, *_listed(way)]:
                    raise Unproven(f"weights as equal as {one.key} do not tell where its state begins")
                found.setdefault(key, (start, way))
        if not found:
            raise Unproven(f"the fp32 master in the place of {one.key} is not that weight")
        ways = found
    whole = {tuple(_listed(way)) for (end, _), way in ways.items() if end == length}
    if len(whole) != 1:
        raise Unproven(f"its weights do not fill a buffer of {length} elements in one way")
    return list(zip(order, reversed(whole.pop()), strict=True))


def _listed(way: tuple[int, Any] | None) -> list[int]:
    offsets = []
    while way is not None:
        offset, way = way
        offsets.append(offset)
    return offsets


def _slice(flat: LazyTensor, one: _Parameter, start: int) -> LazyTensor:
    strides, step = [], 1
    for size in reversed(one.weight.shape):
        strides.append(step)
        step *= size
    return replace(flat, shape=one.weight.shape, stride=tuple(strides[::-1]), offset=flat.offset + start)


def rounds_to(
    master: StoredTensor, weight: StoredTensor, runs: Sequence[tuple[int, int]] | None = None
) -> bool:
    """Whether rounding gives the weight; by `runs` of rows, by default samples of a large one."""
    runs = samples(weight) if runs is None else runs
    return all(torch.equal(master.rows(*run).to(weight.dtype), weight.rows(*run)) for run in runs)


def advice(reason: str) -> str:
    """The report's words on states that stay behind."""
    return f"{reason}; {_ADVICE}"
