"""Optimizers over this process's shards: of masters in fp32 (`adamw_bf16`: of matrices in bf16), whatever the layout.

Masters that stand in line in a bucket, and are treated alike, are updated as one tensor: the optimizer's cost on the
host does not grow with the number of adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor

from megatune.config.schema import OptimConfig
from megatune.ops.optim import square_sum
from megatune.optim.bf16 import AdamWBf16
from megatune.optim.host import HostUpdate
from megatune.optim.muon import Muon, is_orthogonal
from megatune.optim.rules import AdamW, AdamW8bit, Lion, Rule, Run, is_8bit
from megatune.parallel import Master, Parts, ShardSpec, World
from megatune.parallel.units import is_base_matrix


class ShardedOptimizer:
    """The optimizer `config.name`, with decoupled weight decay on matrices only; states sharded as the masters.

    `masters`: by name; none where all that this process holds is frozen (a pipeline stage). `world`: theirs. `steps`
    counts finished steps. `seed`: of random rounding. Use: gradients finished, `grad_square()`, `step_with(lr, scale)`.
    ConfigError where the optimizer cannot work under this layout.
    """

    def __init__(
        self,
        masters: Mapping[str, Master],
        config: OptimConfig,
        world: World | None = None,
        seed: int = 0,
    ) -> None:
        self.config = config
        self.steps = 0
        self._masters = masters
        rule_of = _rules(config, world or World.alone(), seed)
        self._runs: list[Run] = []
        self._of_rule: list[tuple[Rule, list[Run]]] = []
        self._rule_of = {name: rule_of(master.spec) for name, master in masters.items()}
        for rule in dict.fromkeys(self._rule_of.values()):
            mine = [master for name, master in masters.items() if self._rule_of[name] is rule]
            runs = _join(mine, config.weight_decay)
            for run in runs:
                run.slots = rule.states(run)
            self._of_rule.append((rule, runs))
            self._runs += runs
        offloads = world is not None and world.config.offload_optimizer and self._runs
        largest = max((run.tensor.numel() for run in self._runs), default=0)
        self._host = HostUpdate(world.device, largest) if offloads else None

    @torch.no_grad()
    def grad_square(self) -> float:
        """Sum of the squares of the gradient's elements that this process counts: summed over all processes it is the
        square of the global norm. Waits for the device, once."""
        grads = [run.gradient() for run in self._runs if run.counts]
        if not grads:
            return 0.0
        return square_sum(grads)[0].item()

    @torch.no_grad()
    def step_with(self, lr: float, scale: float = 1.0) -> None:
        """One update with learning rate `lr`, gradients multiplied by `scale` first (clipping)."""
        self.steps += 1
        for run in self._runs:
            run.take_weight()
        for rule, runs in self._of_rule:
            if runs and self._host is not None:
                self._host.update(rule, runs, scale, lr, self.steps)
            elif runs:
                factor = torch.full((), scale, dtype=torch.float32, device=runs[0].tensor.device)
                rule.update(runs, factor, lr, self.steps)
        for run in self._runs:
            run.weight = None

    def on_host(self) -> list[Tensor]:
        """What lies in host memory because `parallel.offload_optimizer` says so."""
        if self._host is None:
            return []
        return [
            *self._host.tensors(),
            *(one for run in self._runs for one in (run.tensor, *run.slots.values())),
        ]

    def state(self) -> dict[str, Parts]:
        """States by `optim/<slot>/<name>` (`rules`), each sharded as its master. The tensors are the live ones: filling
        them in place (and `load_steps`) restores the optimizer."""
        places = {
            master.name: (run, start) for run in self._runs for master, start, _ in run.places()
        }  # empty shards are in no run
        found: dict[str, Parts] = {}
        for name, master in self._masters.items():
            rule = self._rule_of[name]
            run, start = places.get(name, (None, 0))
            found |= {f"optim/{slot}/{name}": rule.parts(master, slot, run, start) for slot in rule.slots}
        return found

    def load_steps(self, steps: int) -> None:
        """Set the number of finished steps after the states were filled."""
        self.steps = steps


def build(
    masters: Mapping[str, Master], config: OptimConfig, world: World | None = None, seed: int = 0
) -> ShardedOptimizer:
    """The optimizer of `config` over the trainable parameters of a model (`Zero.masters`)."""
    return ShardedOptimizer(masters, config, world, seed)


def master_dtype(config: OptimConfig, compute_dtype: torch.dtype) -> torch.dtype:
    """Of the masters that the optimizer of `config` updates of base matrices (`Zero`)."""
    return compute_dtype if config.name == "adamw_bf16" else torch.float32


def state_width(config: OptimConfig) -> Callable[[ShardSpec], float]:
    """Bytes that the optimizer keeps for an element of a parameter."""
    rule_of = _rules(config, World.alone())
    return lambda spec: rule_of(spec).width


def _rules(config: OptimConfig, world: World, seed: int = 0) -> Callable[[ShardSpec], Rule]:
    """The rule for each parameter."""
    plain: Rule = Lion(config) if config.name == "lion" else AdamW(config)
    if config.name == "adamw_8bit":
        low = AdamW8bit(config)
        return lambda spec: low if is_8bit(spec) else plain
    if config.name == "adamw_bf16":
        rounded = AdamWBf16(config, seed)
        return lambda spec: rounded if is_base_matrix(spec) else plain
    if config.name == "muon":
        muon = Muon(config, world)
        return lambda spec: muon if is_orthogonal(spec) else plain
    return lambda spec: plain


def _join(masters: list[Master], weight_decay: float) -> list[Run]:
    """Runs of masters that stand behind one another in a bucket, with or without decay, counted or not."""
    runs: list[Run] = []
    in_line: dict[int, list[Master]] = {}
    decay = lambda master: weight_decay if master.is_matrix else 0.0  # noqa: E731
    for master in masters:
        if not master.tensor.numel():
            continue
        if master.run is None:
            flat = master.tensor.view(-1)
            runs.append(Run(flat, None, decay(master), master.counts, [master]))
        else:
            in_line.setdefault(id(master.run[0]), []).append(master)
    for line in in_line.values():
        line.sort(key=lambda master: master.run[2])
        borders = [0, *(i for i, (a, b) in enumerate(pairwise(line), 1) if not _continues(a, b)), len(line)]
        for first, after in pairwise(borders):
            group = line[first:after]
            flat, grads, start = group[0].run
            here = slice(start, start + sum(master.tensor.numel() for master in group))
            runs.append(Run(flat[here], grads[here], decay(group[0]), group[0].counts, group))
    return runs


def _continues(a: Master, b: Master) -> bool:
    """Whether `b` stands right behind `a`, and is treated alike."""
    is_next = a.run[2] + a.tensor.numel() == b.run[2]
    return is_next and (a.is_matrix, a.counts) == (b.is_matrix, b.counts)
