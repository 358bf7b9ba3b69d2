"""A model under a layout, ready to train: stages, slices, adapters, sharding, optimizer, pipeline."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatune import adapters, models, optim, parallel
from megatune.config.schema import Config
from megatune.models.layout import stage_costs
from megatune.models.spec import DecoderSpec
from megatune.parallel.pipeline import Pipeline, held, stages_of
from megatune.parallel.shard import Parts, ShardSpec
from megatune.training.precision import compile_layers


@dataclass
class Assembled:
    """`model`: this process's part of it; `zero`: its masters and what shards them; `specs`: its parameters."""

    model: models.Decoder
    zero: parallel.Zero
    specs: dict[str, ShardSpec]


def assemble(spec: DecoderSpec, config: Config, world: parallel.World, dtype: torch.dtype) -> Assembled:
    """Memory for this process's part of a model, on its device; the weights are not filled yet. Fill `zero.weights()`,
    then call `zero.publish()`."""
    assembled = outline(spec, config, world, dtype)
    assembled.zero.materialise(world.device)
    return assembled


def outline(spec: DecoderSpec, config: Config, world: parallel.World, dtype: torch.dtype) -> Assembled:
    """As `assemble`, but without memory: the model is on meta until `zero.materialise`."""
    stages = stages_of(config.parallel, *stage_costs(spec, config.data.seq_length))
    mine = held(config.parallel.schedule, world.pp.size, world.pp.rank, len(stages) // world.pp.size)
    model = models.build(spec, world, [stages[number] for number in mine])
    adapters.attach(model, config.method)
    models.set_dtypes(model, dtype)
    if config.model.quantise:
        models.quantise(model, config.model.quantise)
    if config.model.fp8:
        models.use_fp8(model, config.model.fp8)
    model.recompute, model.offload = config.parallel.recompute, config.parallel.offload
    if config.train.compile:
        compile_layers(model)
    specs = model.shard_specs()
    zero = parallel.Zero(model, specs, world, dtype, optim.master_dtype(config.optim, dtype))
    return Assembled(model, zero, specs)


def training_parts(
    assembled: Assembled, config: Config, world: parallel.World, dtype: torch.dtype
) -> tuple[optim.ShardedOptimizer, Pipeline, dict[str, Parts]]:
    """(optimizer, pipeline, what a checkpoint holds: trained weights, the optimizer's states, and routers' biases that
    are balanced) for a model whose weights are filled."""
    zero = assembled.zero
    optimizer = optim.build(zero.masters(), config.optim, world, seed=config.train.seed)
    weights = zero.weights()
    kept = set(zero.masters())
    if config.moe.bias_rate:
        kept |= {name for name in weights if name.endswith("router.correction")}
    state = {f"model/{name}": parts for name, parts in weights.items() if name in kept} | optimizer.state()
    return optimizer, Pipeline(assembled.model, world, dtype=dtype), state
