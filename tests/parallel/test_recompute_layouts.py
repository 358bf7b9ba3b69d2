"""Recompute and offload under tensor, context, expert and pipeline parallelism: the same gradients to the bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatune import parallel
from megatune.config.schema import ParallelConfig
from megatune.models import Decoder, DecoderSpec, build
from megatune.parallel import World, offload
from megatune.parallel.context import MicroBatch, shard_stream
from megatune.parallel.pipeline import Pipeline, held, stages_of
from tests.helpers.dist import run_ranks
from tests.helpers.families import documents, pair

LENGTHS = (17, 30, 17)
LAYOUTS = (
    {"tensor": 2},
    {"context": 2},
    {"context": 2, "context_method": "ulysses"},
    {"expert": 2},
    {"tensor": 2, "expert": 2, "expert_tensor": 1},
    {"pipeline": 2},
    {"pipeline": 2, "schedule": "zb-h1", "zero": 0},
)


def model_for(spec: DecoderSpec, world: World) -> Decoder:
    stages = stages_of(world.config, [1.0] * spec.num_layers, 0.0, 0.0)
    mine = held(world.config.schedule, world.pp.size, world.pp.rank, len(stages) // world.pp.size)
    model = build(spec, world, [stages[number] for number in mine]).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(world.rank)
    for parameter in (*model.parameters(), *model.buffers()):
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def gradients(model: Decoder, pipeline: Pipeline, batches: list[MicroBatch]) -> dict[str, Tensor]:
    model.zero_grad()
    pipeline.train(batches, 1.0, lambda stage, is_last: None)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(rank: int, world_size: int, specs: dict[str, DecoderSpec]) -> list[str]:
    offload.SMALLEST = 256
    compared = []
    for options in LAYOUTS:
        world = parallel.init(ParallelConfig(**options), device="cpu")
        for name, spec in specs.items():
            if "expert" in options and spec.moe is None:
                continue
            model = model_for(spec, world)
            pipeline = Pipeline(model, world, dtype=torch.float32)
            batches = []
            for seed in range(3):
                tokens, segments, targets = documents(LENGTHS, spec.vocab_size, seed)
                batches.append(shard_stream(tokens, segments, targets, world.cp))
            wanted = gradients(model, pipeline, batches)
            assert wanted
            for mode in ("selective", "full", 2):
                for away in (False, True):
                    model.recompute, model.offload = mode, away
                    found = gradients(model, pipeline, batches)
                    case = f"{options} {name} {mode} {away}"
                    assert found.keys() == wanted.keys(), case
                    for key, grad in wanted.items():
                        assert torch.equal(found[key], grad), f"{case} {key}"
                    compared.append(case)
    return compared


def test_modes_agree_under_every_dimension() -> None:
    specs = {name: pair(name).spec for name in ("qwen3", "olmo2", "deepseek-v3", "mixtral")}
    compared, others = run_ranks(compare, 2, specs)
    assert compared == others and len(compared) == 6 * (5 * 4 + 2 * 2)
