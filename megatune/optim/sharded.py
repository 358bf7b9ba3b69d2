"""AdamW over this process's shards: fp32 tensors, whatever the layout.

Masters that stand in line in a bucket, and are treated alike, are updated as one tensor: the optimizer's cost on the
host does not grow with the number of adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megatune.config.schema import OptimConfig
from megatune.parallel import Master, Parts

SLOTS = ("exp_avg", "exp_avg_sq")


@dataclass
class _Run:
    """Masters that are updated as one. `grad`: the gradient of all, always in the same place; None for one master that
    stands alone, whose gradient may be another tensor in every step."""

    tensor: nn.Parameter
    grad: Tensor | None
    decays: bool
    counts: bool
    members: list[Master] = field(default_factory=list)

    def gradient(self) -> Tensor:
        grad = self.members[0].grad if self.grad is None else self.grad
        return torch.zeros_like(self.tensor) if grad is None else grad


class ShardedAdamW:
    """AdamW (arXiv:1711.05101) with decoupled weight decay on matrices only; moments in fp32, sharded as the masters.

    `masters`: by name; none where all that this process holds is frozen (a pipeline stage). `steps` counts finished
    steps. Use: gradients finished, `grad_square()`, `step_with(lr, scale)`.
    """

    def __init__(self, masters: Mapping[str, Master], config: OptimConfig) -> None:
        self.config = config
        self.steps = 0
        self._masters = masters
        self._runs = _join(masters)
        groups = [
            {"params": params, "weight_decay": decay}
            for params, decay in (
                ([run.tensor for run in self._runs if run.decays], config.weight_decay),
                ([run.tensor for run in self._runs if not run.decays], 0.0),
            )
            if params
        ]
        betas = (config.beta1, config.beta2)
        self._optimizer = (
            torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
            if groups
            else None  # nothing is trained here, or every shard is empty (more processes than elements)
        )
        for run in self._runs:
            self._optimizer.state[run.tensor] = {
                "step": torch.zeros((), dtype=torch.float32, device=run.tensor.device),
                **{slot: torch.zeros_like(run.tensor) for slot in SLOTS},
            }

    @torch.no_grad()
    def grad_square(self) -> float:
        """Sum of the squares of the gradient's elements that this process counts: summed over all processes it is the
        square of the global norm. Waits for the device, once."""
        grads = [run.gradient() for run in self._runs if run.counts]
        if not grads:
            return 0.0
        return torch.stack(torch._foreach_norm(grads)).double().square().sum().item()

    @torch.no_grad()
    def step_with(self, lr: float, scale: float = 1.0) -> None:
        """One update with learning rate `lr`, gradients multiplied by `scale` first (clipping)."""
        self.steps += 1
        if self._optimizer is None:
            return
        grads = [run.gradient() for run in self._runs]
        if scale != 1.0:
            torch._foreach_mul_(grads, scale)
        for run, grad in zip(self._runs, grads, strict=True):
            run.tensor.grad = grad
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        for run in self._runs:
            run.tensor.grad = None

    def state(self) -> dict[str, Parts]:
        """Moments by `optim/<slot>/<name>`, each sharded as its master. The tensors are the live ones: filling them in
        place (and `load_steps`) restores the optimizer."""
        moments: dict[tuple[str, str], Tensor] = {}
        for run in self._runs:
            slots, start = self._optimizer.state[run.tensor], 0
            for master in run.members:
                size = master.tensor.numel()
                for slot in SLOTS:
                    here = slots[slot].view(-1)[start : start + size]
                    moments[slot, master.name] = here.view(master.tensor.shape)
                start += size
        return {
            # Empty shards are in no run, and their moments as empty as they are.
            f"optim/{slot}/{name}": master.parts(moments.get((slot, name), master.tensor))
            for name, master in self._masters.items()
            for slot in SLOTS
        }

    def load_steps(self, steps: int) -> None:
        """Set the number of finished steps after the moments were filled."""
        self.steps = steps
        for run in self._runs:
            self._optimizer.state[run.tensor]["step"].fill_(float(steps))


def build(masters: Mapping[str, Master], config: OptimConfig) -> ShardedAdamW:
    """The optimizer of `config` over the trainable parameters of a model (`Zero.masters`)."""
    return ShardedAdamW(masters, config)


def _join(masters: Mapping[str, Master]) -> list[_Run]:
    """Runs of masters that stand behind one another in a bucket, with or without decay, counted or not."""
    runs: list[_Run] = []
    in_line: dict[int, list[Master]] = {}
    for master in masters.values():
        if not master.tensor.numel():
            continue
        if master.run is None:
            tensor = nn.Parameter(master.tensor, requires_grad=False)
            runs.append(_Run(tensor, None, master.is_matrix, master.counts, [master]))
        else:
            in_line.setdefault(id(master.run[0]), []).append(master)
    for line in in_line.values():
        line.sort(key=lambda master: master.run[2])
        groups: list[list[Master]] = []
        for master in line:
            last = groups[-1][-1] if groups else None
            is_next = last is not None and last.run[2] + last.tensor.numel() == master.run[2]
            if is_next and (last.is_matrix, last.counts) == (master.is_matrix, master.counts):
                groups[-1].append(master)
            else:
                groups.append([master])
        for group in groups:
            flat, grads, start = group[0].run
            here = slice(start, start + sum(master.tensor.numel() for master in group))
            tensor = nn.Parameter(flat[here], requires_grad=False)
            runs.append(_Run(tensor, grads[here], group[0].is_matrix, group[0].counts, group))
    return runs
