"""The ZeRO engine on a toy of odd sizes: equal to plain torch in one process, and sends what its stage needs.

Tolerances: fp32 1e-5 relative. bf16: weights are rounded between steps, so that sums in another order may round one
weight differently: 2e-2. fp32 on a GPU 1e-3: products of other shapes sum in another order, and Adam makes a whole step
of a gradient near zero, whatever its sign.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatune import parallel
from megatune.config.schema import ParallelConfig
from megatune.optim import ShardedOptimizer
from megatune.parallel import ShardSpec, Stage, World, Zero, buckets, deferred
from tests.helpers import toy
from tests.helpers.dist import run_ranks

STEPS = 3


def _world(zero: int, like: World | None = None, device: str = "cpu", **settings) -> World:
    """A world of this stage; `like`: of the same layout, whose process groups are used again."""
    config = ParallelConfig(zero=zero, **settings)
    return parallel.init(config, device=device) if like is None else replace(like, config=config)


def _check(
    found: toy.Result, expected: toy.Result, dtype: torch.dtype, case: str, *, device: str = "cpu"
) -> None:
    rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (2e-2, 2e-2)
    if device != "cpu" and dtype == torch.float32:
        rtol, atol = 1e-3, 1e-3
    assert found.norms == pytest.approx(expected.norms, rel=rtol), case
    for step, gradients in enumerate(expected.gradients):
        assert gradients.keys() == found.gradients[step].keys(), case
        for name, grad in gradients.items():
            close = {"rtol": rtol, "atol": atol * max(1.0, float(grad.abs().max()))}
            torch.testing.assert_close(
                found.gradients[step][name], grad, **close, msg=_named(f"{case} {name} {step}")
            )
    for mine, theirs in ((found.weights, expected.weights), (found.moments, expected.moments)):
        for name, tensor in theirs.items():
            close = {"rtol": rtol, "atol": atol * max(1.0, float(tensor.abs().max()))}
            torch.testing.assert_close(
                mine[name].to(dtype).float(), tensor.to(dtype).float(), **close, msg=_named(f"{case} {name}")
            )


def _named(case: str) -> Callable[[str], str]:
    return lambda differences: f"{case}: {differences}"


def _train(world: World, dtype: torch.dtype, batches, **what) -> toy.Result:
    """The toy's run; process number `dp_rank` of `dp_size` takes its share of each global batch, and tensor parallel
    processes their share of the tokens."""
    spare, config = what.pop("spare", ()), what.pop("optim", toy.OPTIM)
    specs = toy.specs_of(world, **what)
    with torch.device("meta"):
        model = toy.Toy(world, **what)
    zero = toy.build(model, specs, world, dtype, config)
    optim = ShardedOptimizer(zero.masters(), config, world)
    gradients, norms = [], []
    for number, batch in enumerate(batches):
        share = list(enumerate(batch))[world.dp_rank :: world.dp_size]
        for index, (place, x) in enumerate(share):
            x = x.chunk(world.tp.size)[world.tp.rank].to(world.device, dtype)
            zero.begin_backward(0, index == len(share) - 1)
            model(x, bool(spare) and spare[place % len(spare)]).backward()
        grads, norm = toy.step(zero, optim, number)
        gradients.append(grads)
        norms.append(norm)
    state = optim.state()
    moments = {name: state[f"optim/exp_avg/{name}"] for name in zero.masters()}
    return toy.Result(gradients, norms, toy.whole(zero.weights()), toy.whole(moments))


def every_stage(rank: int, world_size: int, device: str = "cpu") -> int:
    """Compare all stages with plain torch on `device`; the number of cases."""
    buckets.BUCKET_ELEMENTS = 100  # several buckets
    done = 0
    worlds = {1: _world(0, device=device)}
    if world_size == 4:
        worlds[2] = _world(0, device=device, replicate=2)
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
            expected = toy.reference(specs, dtype, batches, adapted=adapted, device=like.device)
            for zero in range(4):
                case = f"zero {zero} replicate {replicate} accumulate {accumulate} {dtype} adapted {adapted}"
                # Masters on the host in one case of each stage that can.
                offloads = adapted and zero in ((1,) if dtype == torch.float32 else (0, 2))
                settings = {"overlap": accumulate == 3, "offload_optimizer": offloads}
                world = _world(zero, like, replicate=replicate, **settings)
                _check(_train(world, dtype, batches, adapted=adapted), expected, dtype, case, device=device)
                done += 1
    return done


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_stage_equals_plain_torch(world_size):
    assert run_ranks(every_stage, world_size) == [20 * (world_size // 2)] * world_size


def _experts(rank: int, world_size: int) -> None:
    buckets.BUCKET_ELEMENTS = 100
    # 2 processes: efsdp is 1. 4 processes: 2 that share one expert, or 4 that share two.
    for expert in (2, 1) if world_size == 4 else (2,):
        like = _world(0, expert=expert)
        assert (like.ep.size, like.efsdp.size) == (expert, world_size // expert)
        specs = toy.specs_of(like, experts=True)
        batches = [toy.inputs(step, world_size * 2) for step in range(STEPS)]
        expected = toy.reference(specs, torch.float32, batches, experts=True)
        for zero in range(4):
            world = _world(zero, like, expert=expert)
            found = _train(world, torch.float32, batches, experts=True)
            _check(found, expected, torch.float32, f"experts zero {zero} ep {expert}")
        if like.efsdp.size > 1:
            with torch.device("meta"):
                model = toy.Toy(world, experts=True)
            masters = toy.build(model, specs, world, torch.float32).masters()
            even = masters["layers.0.experts.even"].tensor
            assert even.shape == (toy.EXPERTS // expert, 8 // like.efsdp.size, toy.WIDTH)


def _partial(rank: int, world_size: int) -> None:
    """Everything is replicated over tensor parallel processes, and sees half of the tokens on each."""
    like = _world(0, tensor=2)
    batches = [toy.inputs(step, 2 * like.dp_size) for step in range(STEPS)]
    expected = toy.reference(toy.specs_of(like), torch.float32, batches)
    for zero in range(4):
        found = _train(_world(zero, like, tensor=2), torch.float32, batches)
        _check(found, expected, torch.float32, f"partial zero {zero}")


STAGES = (Stage(0, 2, range(1)), Stage(1, 2, range(1, 3)))


def _staged(stages, world: World, dtype=torch.float32) -> tuple[toy.Staged, Zero]:
    with torch.device("meta"):
        model, complete = toy.Staged(stages), toy.Staged(STAGES)
    specs = {name: ShardSpec(name, tuple(p.shape)) for name, p in complete.named_parameters()}
    every = toy.values(specs)
    zero = Zero(model, {name: specs[name] for name, _ in model.named_parameters()}, world, dtype)
    zero.materialise("cpu")
    toy.fill(zero.weights(), every)
    zero.publish()
    return model, zero


def _staged_reference(batch) -> dict[str, torch.Tensor]:
    """Gradients of all stages in one process by autograd."""
    model = toy.Staged(STAGES)
    specs = {name: ShardSpec(name, tuple(p.shape)) for name, p in model.named_parameters()}
    with torch.no_grad():
        for (_, p), value in zip(model.named_parameters(), toy.values(specs).values(), strict=True):
            p.copy_(value)
    for x in batch:
        model(model(x, 0), 1).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def _words(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4, toy.Staged.WORDS, generator=generator) for _ in range(count)]


def _compare(zero: Zero, expected: dict[str, torch.Tensor], case: str) -> None:
    found = toy.whole({name: m.parts(m.grad) for name, m in zero.masters().items()})
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-4, msg=f"{case} {name}")
    toy.whole(zero.weights())
    optim = ShardedOptimizer(zero.masters(), toy.OPTIM)
    square = torch.tensor(optim.grad_square(), dtype=torch.float64)
    dist.all_reduce(square)
    true = sum(float(grad.double().square().sum()) for grad in expected.values())
    assert float(square) == pytest.approx(true, rel=1e-5), case


def _tied(rank: int, world_size: int) -> None:
    """Two processes of a pipeline (times two that share the batch): each has its copy of the embedding."""
    like = _world(0, pipeline=2)
    batch = _words(2 * like.dp_size)
    expected = _staged_reference(batch)
    number = like.pp.rank
    for level in range(4):
        world = _world(level, like, pipeline=2)
        model, zero = _staged([STAGES[number]], world)
        share = batch[world.dp_rank :: world.dp_size]
        for index, x in enumerate(share):
            # Each process computes both stages, with the other's weights frozen, in place of a pipeline.
            other, _ = _staged([STAGES[1 - number]], replace(World.alone(), config=world.config))
            other.requires_grad_(False)
            zero.begin_backward(0, index == len(share) - 1)
            (other(model(x)) if number == 0 else model(other(x))).backward()
        zero.finish()
        _compare(zero, expected, f"tied zero {level}")
        masters = [None] * world_size
        dist.all_gather_object(masters, (world.fsdp.rank, zero.masters()["embed.weight"].grad.clone()))
        for place, grad in masters:
            if place == world.fsdp.rank:
                assert torch.equal(grad, zero.masters()["embed.weight"].grad), "the copies would drift"


def _both_stages(rank: int, world_size: int) -> None:
    """A process that has the first and the last stage, whose weight gradients come at once or much later."""
    buckets.BUCKET_ELEMENTS = 60
    like = _world(0)
    batch = _words(3 * world_size)
    expected = _staged_reference(batch)
    late = replace(like, pp=replace(like.pp, size=2))  # as in a V: no other process has the embedding
    for level in range(3):
        for puts_off in (False, True):
            schedule = "zbv" if puts_off else "1f1b"
            world = _world(level, late if puts_off else like, schedule=schedule)
            model, zero = _staged(STAGES, world)
            queues = []
            share = batch[rank::world_size]
            for index, x in enumerate(share):
                is_last = index == len(share) - 1
                hidden = model(x, 0)
                border = hidden.detach().requires_grad_()
                loss = model(border, 1)
                for stage in (1, 0):
                    zero.begin_backward(stage, is_last)
                    with deferred.collecting() if puts_off else nullcontext() as queue:
                        loss.backward() if stage else hidden.backward(border.grad)
                    queues.append(queue)
                if puts_off and index == 1:  # some of them in between
                    queues.pop(0).run()
            for queue in queues if puts_off else ():
                queue.run()
            zero.finish()
            _compare(zero, expected, f"both stages zero {level} puts off {puts_off}")


def low_masters(rank: int, world_size: int, device: str = "cpu") -> None:
    """Weights in bf16 without masters: at every stage the same random bits, so the same weights wherever gradients are
    the same. Those of stage 3 are rounded to bf16, once in each micro-batch."""
    like, config = _world(0, device=device), toy.OPTIM.model_copy(update={"name": "adamw_bf16"})
    batches = [toy.inputs(step, 2 * world_size) for step in range(STEPS)]
    found = {}
    for zero in range(4):
        what = {"experts": True, "optim": config}
        found[zero] = _train(_world(zero, like), torch.bfloat16, batches, **what)
    for zero in (1, 2):
        for name, weight in found[0].weights.items():
            assert torch.equal(found[zero].weights[name], weight), f"zero {zero} {name}"
    differ = total = 0
    for name, weight in found[0].weights.items():
        torch.testing.assert_close(found[3].weights[name], weight, rtol=2**-6, atol=2e-2, msg=_named(name))
        differ += int((found[3].weights[name] != weight).sum())
        total += weight.numel()
    assert differ < total / 5
    specs = toy.specs_of(like, experts=True)
    plain = toy.reference(specs, torch.bfloat16, batches, experts=True, device=like.device)
    for zero in (0, 3):
        assert found[zero].norms == pytest.approx(plain.norms, rel=2e-2), f"zero {zero}"


def _two(rank: int, world_size: int) -> None:
    _experts(rank, world_size)
    low_masters(rank, world_size)
    _partial(rank, world_size)
    _not_every_gradient(rank, world_size)
    _tied(rank, world_size)
    _both_stages(rank, world_size)


def _four(rank: int, world_size: int) -> None:
    _experts(rank, world_size)
    _partial(rank, world_size)
    _tied(rank, world_size)


def _not_every_gradient(rank: int, world_size: int) -> None:
    """`spare` is used in one micro-batch of three: not in the same ones, and not as often, on every process."""
    buckets.BUCKET_ELEMENTS = 30
    like = _world(0)
    batches = [toy.inputs(step, 6) for step in range(STEPS)]
    what = {"spare": (True, False, False)}
    expected = toy.reference(toy.specs_of(like), torch.float32, batches, **what)
    for zero in range(3):
        for overlap in (True, False):
            with _sent() as sent:
                found = _train(_world(zero, like, overlap=overlap), torch.float32, batches, **what)
            _check(found, expected, torch.float32, f"missing gradients zero {zero} overlap {overlap}")
            orders: list = [None] * world_size
            dist.all_gather_object(orders, sent)
            assert orders[0] == orders[1], "reductions must start in the same order everywhere"


@pytest.mark.parametrize("world_size", [2, 4])
def test_experts_partial_sums_and_stages_equal_plain_torch(world_size):
    run_ranks(_two if world_size == 2 else _four, world_size)


def _input(kwargs: dict[str, Any]) -> torch.Tensor:
    return next(kwargs[key] for key in ("input", "input_tensor") if key in kwargs)


@contextmanager
def _sent() -> Iterator[list[tuple[str, int]]]:
    """(name, elements given to it) of each collective on tensors that is called meanwhile, in order."""
    sent: list[tuple[str, int]] = []
    newer = {"all_gather_single": "all_gather_into_tensor", "reduce_scatter_single": "reduce_scatter_tensor"}
    names = {"all_reduce": "all_reduce"} | {old: old for old in newer.values()} | newer
    with pytest.MonkeyPatch.context() as patch:
        for here, name in names.items():
            if not hasattr(dist, here):
                continue
            original = getattr(dist, here)

            def counted(*args, name=name, original=original, **kwargs):
                given = args[0] if name == "all_reduce" else args[1] if len(args) > 1 else _input(kwargs)
                if given.dtype != torch.float64:  # the toy's own sums
                    sent.append((name, given.numel()))
                return original(*args, **kwargs)

            patch.setattr(dist, here, counted)
        yield sent


def _communication(rank: int, world_size: int) -> None:
    micro_batches, like = 4, _world(0)
    batches = [toy.inputs(0, world_size * micro_batches)]
    ways = ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor")
    # Stage -> times of each way in one step of one bucket, weights brought out twice (at the start, after the update).
    expected = {0: (1, 0, 0), 1: (0, 1, 2), 2: (0, micro_batches, 2)}
    for zero, times in expected.items():
        for adapted in (False, True):
            with _sent() as sent:
                _train(_world(zero, like), torch.float32, batches, adapted=adapted)
            counted = Counter(name for name, _ in sent)
            assert tuple(counted[way] for way in ways) == times, (zero, adapted, counted)
            if adapted:
                # Two adapters of two tensors: 21 and 39 elements, padded to 64 in two shards.
                assert {numel for name, numel in sent if name == "reduce_scatter_tensor"} <= {4 * 64}
                assert sum(numel for _, numel in sent) <= 4 * 64 * (micro_batches + 2)
    # Stage 3 reduces each unit in each micro-batch: two layers, the root; and one bucket of vectors.
    with _sent() as sent:
        _train(_world(3, like), torch.float32, batches)
    counted = Counter(name for name, _ in sent)
    assert counted["reduce_scatter_tensor"] == 4 * micro_batches
    # Frozen: gathered in forward and backward, never reduced.
    with _sent() as sent:
        _train(_world(3, like), torch.float32, batches, adapted=True)
    counted = Counter(name for name, _ in sent)
    assert counted["reduce_scatter_tensor"] == micro_batches, "only the bucket of adapters"
    vectors = 2 * (toy.WIDTH + toy.INNER + toy.WIDTH)
    specs = toy.specs_of(like, adapted=True)
    matrices = sum(
        -(-s.shape[0] // 2) * s.shape[1]
        for n, s in specs.items()
        if len(s.shape) == 2 and ".adapter." not in n
    )
    gathered = sum(numel for name, numel in sent if name == "all_gather_into_tensor")
    assert vectors and gathered <= matrices * 2 * micro_batches + 2 * 4 * 64, "frozen vectors are not sent"


def _replicas_communication(rank: int, world_size: int) -> None:
    like = _world(0, replicate=2)
    batches = [toy.inputs(0, world_size * 4)]
    for zero, reduced in ((1, 1), (2, 4)):
        with _sent() as sent:
            _train(_world(zero, like, replicate=2), torch.float32, batches)
        counted = Counter(name for name, _ in sent)
        assert (counted["reduce_scatter_tensor"], counted["all_reduce"]) == (reduced, 1), zero
    with _sent() as sent:
        _train(_world(3, like, replicate=2), torch.float32, batches)
    counted = Counter(name for name, _ in sent)
    # Two layers, the root, one bucket: each reduced in every micro-batch, summed over the replicas once.
    assert (counted["reduce_scatter_tensor"], counted["all_reduce"]) == (4 * 4, 4)


def _memory(rank: int, world_size: int) -> None:
    """What a stage keeps between steps, in elements of the parameter that it is about."""
    for zero, shards in ((0, 1), (1, 2), (2, 2)):
        world = _world(zero)
        model = nn.Linear(64, 64, bias=False).to("meta")
        model.requires_grad_(True)
        specs = {"weight": ShardSpec("weight", (64, 64))}
        engine = Zero(model, specs, world, torch.bfloat16)
        engine.materialise("cpu")
        optim = ShardedOptimizer(engine.masters(), toy.OPTIM)
        (master,) = engine.masters().values()
        assert master.tensor.numel() == master.grad.numel() == 64 * 64 // shards
        assert model.weight.dtype == torch.bfloat16
        state = optim.state()
        held = {k: sum(view.numel() for _, view in parts.parts) for k, parts in state.items()}
        assert set(held.values()) == {64 * 64 // shards}
        (bucket,) = engine._buckets
        assert (bucket._whole is None) == (zero == 2), "stage 2 keeps no whole gradient"
        for is_last in (False, True):
            engine.begin_backward(0, is_last)
            model(torch.ones(1, 64, dtype=torch.bfloat16)).sum().backward()
            assert model.weight.grad is None, "the compute dtype's gradient is not kept"
        engine.finish()
        torch.testing.assert_close(master.grad, torch.full_like(master.grad, 2.0 * world_size))


def _count_two(rank: int, world_size: int) -> None:
    _communication(rank, world_size)
    _memory(rank, world_size)


def test_each_stage_sends_and_keeps_what_it_needs():
    run_ranks(_count_two, 2)
    run_ranks(_replicas_communication, 4)
