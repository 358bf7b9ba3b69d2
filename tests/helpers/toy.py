"""A small model with odd sizes for the ZeRO engine, and the same run by plain torch in one process.

The toy has what matters to sharding: matrices and vectors of sizes that nothing divides, frozen bases with fp32
adapters, experts, weights that are replicated over tensor parallel processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatune.config.schema import OptimConfig
from megatune.optim import ShardedOptimizer, master_dtype
from megatune.parallel import Parts, ShardSpec, Stage, World, Zero, collectives, deferred

WIDTH, INNER, OUT, RANK, EXPERTS = 7, 13, 5, 3, 2
OPTIM = OptimConfig(lr=1e-2, weight_decay=0.1)


class Adapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lora_a = nn.Parameter(torch.empty(RANK, WIDTH))
        self.lora_b = nn.Parameter(torch.empty(INNER, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))


class Up(nn.Linear):
    def __init__(self, adapted: bool) -> None:
        super().__init__(WIDTH, INNER)
        self.adapter = Adapter() if adapted else None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.adapter is None else y + self.adapter(x)


class Experts(nn.Module):
    """All tokens go to all experts, whose outputs add up. There are fewer than processes that share them: ZeRO 3 cuts
    `even` along its second dimension, and gives all of `odd` to a few processes."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.axis = world.ep
        here = EXPERTS // world.ep.size
        self.even = nn.Parameter(torch.empty(here, 8, WIDTH))
        self.odd = nn.Parameter(torch.empty(here, WIDTH, 8))
        self.bias = nn.Parameter(torch.empty(here, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        whole = collectives.gather(x, self.axis)
        inner = torch.tanh(torch.einsum("th,eih->eti", whole, self.even))
        y = torch.einsum("eti,eoi->to", inner, self.odd) + self.bias.sum(0)
        return collectives.scatter_sum(y, self.axis)


class Block(nn.Module):
    def __init__(self, world: World, adapted: bool, experts: bool) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.empty(WIDTH))
        self.up = Up(adapted)
        self.down = nn.Linear(INNER, WIDTH)
        self.experts = Experts(world) if experts else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.tanh(self.up(x * self.norm)))
        return x if self.experts is None else x + self.experts(x)


class Toy(nn.Module):
    """x [T, WIDTH] -> sum over tokens of a loss. `adapted`: all but the adapters is frozen."""

    def __init__(self, world: World, adapted: bool = False, experts: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): Block(world, adapted, experts) for i in range(2)})
        self.spare = nn.Linear(3, 5, bias=False)
        self.head = nn.Linear(WIDTH, OUT, bias=False)
        if adapted:
            for name, p in self.named_parameters():
                p.requires_grad_(".adapter." in name)

    def forward(self, x: Tensor, uses_spare: bool = False) -> Tensor:
        for block in self.layers.values():
            x = block(x)
        loss = self.head(x).float().square().sum()
        return loss + self.spare.weight.float().square().sum() if uses_spare else loss


def specs_of(world: World, adapted: bool = False, experts: bool = False) -> dict[str, ShardSpec]:
    """With tensor parallelism everything is replicated, and sees a part of the tokens."""
    with torch.device("meta"):
        whole = Toy(World.alone(), adapted, experts)
    return {
        name: ShardSpec(
            name,
            tuple(p.shape),
            partial=world.tp.size > 1,
            expert=".experts." in name,
        )
        for name, p in whole.named_parameters()
    }


def values(specs: dict[str, ShardSpec]) -> dict[str, Tensor]:
    """Global fp32 weights, the same on all processes."""
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(spec.shape, generator=generator) * 0.5 for name, spec in specs.items()}


def inputs(step: int, micro_batches: int, tokens: int = 4) -> list[Tensor]:
    """Micro-batches of the global batch."""
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(tokens, WIDTH, generator=generator) for _ in range(micro_batches)]


def build(
    model: nn.Module,
    specs: dict[str, ShardSpec],
    world: World,
    dtype: torch.dtype,
    config: OptimConfig = OPTIM,
) -> Zero:
    """`model` (on meta, fp32) sharded for the optimizer of `config`, with memory, filled with `values`."""
    for p in model.parameters():
        if not p.requires_grad:
            p.data = p.data.to(dtype)
    zero = Zero(model, specs, world, dtype, master_dtype(config, dtype))
    zero.materialise(world.device)
    fill(zero.weights(), values(specs))
    zero.publish()
    return zero


def fill(parts: dict[str, Parts], tensors: dict[str, Tensor]) -> None:
    for name, held in parts.items():
        assert held.shape == tuple(tensors[name].shape)
        for box, view in held.parts:
            view.copy_(box.of(tensors[name]))


def whole(parts: dict[str, Parts]) -> dict[str, Tensor]:
    """The global tensors from what all processes write; asserts that they write each element once."""
    mine = [
        (name, box, view.detach().float().cpu().clone())
        for name, held in parts.items()
        for box, view in held.parts
        if held.writes
    ]
    shapes = {name: held.shape for name, held in parts.items()}
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (shapes, mine))
    found: dict[str, Tensor] = {}
    times: dict[str, Tensor] = {}
    for other, _ in everyone:
        for name, shape in other.items():
            found.setdefault(name, torch.full(shape, torch.nan))
            times.setdefault(name, torch.zeros(shape, dtype=torch.int64))
    for _, boxes in everyone:
        for name, box, view in boxes:
            box.of(found[name]).copy_(view)
            box.of(times[name]).add_(1)
    for name, count in times.items():
        assert (count == 1).all(), f"{name}: elements written {count.unique().tolist()} times"
    return found


@dataclass
class Result:
    """Global gradients and norm of each step, and the weights and first moments after the last."""

    gradients: list[dict[str, Tensor]]
    norms: list[float]
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]


def reference(
    specs: dict[str, ShardSpec],
    dtype: torch.dtype,
    batches: Sequence[Sequence[Tensor]],
    *,
    adapted: bool = False,
    experts: bool = False,
    spare: Sequence[bool] = (),
    device: torch.device | str = "cpu",
) -> Result:
    """The run by torch alone: fp32 masters, compute in `dtype`, gradients summed in fp32 over micro-batches."""
    model = Toy(World.alone(), adapted, experts).to(device)
    masters = {name: value.to(device) for name, value in values(specs).items()}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    parameters = dict(model.named_parameters())
    for name, p in parameters.items():
        p.data = p.data.to(torch.float32 if ".adapter." in name else dtype)

    def publish() -> None:
        for name, p in parameters.items():
            p.data.copy_(masters[name])

    publish()

    def decays(name: str) -> bool:
        return masters[name].ndim - (".experts." in name) >= 2

    optimizer = torch.optim.AdamW(
        [
            {"params": [masters[n] for n in trained if decays(n)], "weight_decay": OPTIM.weight_decay},
            {"params": [masters[n] for n in trained if not decays(n)], "weight_decay": 0.0},
        ],
        betas=(OPTIM.beta1, OPTIM.beta2),
        eps=OPTIM.eps,
    )
    gradients, norms = [], []
    for step, batch in enumerate(batches):
        sums = {name: torch.zeros_like(masters[name]) for name in trained}
        for number, x in enumerate(batch):
            model(x.to(device, dtype), bool(spare) and spare[number % len(spare)]).backward()
            for name in trained:
                if parameters[name].grad is not None:
                    sums[name] += parameters[name].grad
                parameters[name].grad = None
        gradients.append({name: grad.to("cpu", copy=True) for name, grad in sums.items()})
        norms.append(sum(float(grad.double().square().sum()) for grad in sums.values()) ** 0.5)
        for name in trained:
            masters[name].grad = sums[name] * 0.5
        for group in optimizer.param_groups:
            group["lr"] = OPTIM.lr * (step + 1)
        optimizer.step()
        publish()
    moments = {name: optimizer.state[masters[name]]["exp_avg"].cpu() for name in trained}
    return Result(gradients, norms, {name: master.cpu() for name, master in masters.items()}, moments)


def step(zero: Zero, optim: ShardedOptimizer, number: int) -> tuple[dict[str, Tensor], float]:
    """Finish and update as the trainer does, clipping by one half; (global gradients, norm)."""
    zero.finish()
    gradients = whole({name: m.parts(m.grad) for name, m in zero.masters().items()})
    square = torch.tensor(optim.grad_square(), dtype=torch.float64)
    dist.all_reduce(square)
    optim.step_with(OPTIM.lr * (number + 1), 0.5)
    zero.zero_grad()
    zero.publish()
    return gradients, float(square) ** 0.5


class _Product(torch.autograd.Function):
    """x w^T, whose weight gradient a pipeline may put off."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.parameter = weight
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        return grad @ weight, deferred.defer(ctx.parameter, lambda: grad.t() @ x)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.empty(WIDTH))
        self.weight = nn.Parameter(torch.empty(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(_Product.apply(x * self.norm, self.weight))


class Staged(nn.Module):
    """A model in two pipeline stages with tied embeddings: x [T, WORDS] -> [T, WIDTH] -> a loss.

    `stages`: those that are here.
    """

    WORDS = 11

    def __init__(self, stages: Sequence[Stage]) -> None:
        super().__init__()
        self.stages, self.spec = tuple(stages), SimpleNamespace(tied_embeddings=True)
        self.embed = nn.Module()
        self.embed.weight = nn.Parameter(torch.empty(self.WORDS, WIDTH))
        held = (index for stage in stages for index in stage.layers)
        self.layers = nn.ModuleDict({str(index): Layer() for index in held})

    def forward(self, x: Tensor, stage: int = 0) -> Tensor:
        part = self.stages[stage]
        if part.is_first:
            x = x @ self.embed.weight
        for index in part.layers:
            x = self.layers[str(index)](x)
        return (x @ self.embed.weight.t()).square().sum() if part.is_last else x
