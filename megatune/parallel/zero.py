"""ZeRO (arXiv:1910.02054) through `fully_shard`, composed with hybrid sharding, mixed precision and frozen weights.

Stage 0 keeps everything on each process; 1 shards optimizer states; 2 also gradients; 3 also parameters. Frozen
weights have neither optimizer states nor gradients, so below stage 3 they stay whole on each process and are never
sent; at stage 3 they are sharded like the rest.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from megatune.config.schema import ParallelConfig
from megatune.parallel.world import World

# Below this many trainable bytes one gather and one reduction a step cost less than one of each a layer.
_ONE_UNIT_BYTES = 64 * 2**20


def wrap(model: nn.Module, world: World, config: ParallelConfig, compute_dtype: torch.dtype) -> None:
    """Shard `model` (on meta, its decoder layers in `model.layers`) over the data parallel processes, in place.

    Trainable parameters must be fp32 (they are the master weights), frozen ones of `compute_dtype`. Afterwards
    sharded parameters are DTensors over `world`'s mesh. Does nothing for one process that needs no fp32 masters
    beside lower-precision compute.
    """
    if world.world_size == 1 and not _needs_masters(model, compute_dtype):
        return
    mesh = world.fsdp_mesh()
    reshard = config.zero == 3
    frozen = {p for p in model.parameters() if not p.requires_grad} if config.zero < 3 else set()
    # Adapters are computed in their own dtype inside lora_linear; only base weights are cast for compute.
    cast = compute_dtype if _needs_masters(model, compute_dtype) else None
    policy = MixedPrecisionPolicy(param_dtype=cast, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options = {"mesh": mesh, "reshard_after_forward": reshard, "mp_policy": policy, "ignored_params": frozen}
    if reshard or _trainable_bytes(model) > _ONE_UNIT_BYTES:
        for layer in model.layers.values():
            if any(p not in frozen for p in layer.parameters()):
                fully_shard(layer, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Gradients are of sums over tokens, already divided by the global token count: add, do not average.
            # gloo has no pre-multiplied sum, hence the plain one.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def set_last_micro_batch(model: nn.Module, config: ParallelConfig, is_last: bool) -> None:
    """Tell ZeRO before each micro-batch whether its backward is the last of the optimizer step.

    Stages 0 and 1 reduce gradients once a step; 2 and 3 reduce-scatter in every micro-batch (that is what keeps
    gradients sharded) and all-reduce over replicas once a step.
    """
    if not isinstance(model, FSDPModule):
        return
    if config.zero <= 1:
        model.set_requires_gradient_sync(is_last)
    else:
        model.set_requires_all_reduce(is_last)
    if config.zero < 3:
        model.set_reshard_after_backward(is_last)


def _trainable_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def _needs_masters(model: nn.Module, compute_dtype: torch.dtype) -> bool:
    """Whether base weights train in fp32 while compute is in a lower precision (adapters cast by themselves)."""
    if compute_dtype == torch.float32:
        return False
    return any(p.requires_grad and ".adapter." not in name for name, p in model.named_parameters())
