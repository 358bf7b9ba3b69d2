"""ZeRO 3: the matrices of a model sharded by torch's `fully_shard`, gathered layer by layer.

Sharded are base weights that are matrices. Vectors (norms, biases) stay whole: together they are less than a thousandth
of a model, and over many processes most would hold nothing of them. So do adapters, of their own dtype and small beside
what they adapt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatune.parallel.buckets import is_matrix
from megatune.parallel.shard import Box, ShardSpec
from megatune.parallel.world import Axis, World

# Both take a second to import: at run time, only where something is sharded.
if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def is_adapter(name: str) -> bool:
    return ".adapter." in name


def is_base_matrix(spec: ShardSpec) -> bool:
    """Whether a parameter is a matrix of the model itself: what stage 3 shards, and what may be trained in bf16."""
    return is_matrix(spec) and not is_adapter(spec.name)


class Units:
    """The modules of a model that are gathered each as one: the experts of a layer, the rest of it, and what is
    outside the layers.

    Shards `model` (on meta) in place: parameters `names` become DTensors, over the mesh of the expert or of the dense
    parameters. `stages_of`: local pipeline stages of a parameter or module, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        specs: Mapping[str, ShardSpec],
        world: World,
        compute_dtype: torch.dtype,
        stages_of: Callable[[str], tuple[int, ...]],
        master_dtype: torch.dtype = torch.float32,
    ) -> None:
        self._model, self._world = model, world
        self._sums: dict[str, Tensor] | None = None if master_dtype == torch.float32 else {}
        self._tensors: dict[str, tuple[DTensor, Tensor]] | None = None
        self._units: list[tuple[FSDPModule, tuple[int, ...]]] = []
        parameters = dict(model.named_parameters())
        sizes = {True: world.efsdp.size, False: world.fsdp.size}
        self.names = frozenset(
            name for name in parameters if is_base_matrix(specs[name]) and sizes[specs[name].expert] > 1
        )
        self._specs = {name: specs[name] for name in self.names}
        if not self.names:
            return
        for name in self.names:
            if parameters[name].requires_grad:
                parameters[name].data = parameters[name].data.to(master_dtype)
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        # Masters are cast when gathered, where they are fp32.
        cast = None if compute_dtype == torch.float32 else compute_dtype
        self._options = {
            "reshard_after_forward": True,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=cast, reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
            "ignored_params": {p for name, p in parameters.items() if name not in self.names},
        }
        for number, layer in getattr(model, "layers", nn.ModuleDict()).items():
            stages = stages_of(f"layers.{number}.")
            for path, module in self._experts(layer, f"layers.{number}."):
                self._shard(module, path, stages, expert=True)
            self._shard(layer, f"layers.{number}.", stages, expert=False)
        # The root also where nothing is left for it: one root makes the units share streams and prefetch.
        fully_shard(model, mesh=world.fsdp_mesh(expert=sizes[False] == 1), **self._options)
        self._units.append((model, ()))
        for module, _ in self._units:
            # Gradients are of sums over tokens, already divided by the global token count: add, do not average.
            # gloo has no pre-multiplied sum, hence the plain one.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)

    def begin(self, stage: int, is_last: bool) -> None:
        """Before a backward: each reduce-scatters its gradients, the last of a stage also sums them over replicas."""
        self._take()
        for module, stages in self._units:
            if stage in stages or not stages:
                module.set_requires_all_reduce(is_last, recurse=False)

    def gradients(self) -> dict[str, Tensor | None]:
        """After the last backward of a step: the sums, in fp32, of each shard's gradients; None: there is none."""
        if self._sums is None:
            grads = {name: parameter.grad for name, (parameter, _) in self.tensors().items()}
            return {name: None if grad is None else grad.to_local() for name, grad in grads.items()}
        self._take()
        return {name: self._sums.get(name) for name in self.tensors()}

    def clear(self) -> None:
        """Forget all gradients."""
        for parameter, _ in self.tensors().values():
            parameter.grad = None
        if self._sums:
            self._sums.clear()

    @torch.no_grad()
    def _take(self) -> None:
        """`fully_shard` leaves gradients in the parameters' dtype: where that is not fp32, those of each micro-batch
        are added up here."""
        if self._sums is None:
            return
        for name, (parameter, _) in self.tensors().items():
            if parameter.grad is None:
                continue
            grad, parameter.grad = parameter.grad.to_local(), None
            if name in self._sums:
                self._sums[name].add_(grad)
            else:
                self._sums[name] = grad.float()

    def box(self, name: str, shape: tuple[int, ...]) -> Box:
        """The elements of the local tensor (of this shape) that this process's shard of it holds."""
        axis = self._axis(name)
        dim = _shard_dim(shape, axis.size)
        rows = -(-shape[dim] // axis.size)
        start = min(axis.rank * rows, shape[dim])
        offset = tuple(start if d == dim else 0 for d in range(len(shape)))
        return Box(offset, tuple(min(rows, n - start) if d == dim else n for d, n in enumerate(shape)))

    def tensors(self) -> dict[str, tuple[DTensor, Tensor]]:
        """(parameter, this process's shard) by name; to be called once the model has memory."""
        if self._tensors is None:
            self._tensors = {
                name: (p, p.detach().to_local())
                for name, p in self._model.named_parameters()
                if name in self.names
            }
        return self._tensors

    def _axis(self, name: str) -> Axis:
        return self._world.efsdp if self._specs[name].expert else self._world.fsdp

    def _experts(self, layer: nn.Module, at: str) -> list[tuple[str, nn.Module]]:
        """The topmost modules of a layer whose sharded parameters are all of experts."""
        found: list[tuple[str, nn.Module]] = []
        for path, module in layer.named_modules(prefix=at.removesuffix(".")):
            inside = [spec.expert for name, spec in self._specs.items() if name.startswith(f"{path}.")]
            if inside and all(inside) and not any(path.startswith(f"{above}.") for above, _ in found):
                found.append((path, module))
        return found

    def _shard(self, module: nn.Module, path: str, stages: tuple[int, ...], *, expert: bool) -> None:
        prefix = f"{path.removesuffix('.')}."
        if not any(n.startswith(prefix) and spec.expert == expert for n, spec in self._specs.items()):
            return
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import Shard

        size = (self._world.efsdp if expert else self._world.fsdp).size
        fully_shard(
            module,
            mesh=self._world.fsdp_mesh(expert),
            shard_placement_fn=lambda p: Shard(_shard_dim(tuple(p.shape), size)),
            **self._options,
        )
        self._units.append((module, stages))


def _shard_dim(shape: tuple[int, ...], size: int) -> int:
    """Rows; where there are fewer than processes (experts), the next dimension if it comes out even."""
    return 1 if shape[0] < size and shape[1] % size == 0 else 0
