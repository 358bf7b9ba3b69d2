"""The ZeRO engine on a toy of odd sizes: equal to plain torch in one process, and sends what its stage needs.

Tolerances: fp32 1e-5 relative. bf16: weights are rounded between steps, so that sums in another order may round one
weight differently: 2e-2.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatune import parallel
from megatune.config.schema import ParallelConfig
from megatune.optim import ShardedAdamW
from megatune.parallel import ShardSpec, World, Zero, buckets, collectives, deferred
from megatune.parallel.stages import Stage
from tests.helpers import toy
from tests.helpers.dist import run_ranks

STEPS = 3


def _world(zero: int, like: World | None = None, **settings) -> World:
    """A world of this stage; `like`: of the same layout, whose process groups are used again."""
    config = ParallelConfig(zero=zero, **settings)
    return parallel.init(config, device="cpu") if like is None else replace(like, config=config)


def _check(found: toy.Result, expected: toy.Result, dtype: torch.dtype, case: str) -> None:
    rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (2e-2, 2e-2)
    assert found.norms == pytest.approx(expected.norms, rel=rtol), case
    for step, gradients in enumerate(expected.gradients):
        assert gradients.keys() == found.gradients[step].keys(), case
        for name, grad in gradients.items():
            close = {"rtol": rtol, "atol": atol * max(1.0, float(grad.abs().max()))}
            torch.testing.assert_close(
                found.gradients[step][name], grad, **close, msg=f"{case} {name} {step}"
            )
    for mine, theirs in ((found.weights, expected.weights), (found.moments, expected.moments)):
        for name, tensor in theirs.items():
            close = {"rtol": rtol, "atol": atol * max(1.0, float(tensor.abs().max()))}
            torch.testing.assert_close(
                mine[name].to(dtype).float(), tensor.to(dtype).float(), **close, msg=case
            )


def _train(world: World, dtype: torch.dtype, batches, **what) -> toy.Result:
    """The toy's run; process number `dp_rank` of `dp_size` takes its share of each global batch, and tensor parallel
    processes their share of the tokens."""
    spare = what.pop("spare", ())
    specs = toy.specs_of(world, **what)
    with torch.device("meta"):
        model = toy.Toy(world, **what)
    zero = toy.build(model, specs, world, dtype)
    optim = ShardedAdamW(zero.masters(), toy.OPTIM)
    gradients, norms = [], []
    for number, batch in enumerate(batches):
        share = list(enumerate(batch))[world.dp_rank :: world.dp_size]
        for index, (place, x) in enumerate(share):
            x = x.chunk(world.tp.size)[world.tp.rank].to(dtype)
            zero.begin_backward(0, index == len(share) - 1)
            model(x, bool(spare) and spare[place % len(spare)]).backward()
        grads, norm = toy.step(zero, optim, number)
        gradients.append(grads)
        norms.append(norm)
    state = optim.state()
    moments = {name: state[f"optim/exp_avg/{name}"] for name in zero.masters()}
    return toy.Result(gradients, norms, toy.whole(zero.weights()), toy.whole(moments))


def _stages(rank: int, world_size: int) -> int:
    buckets.BUCKET_ELEMENTS = 100  # several buckets
    done = 0
    worlds = {1: _world(0)} | ({2: _world(0, replicate=2)} if world_size == 4 else {})
    for replicate, like in worlds.items():
        for accumulate, dtype, adapted in (
            (1, torch.float32, False),
            (3, torch.float32, False),
            (3, torch.bfloat16, False),
            (3, torch.float32, True),
            (1, torch.bfloat16, True),
        ):
            batches = [toy.inputs(step, world_size * accumulate) for step in range(STEPS)]
            specs = toy.specs_of(like, adapted)
            expected = toy.reference(specs, dtype, batches, adapted=adapted)
            for zero in range(4):
                case = f"zero {zero} replicate {replicate} accumulate {accumulate} {dtype} adapted {adapted}"
                world = _world(zero, like, replicate=replicate, overlap=accumulate == 3)
                _check(_train(world, dtype, batches, adapted=adapted), expected, dtype, case)
                done += 1
    return done


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_stage_equals_plain_torch(world_size):
    assert run_ranks(_stages, world_size) == [20 * (world_size // 2)] * world_size
