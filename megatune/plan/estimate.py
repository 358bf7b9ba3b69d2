"""Memory of the dearest process and tokens of one step, from the configuration and the model's shape alone.

Arithmetic, for `--dry-run` and for looking through many layouts; `dry_run` runs the code itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatune import optim
from megatune.config.layout import Layout, check_batch, layout_of
from megatune.config.schema import Config, LoraMethod
from megatune.models import Decoder
from megatune.models.layout import stage_costs
from megatune.models.spec import DecoderSpec
from megatune.ops.cross_entropy import CHUNK_LOGITS_ELSEWHERE
from megatune.ops.quant import BLOCK, NESTED
from megatune.parallel import Cut, ShardSpec, Stage
from megatune.parallel.buckets import BUCKET_ELEMENTS, is_matrix
from megatune.parallel.pipeline import held, stages_of
from megatune.parallel.pipeline.partition import virtual_of
from megatune.parallel.pipeline.schedules import play, schedule
from megatune.parallel.shard import local_shape
from megatune.parallel.units import is_base_matrix
from megatune.plan.activations import Kept, layer_activations, layer_input

GIB = 2**30
# Bytes an element of a quantised weight: numbers and scales.
_QUANTISED = {"nf4": 0.5 + 1 / BLOCK + 4 / (BLOCK * NESTED), "int8": 1.0}


@dataclass(frozen=True)
class Estimate:
    """Bytes on the dearest process, which is in pipeline rank `pipeline_rank`, by what they hold; `tokens_per_step`
    over all processes."""

    frozen: int
    trainable: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    tokens_per_step: int
    pipeline_rank: int = 0

    @property
    def total(self) -> int:
        return self.frozen + self.trainable + self.gradients + self.optimizer + self.activations + self.logits

    def rows(self) -> list[tuple[str, int]]:
        """(label, bytes) for printing, the total last."""
        names = ("frozen", "trainable", "gradients", "optimizer", "activations", "logits", "total")
        labels = (
            "frozen weights",
            "trainable weights",
            "gradients",
            "optimizer states",
            "activations",
            "logits",
        )
        return list(zip((*labels, "total"), (getattr(self, name) for name in names), strict=True))


def estimate(
    config: Config, model: Decoder, spec: DecoderSpec, world_size: int, compute_bytes: int
) -> Estimate:
    """What the dearest of `world_size` processes needs. `model`: the whole one, on meta, adapter attached;
    `compute_bytes`: 2 or 4.

    Weights and states are exact but for padding of shards; activations count what is large of what backward keeps,
    which leaves out the allocator's own waste (about 10 %).
    """
    layout = layout_of(config.parallel, world_size)
    stages = stages_of(config.parallel, *stage_costs(spec, config.data.seq_length))
    count = config.train.global_batch_size // check_batch(config, layout)
    under_way = _under_way(config, layout, count)
    specs = model.shard_specs()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = []
    for rank in range(layout.pp):
        numbers = held(config.parallel.schedule, layout.pp, rank, virtual_of(config.parallel))
        mine = [stages[number] for number in numbers]
        rank_of = _Rank(config, spec, layout, mine, compute_bytes)
        state = rank_of.state(specs, trained)
        waiting, passing = rank_of.activations(trained, under_way[rank])
        # The head's moment is over when the backward of the layers begins.
        logits = max(0, rank_of.logits(trained) - passing) if mine[-1].is_last else 0
        found.append(
            Estimate(
                *state,
                activations=waiting + passing,
                logits=logits,
                tokens_per_step=config.train.global_batch_size * config.data.seq_length,
                pipeline_rank=rank,
            )
        )
    return max(found, key=lambda one: one.total)


def _under_way(config: Config, layout: Layout, count: int) -> tuple[int, ...]:
    """For each pipeline rank the most (stage, micro-batch) pairs whose activations it holds at a time."""
    parallel = config.parallel
    if layout.pp == 1:
        return (1,)
    if parallel.schedule != "gpipe":
        count = min(count, 3 * layout.pp)  # from there on it stays the same
    actions = schedule(parallel.schedule, layout.pp, virtual_of(parallel), count)
    return play(actions, lambda action: 1.0).peak


@dataclass(frozen=True)
class _Rank:
    config: Config
    spec: DecoderSpec
    layout: Layout
    stages: Sequence[Stage]
    width: int

    @property
    def tokens(self) -> int:
        return self.config.train.micro_batch_size * self.config.data.seq_length

    def holds(self, name: str) -> bool:
        """Whether the parameter of this global name is of these stages."""
        room, _, rest = name.partition(".")
        if room == "layers":
            return any(int(rest.partition(".")[0]) in stage.layers for stage in self.stages)
        first, last = self.stages[0].is_first, self.stages[-1].is_last
        if room == "embed":
            return first or (last and self.spec.tied_embeddings)
        return first if room == "positions" else last

    def state(self, specs: Mapping[str, ShardSpec], trained: set[str]) -> tuple[int, int, int, int]:
        """Bytes of (frozen weights, trained weights with their masters, gradients, moments)."""
        layout, zero = self.layout, self.config.parallel.zero
        cut = Cut((0, layout.tp), (0, layout.ep), (0, layout.etp))
        quantised = self.config.model.quantise
        frozen = weights = gradients = moments = 0
        state_width = optim.state_width(self.config.optim)
        low = self.width if self.config.optim.name == "adamw_bf16" else 4
        gathered: list[int] = []
        whole_gradients = 0
        for name, one in specs.items():
            if not self.holds(name):
                continue
            size = math.prod(local_shape(one, cut))
            is_adapter = ".adapter." in name
            shards = (layout.efsdp if one.expert else layout.fsdp) if zero else 1
            by_layer = zero == 3 and shards > 1 and is_base_matrix(one)
            by_layer = by_layer and not (quantised and name.startswith("layers."))
            if by_layer:
                gathered.append(size)
            if name not in trained:
                if quantised and name.startswith("layers.") and is_matrix(one):
                    frozen += int(size * _QUANTISED[quantised])
                else:
                    frozen += size * self.width // (shards if by_layer else 1)
                continue
            width = 4 if is_adapter else self.width
            offloads = self.config.parallel.offload_optimizer
            # Bytes of an element of the masters.
            kept = low if is_base_matrix(one) else 4
            if not offloads:
                weights += kept * size // shards
                moments += int(state_width(one) * size) // shards
            if not by_layer and (offloads or shards > 1 or width < kept):
                weights += width * size  # beside the masters
            gradients += 4 * size // shards
            if zero == 1 and shards > 1:
                gradients += 4 * size
            elif zero >= 2 and shards > 1:
                whole_gradients += 4 * size
        # Whole gradients of what is being reduced: buckets, of which three may be open.
        largest = max([4 * BUCKET_ELEMENTS, *(4 * size for size in gathered)])
        gradients += min(whole_gradients, 3 * largest)
        # Two layers are gathered at a time: one in use, one on its way.
        layers = max(1, sum(len(stage.layers) for stage in self.stages))
        in_use = (
            self.width * min(sum(gathered), 2 * max(sum(gathered) // layers, *gathered, 0)) if gathered else 0
        )
        if trained:
            weights += in_use
        else:
            frozen += in_use
        return frozen, weights, gradients, moments

    def activations(self, trained: set[str], under_way: int) -> tuple[int, int]:
        """Bytes that (wait for backward when most do, are needed beside for the backward of one layer). `under_way`:
        pairs of a stage and a micro-batch."""
        layers = [index for stage in self.stages for index in stage.layers]
        first = _first_with_gradient(trained)
        kept = {
            index: layer_activations(self.spec, index, self.layout, self.tokens, self.width)
            for index in layers
            if index >= first
        }
        hidden = layer_input(self.spec, self.layout, self.tokens, self.width)
        low = self._low_rank() if trained else 0
        waiting = sum(self._waiting(index, one, hidden) + low for index, one in kept.items())
        again = max((self._again(index, one) + one.passing for index, one in kept.items()), default=0)
        # Hidden states that come and go between pipeline ranks.
        between = 4 * hidden if self.layout.pp > 1 else 0
        pairs = under_way / len(self.stages)
        if self.config.parallel.offload:
            most = max((self._waiting(index, one, hidden) for index, one in kept.items()), default=0)
            waiting, pairs = min(2 * most, waiting), 1
        return int(pairs * waiting) + between, again

    def _waiting(self, index: int, kept: Kept, hidden: int) -> int:
        """Bytes of one layer between its forward and its backward."""
        mode = self.config.parallel.recompute
        if mode == "full" or (isinstance(mode, int) and index % mode == 0):
            return hidden
        return kept.always if mode == "selective" else kept.whole

    def _again(self, index: int, kept: Kept) -> int:
        """Bytes that come back for the backward of one layer."""
        mode = self.config.parallel.recompute
        if mode == "full" or (isinstance(mode, int) and index % mode == 0):
            return kept.whole
        return kept.again if mode == "selective" else 0

    def _low_rank(self) -> int:
        """Bytes of a layer's low-rank activations."""
        method = self.config.method
        if not isinstance(method, LoraMethod):
            return 0
        return 7 * method.rank * (self.tokens // self.layout.cp) * self.width

    def logits(self, trained: set[str]) -> int:
        """Bytes around the head: logits of one chunk, and the gradients that are made in forward."""
        spec, rows = self.spec, -(-self.spec.vocab_size // self.layout.tp)
        here = self.tokens // self.layout.cp
        chunk = min(here * rows, CHUNK_LOGITS_ELSEWHERE)
        found = chunk * self.width + 3 * here * spec.hidden_size * self.width
        name = "embed.weight" if spec.tied_embeddings else "head.weight"
        if name in trained:
            found += rows * spec.hidden_size * (self.width if here * rows <= chunk else 4)
        return found


def _first_with_gradient(trained: set[str]) -> int:
    """The first layer that keeps anything: nothing before it is trained."""
    return min(_layers(trained), default=10**9)


def _layers(trained: set[str]) -> Iterator[int]:
    for name in trained:
        room, _, rest = name.partition(".")
        if room == "layers":
            yield int(rest.partition(".")[0])
        elif room in ("embed", "positions"):
            yield 0
