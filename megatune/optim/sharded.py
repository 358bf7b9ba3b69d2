"""AdamW over this process's shards.

Parameters may be plain tensors or DTensors (ZeRO). The step runs on the local shards as plain tensors: DTensor costs
tens of microseconds of host time a tensor, and nothing in AdamW needs more than the local numbers.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from megatune.config.schema import OptimConfig

SLOTS = ("exp_avg", "exp_avg_sq")


class ShardedAdamW:
    """AdamW (arXiv:1711.05101) with decoupled weight decay on matrices only; states in fp32, sharded as the weights.

    `step` counts finished steps. Use: backward, `grad_norm()`, `step_with(lr, scale)`, which also clears gradients.
    """

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self.config = config
        self.steps = 0
        self._sources = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._sources:
            raise ValueError("the model has no trainable parameter")
        self._local = {name: nn.Parameter(_local(p.detach())) for name, p in self._sources.items()}
        decayed = [p for n, p in self._local.items() if self._sources[n].ndim >= 2 and p.numel()]
        plain = [p for n, p in self._local.items() if self._sources[n].ndim < 2 and p.numel()]
        groups = [
            {"params": params, "weight_decay": decay}
            for params, decay in ((decayed, config.weight_decay), (plain, 0.0))
            if params
        ]
        self._optimizer = (
            torch.optim.AdamW(
                groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
            )
            if groups
            else None  # every shard of this process is empty (more processes than rows)
        )
        for p in self._local.values():
            if p.numel():
                self._optimizer.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    **{slot: torch.zeros_like(p) for slot in SLOTS},
                }

    def grad_norm(self) -> float:
        """L2 norm of the gradient of all trainable parameters, over all shards, on the host."""
        by_dtype = [g.float() for g in self._local_grads().values() if g.numel()]
        norms = torch._foreach_norm(by_dtype) if by_dtype else []
        square = sum((n.double() ** 2 for n in norms), torch.zeros((), dtype=torch.float64))
        square = square.cpu()
        mesh = self._shard_mesh()
        if mesh is not None and mesh.size() > 1:
            dist.all_reduce(square, group=mesh.get_group())
        return math.sqrt(square.item())

    def step_with(self, lr: float, scale: float = 1.0) -> None:
        """One update with learning rate `lr`, gradients multiplied by `scale` first (clipping), then cleared."""
        grads = self._local_grads()
        if scale != 1.0 and grads:
            torch._foreach_mul_(list(grads.values()), scale)
        for name, p in self._local.items():
            p.grad = grads[name]
        if self._optimizer is not None:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        self.steps += 1
        self.zero_grad()

    def zero_grad(self) -> None:
        for p in self._local.values():
            p.grad = None
        for p in self._sources.values():
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """Optimizer states by `optim/<slot>/<name>`, each with the sharding of its parameter. The tensors are the
        live ones: filling them in place (and setting `load_steps`) restores the optimizer."""
        found: dict[str, Tensor] = {}
        for name, local in self._local.items():
            source = self._sources[name]
            slots = self._optimizer.state[local] if local.numel() else {s: local.detach() for s in SLOTS}
            for slot in SLOTS:
                found[f"optim/{slot}/{name}"] = _like(source, slots[slot])
        return found

    def load_steps(self, steps: int) -> None:
        """Set the number of finished steps after the states were filled."""
        self.steps = steps
        if self._optimizer is not None:
            for state in self._optimizer.state.values():
                state["step"].fill_(float(steps))

    def _local_grads(self) -> dict[str, Tensor]:
        grads = {}
        for name, p in self._sources.items():
            grads[name] = torch.zeros_like(self._local[name]) if p.grad is None else _local(p.grad)
        return grads

    def _shard_mesh(self):
        for p in self._sources.values():
            if isinstance(p, DTensor):
                mesh = p.device_mesh
                dims = [i for i, placement in enumerate(p.placements) if not isinstance(placement, Replicate)]
                return mesh[mesh.mesh_dim_names[dims[0]]] if dims and mesh.ndim > 1 else mesh
        return None


def build(model: nn.Module, config: OptimConfig) -> ShardedAdamW:
    """The optimizer of `config` over the trainable parameters of `model` (already sharded and filled)."""
    return ShardedAdamW(model, config)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(source: Tensor, local: Tensor) -> Tensor:
    """`local` as the shard of a tensor that is sharded as `source`."""
    if not isinstance(source, DTensor):
        return local.detach()
    mesh, placements = source.device_mesh, source.placements
    return DTensor.from_local(
        local.detach(), mesh, placements, run_check=False, shape=source.shape, stride=source.stride()
    )
