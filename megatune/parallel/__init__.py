"""Process groups, meshes, shard metadata and the parallel wrappers."""

from megatune.parallel.shard import Fused, ShardSpec
from megatune.parallel.world import World, check_layout, init, mesh_shape
from megatune.parallel.zero import set_last_micro_batch, wrap

__all__ = [
    "Fused",
    "ShardSpec",
    "World",
    "check_layout",
    "init",
    "mesh_shape",
    "set_last_micro_batch",
    "wrap",
]
