"""Optimizers over sharded states, and learning rate schedules."""

from megatune.optim.schedules import learning_rate, warmup_steps
from megatune.optim.sharded import ShardedOptimizer, build, master_dtype, state_width

__all__ = ["ShardedOptimizer", "build", "learning_rate", "master_dtype", "state_width", "warmup_steps"]
