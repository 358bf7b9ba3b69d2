"""Process groups, the layout's axes, shard metadata and the parallel wrappers."""

from megatune.config.layout import Layout, layout_of
from megatune.parallel.shard import Box, Cut, Fused, Parts, ShardSpec
from megatune.parallel.stages import Stage
from megatune.parallel.world import Axis, World, init, make_world
from megatune.parallel.zero import Master, Zero

__all__ = [
    "Axis",
    "Box",
    "Cut",
    "Fused",
    "Layout",
    "Master",
    "Parts",
    "ShardSpec",
    "Stage",
    "World",
    "Zero",
    "init",
    "layout_of",
    "make_world",
]
