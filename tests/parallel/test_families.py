"""Latent attention, sinks and their adapters under tensor and context parallelism equal one process, in fp64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatune import adapters, parallel
from megatune.config.schema import LoraMethod, ParallelConfig
from megatune.models import Decoder, DecoderSpec, LayerSpec, RopeSpec, build
from megatune.models.generate import generate
from megatune.models.spec import MLASpec, MoESpec
from megatune.parallel import World
from megatune.parallel.collectives import sum_
from megatune.parallel.context import shard_stream
from tests.helpers.dist import run_ranks
from tests.helpers.whole import load_whole, packed_batch, random_state, slice_of

LATENT = DecoderSpec(
    family="deepseek_v3",
    vocab_size=61,
    hidden_size=24,
    mlp_size=20,
    num_heads=4,
    num_kv_heads=4,
    head_dim=10,
    layers=(LayerSpec(), LayerSpec()),
    ropes=(RopeSpec(10000.0, 4),),
    max_positions=64,
    attention_scale=10**-0.5,
    mla=MLASpec(q_rank=14, kv_rank=12, nope_dim=6, rope_dim=4, value_dim=8),
)
SINKS = replace(
    LATENT,
    family="gpt_oss",
    num_kv_heads=2,
    head_dim=8,
    layers=(LayerSpec(window=5), LayerSpec()),
    ropes=(RopeSpec(10000.0, 8),),
    mla=None,
    qkv_bias=True,
    attention_out_bias=True,
    sinks=True,
)
SPECS = {
    "latent": LATENT,
    "latent-direct": replace(
        LATENT,
        mla=replace(LATENT.mla, q_rank=None, interleaved=False),
        qkv_bias=True,
        attention_out_bias=True,
    ),
    "latent-experts": replace(
        LATENT,
        layers=(LayerSpec(), LayerSpec(moe=True)),
        moe=MoESpec(4, 2, 6, shared_size=10, score="sigmoid", scale=2.5, correction=True),
    ),
    "sinks": SINKS,
}


@dataclass(frozen=True)
class Case:
    spec: str
    layout: tuple[tuple[str, Any], ...]
    lora: bool = False
    dropout: float = 0.0


TENSOR, CONTEXT = (("tensor", 2),), (("context", 2),)
CASES = [
    Case("latent", TENSOR),
    Case("latent-direct", TENSOR),
    Case("latent-direct", TENSOR, lora=True),
    Case("latent", TENSOR, lora=True, dropout=0.4),
    Case("latent-experts", (*TENSOR, ("expert", 2), ("expert_tensor", 1))),
    Case("latent-experts", TENSOR),
    Case("sinks", TENSOR),
    Case("latent", CONTEXT),
    Case("latent", (*CONTEXT, ("context_method", "ulysses"))),
    Case("latent", CONTEXT, lora=True, dropout=0.4),
    Case("sinks", CONTEXT),
]


def _model(case: Case, world: World | None = None) -> Decoder:
    model = build(SPECS[case.spec], world)
    if case.lora:
        adapters.attach(model, LoraMethod(type="lora", rank=3, alpha=6, dropout=case.dropout))
    return model


def _backward(model: Decoder) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients, summed over the processes as the trainer does it."""
    world = model.world
    batch = shard_stream(*packed_batch(LATENT.vocab_size), world.cp)
    loss = model(batch.tokens, batch.segments, batch.targets)
    loss.backward()
    specs, grads = model.shard_specs(), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spec, grad = specs[name], parameter.grad.clone()
            grad = sum_(grad, world.efsdp if spec.expert else world.fsdp)
            grads[name] = sum_(grad, world.etp if spec.expert else world.tp) if spec.partial else grad
    return sum_(loss.detach().clone(), world.cp), grads


def _compare(rank: int, world_size: int) -> None:
    worlds: dict[Any, World] = {}
    for case in CASES:
        if case.layout not in worlds:
            worlds[case.layout] = parallel.init(ParallelConfig(**dict(case.layout)), device="cpu")
        world = worlds[case.layout]
        whole, mine = _model(case), _model(case, world)
        state = random_state(whole.shard_specs().values())
        load_whole(whole, state)
        load_whole(mine, state)
        (loss, grads), (expected_loss, expected) = _backward(mine), _backward(whole)
        torch.testing.assert_close(loss, expected_loss, msg=lambda m, c=case: f"{c}: loss: {m}")
        specs = mine.shard_specs()
        assert specs == whole.shard_specs() and grads.keys() == expected.keys()
        for name, grad in grads.items():
            assert expected[name].abs().max() > 0, f"{case}: {name} has no gradient"
            wanted = slice_of(specs[name], expected[name], world.cut)
            torch.testing.assert_close(grad, wanted, msg=lambda m, c=case, n=name: f"{c}: {n}: {m}")
        if case.layout == TENSOR and not case.lora:
            answers = [list(generate(model, [5, 6, 60], max_new_tokens=9)) for model in (mine, whole)]
            assert answers[0] == answers[1], case


def test_loss_and_gradients_equal_one_process() -> None:
    run_ranks(_compare, 2)
