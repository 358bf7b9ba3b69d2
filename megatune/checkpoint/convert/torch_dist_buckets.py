"""Optimizer states of `torch_dist` checkpoints in the form `dp_reshardable`, the default of Megatron-LM's distributed
optimizer: flat buckets of each model parallel rank, in which weights follow one another without a name.

Nothing in the folder says how many tensor and pipeline stages there were, which layers each had and in which order
modules stand. So all layouts are tried that fill the buckets exactly, and what holds is what the fp32 masters in the
buckets prove: rounded to the weight's dtype, each must be the weight. Keys:
`[chained_<n>.]optimizer.distributed.dp_group_idx_<rank>.gbuf_idx_<chunk>.dtype_(<weights>, <gradients>).bucket_idx_<n>.
<param|exp_avg|exp_avg_sq>`; a rank is tensor + T * pipeline, of experts (an optimizer of their own, the last of the
chain, where they are spread) tensor + T * (expert + E * pipeline). Sources: megatron/core/optimizer/
{__init__,distrib_optimizer}.py, megatron/core/distributed/param_and_grad_buffer.py (0.16.1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import torch
from torch import Tensor

from megatune.checkpoint.convert.base import SLOTS
from megatune.checkpoint.convert.dcp_files import DcpFolder
from megatune.checkpoint.convert.megatron_legacy_optimizer import ALIGNMENT, Unproven, rounds_to
from megatune.checkpoint.convert.megatron_legacy_parts import Parts, StateParts, samples
from megatune.checkpoint.convert.megatron_names import EMBEDDING, HEAD, Backend, MegatronTable, MegatronTensor
from megatune.checkpoint.convert.megatron_order import in_order
from megatune.checkpoint.convert.torch_dist_keys import StoredMegatron
from megatune.checkpoint.sources import TensorSource

_KEY = re.compile(
    r"((?:chained_(\d{1,4})\.)?optimizer\.distributed\.dp_group_idx_(\d{1,7})\.gbuf_idx_(\d{1,4})"
    r"\.dtype_\([\w., ]+\)\.bucket_idx_(\d{1,6}))\.(param|exp_avg|exp_avg_sq)"
)
_COMPARED_ROWS = 16  # of a large weight: mixtures have tens of thousands of them
_NAMES = dict(zip(SLOTS, ("param", *SLOTS[1:]), strict=True))


def bucket_keys(stored: DcpFolder) -> set[str]:
    """The folder's tensors that are buckets of states."""
    return {name for name in stored.names() if _KEY.fullmatch(name)}


@dataclass(frozen=True)
class _Buffer:
    """The buckets of one chunk of the model on one rank: their keys without the slot, their elements."""

    keys: tuple[str, ...]
    lengths: tuple[int, ...]


_Ranks = list[list[_Buffer]]  # by rank: its chunks' buffers


@dataclass(frozen=True)
class _Layout:
    """One way in which the states may have been laid out; `experts`: tensor and expert parallel size of experts that
    have an optimizer of their own."""

    tensor: int
    pipeline: int
    experts: tuple[int, int] | None
    backend: Backend
    grouped: bool


@dataclass(frozen=True)
class _Spot:
    """Where the states of one rank's part of a weight begin: `offset` elements after the beginning of a bucket."""

    tensor: MegatronTensor
    weight: str
    rank: int
    ranks: int
    cut: int | None
    shape: tuple[int, ...]
    bucket: str
    offset: int


@dataclass(frozen=True, eq=False)
class _State:
    """One slot of the states at a spot: a `StoredTensor`."""

    folder: DcpFolder
    spot: _Spot
    slot: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spot.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.folder.dtype(self._key)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def _key(self) -> str:
        return f"{self.spot.bucket}.{_NAMES[self.slot]}"

    def rows(self, start: int, stop: int) -> Tensor:
        width, at = math.prod(self.shape[1:]), self.spot.offset
        flat = self.folder.rows(self._key, at + start * width, at + stop * width)
        return flat.view(stop - start, *self.shape[1:])


@dataclass(frozen=True, eq=False)
class _Weight:
    """The weight at a spot, as its rank had it: a `StoredTensor`."""

    whole: TensorSource
    spot: _Spot

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spot.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype(self.spot.weight)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        spot = self.spot
        if spot.cut == 1:
            width = spot.shape[1]
            return self.whole.rows(spot.weight, start, stop).narrow(1, spot.rank * width, width)
        if spot.cut is None:
            return self.whole.rows(spot.weight, start, stop)
        halves = 2 if spot.tensor.halves else 1
        share = spot.shape[0] // halves
        found = []
        for half in range(halves):
            low, high = max(start, half * share), min(stop, (half + 1) * share)
            if low < high:
                before = (half * spot.ranks + spot.rank - half) * share  # rows of other ranks
                found.append(self.whole.rows(spot.weight, before + low, before + high))
        return torch.cat(found)


def bucket_states(table: MegatronTable, weights: StoredMegatron, stored: DcpFolder) -> dict[str, StateParts]:
    """Slot -> states of every weight that is trained, empty where the folder has no buckets. Unproven where the masters
    do not tell which weight the states belong to, or tell it in two ways."""
    chains = _chains(stored)
    if not chains:
        return {}
    wrong, most = Unproven("its buckets are not those of the model's weights"), 0
    proven: list[list[_Spot]] = []
    own = [tensor for tensor in table.tensors.values() if not tensor.fp32]
    ordered = cache(lambda backend, grouped: in_order(own, backend, grouped=grouped))
    for layout, dense, experts in _layouts(table, chains):
        try:
            placing = _Placing(table, weights, layout, ordered(layout.backend, layout.grouped))
            spots = placing.spots(dense, experts)
        except Unproven as error:
            wrong = wrong if most else error
            continue
        if spots in proven:
            continue
        right = next((n for n, spot in enumerate(spots) if not _is_master(stored, weights, spot)), None)
        if right is None:
            proven.append(spots)
        elif right >= most:
            most = right + 1
            wrong = Unproven(f"the fp32 master in the place of {spots[right].tensor.name} is not that weight")
    if len(proven) > 1:
        raise Unproven("its weights are so equal that they do not tell their states apart")
    if not proven:
        raise wrong
    return _joined(table, weights, stored, proven[0])


def _is_master(stored: DcpFolder, weights: StoredMegatron, spot: _Spot) -> bool:
    weight = _Weight(weights, spot)
    return rounds_to(_State(stored, spot, "master"), weight, samples(weight, _COMPARED_ROWS))


def _joined(
    table: MegatronTable, weights: StoredMegatron, stored: DcpFolder, spots: list[_Spot]
) -> dict[str, StateParts]:
    """By slot, each weight's states out of its ranks' parts; a copy on another stage is left out."""
    parts: dict[str, list[_Spot]] = {}
    for spot in spots:
        if spot.tensor.name in table.tensors:
            parts.setdefault(spot.tensor.name, []).append(spot)
    found = {}
    for slot in SLOTS:
        by_name = {}
        for name, places in parts.items():
            own = sorted(places, key=lambda spot: spot.rank)
            own = own[:1] if own[0].cut is None else own  # the same on each
            states = tuple(_State(stored, spot, slot) for spot in own)
            by_name[name] = Parts(own[0].tensor, states, own[0].cut or 0)
        found[slot] = StateParts(by_name, weights)
    return found


# ---- what is there


def _chains(stored: DcpFolder) -> list[_Ranks]:
    """The buckets by optimizer of the chain, rank and chunk."""
    found: dict[tuple[int, int, int, int], dict[str, str]] = {}
    for name in stored.names():
        match = _KEY.fullmatch(name)
        if match:
            place = (int(match[2] or 0), int(match[3]), int(match[4]), int(match[5]))
            found.setdefault(place, {})[match[6]] = match[1]
    chains: list[_Ranks] = []
    for place in sorted(found):
        chain, rank, chunk, bucket = place
        if chain == len(chains):
            chains.append([])
        ranks = chains[-1]
        if rank == len(ranks):
            ranks.append([])
        if chunk == len(ranks[-1]):
            ranks[-1].append(_Buffer((), ()))
        own = ranks[-1][-1]
        at = (len(chains) - 1, len(ranks) - 1, len(ranks[-1]) - 1, len(own.keys))
        slots = found[place]
        shapes = {stored.shape(f"{slots['param']}.{slot}") for slot in slots} if "param" in slots else set()
        if at != place or len(slots) != len(SLOTS) or len(shapes) != 1 or len(shape := shapes.pop()) != 1:
            raise Unproven(
                f"its buckets of states are not whole (bucket {bucket} of chunk {chunk}, rank {rank})"
            )
        ranks[-1][-1] = _Buffer((*own.keys, slots["param"]), (*own.lengths, shape[0]))
    return chains


def _layouts(table: MegatronTable, chains: list[_Ranks]) -> Iterator[tuple[_Layout, _Ranks, _Ranks]]:
    """All layouts with as many ranks as there are, with the buffers of dense weights and those of experts."""
    moe = table.spec.moe
    backends: tuple[Backend, ...] = ("te", "local")
    for apart in (True, False) if moe is not None and len(chains) > 1 else (False,):
        dense, experts = (chains[:-1], chains[-1]) if apart else (chains, [])
        if len({len(ranks) for ranks in dense}) != 1:
            continue
        # Several optimizers for dense weights: each has some of the chunks.
        joined = [[buffer for buffers in same for buffer in buffers] for same in zip(*dense, strict=True)]
        for tensor in _divisors(len(joined)):
            pipeline = len(joined) // tensor
            sizes: list[tuple[int, int] | None] = [None]
            if apart:
                each = len(experts) // pipeline
                sizes = (
                    [(one, each // one) for one in _divisors(each)] if each * pipeline == len(experts) else []
                )
            orders = (True, False) if moe is not None else (True,)
            for spread, backend, grouped in product(sizes, backends, orders):
                yield _Layout(tensor, pipeline, spread, backend, grouped), joined, experts


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


# ---- where a layout would have put the weights


class _Placing:
    """One layout of a model. Methods raise `Unproven` where it does not fill the buckets."""

    def __init__(
        self,
        table: MegatronTable,
        weights: StoredMegatron,
        layout: _Layout,
        ordered: Sequence[MegatronTensor],
    ) -> None:
        self._table, self._weights, self._layout = table, weights, layout
        self._apart = layout.experts is not None
        self._layers: list[list[MegatronTensor]] = [[] for _ in range(table.spec.num_layers)]
        self._outside: dict[str, MegatronTensor] = {}
        for tensor in ordered:
            if tensor.layer is None:
                self._outside[tensor.within] = tensor
            else:
                self._layers[tensor.layer].append(tensor)

    def spots(self, dense: _Ranks, experts: _Ranks) -> list[_Spot]:
        """Places of all weights on all ranks, in the order of ranks and chunks."""
        layout, found = self._layout, []
        chunks = len(dense[0])
        runs: list[list[range]] = [[] for _ in range(layout.pipeline)]  # of layers, by stage and chunk
        first = 0
        for chunk, stage in product(range(chunks), range(layout.pipeline)):
            ranks = dense[stage * layout.tensor : (stage + 1) * layout.tensor]
            if any(len(buffers) != chunks for buffers in ranks):
                raise Unproven("its ranks have unequal numbers of buffers")
            last = (chunk, stage) == (chunks - 1, layout.pipeline - 1)
            layers = self._length(first, (chunk, stage) == (0, 0), last, ranks[0][chunk])
            tensors = self._chunk(layers, (chunk, stage) == (0, 0), last)
            for rank, buffers in enumerate(ranks):
                found += self._laid_out(tensors, buffers[chunk], rank, layout.tensor)
            runs[stage].append(layers)
            first = layers.stop
        if first != len(self._layers):
            raise Unproven(f"its buckets hold {first} layers, the model has {len(self._layers)}")
        return found + (self._experts(experts, runs) if self._apart else [])

    def _experts(self, ranks: _Ranks, runs: list[list[range]]) -> list[_Spot]:
        cut, spread = self._layout.experts
        count, left = divmod(self._table.spec.moe.num_experts, spread)
        found = []
        for stage, owner, rank in product(range(self._layout.pipeline), range(spread), range(cut)):
            own = range(owner * count, (owner + 1) * count)
            chunks = [
                [one for layer in run for one in self._layers[layer] if one.expert in own]
                for run in runs[stage]
            ]
            chunks = [tensors for tensors in chunks if tensors]
            buffers = ranks[rank + cut * (owner + spread * stage)]
            if left or len(buffers) != len(chunks):
                raise Unproven("its experts' buffers are not those of the model's layers")
            for tensors, buffer in zip(chunks, buffers, strict=True):
                found += self._laid_out(tensors, buffer, rank, cut)
        return found

    def _length(self, first: int, begins: bool, ends: bool, buffer: _Buffer) -> range:
        """The layers of a chunk: as many from `first` on as fill its buckets on one rank."""
        total = sum(buffer.lengths)
        for stop in range(first, len(self._layers) + 1):
            tensors = self._chunk(range(first, stop), begins, ends)
            least = sum(math.prod(self._part(one, self._layout.tensor)[1]) for one in tensors)
            if least > total:
                break
            if total - least < ALIGNMENT * len(tensors) and self._offsets(
                tensors, buffer, self._layout.tensor
            ):
                return range(first, stop)
        raise Unproven("its buckets are not those of the model's weights in any layout")

    def _chunk(self, layers: range, begins: bool, ends: bool) -> list[MegatronTensor]:
        """Dense weights of a chunk of the model."""
        outside = self._outside
        found = [outside[EMBEDDING]] if begins else []
        for layer in layers:
            found += [one for one in self._layers[layer] if one.expert is None or not self._apart]
        if ends:
            found.append(outside["decoder.final_layernorm.weight"])
            if HEAD in outside:
                found.append(outside[HEAD])
            elif not begins:  # a copy of the tied embedding
                found.append(replace(outside[EMBEDDING], within=HEAD))
        return found

    def _part(self, tensor: MegatronTensor, ranks: int) -> tuple[int | None, tuple[int, ...]]:
        """(the dimension that is cut, the shape of one rank's part)."""
        shape = self._weights.shape(self._weight(tensor))
        cut = tensor.cut_with(self._layout.backend)
        if cut is None or ranks == 1:
            return None, shape
        if shape[cut] % (ranks * (2 if tensor.halves else 1)):
            raise Unproven("its buckets are not those of the model's weights in any layout")
        return cut, (*shape[:cut], shape[cut] // ranks, *shape[cut + 1 :])

    def _weight(self, tensor: MegatronTensor) -> str:
        return tensor.name if tensor.name in self._table.tensors else EMBEDDING

    def _offsets(
        self, tensors: Sequence[MegatronTensor], buffer: _Buffer, ranks: int
    ) -> list[tuple[int, int]] | None:
        """(bucket, first element) of each, the last one first, None where they do not fill the buckets: each begins at
        a multiple of 64, or a new bucket where one is full."""
        bucket, end, found = 0, 0, []
        for tensor in reversed(tensors):
            count = math.prod(self._part(tensor, ranks)[1])
            start = end + -end % ALIGNMENT
            if start + count > buffer.lengths[bucket]:
                if buffer.lengths[bucket] not in (end, start) or bucket + 1 == len(buffer.lengths):
                    return None
                bucket, start = bucket + 1, 0
            found.append((bucket, start))
            end = start + count
        full = bucket + 1 == len(buffer.lengths) and end == buffer.lengths[bucket]
        return found if full else None

    def _laid_out(
        self, tensors: Sequence[MegatronTensor], buffer: _Buffer, rank: int, ranks: int
    ) -> list[_Spot]:
        offsets = self._offsets(tensors, buffer, ranks)
        if offsets is None:
            raise Unproven("its buckets are not those of the model's weights in any layout")
        found = []
        for tensor, (bucket, offset) in zip(reversed(tensors), offsets, strict=True):
            cut, shape = self._part(tensor, ranks)
            weight = self._weight(tensor)
            found.append(_Spot(tensor, weight, rank, ranks, cut, shape, buffer.keys[bucket], offset))
        return found
